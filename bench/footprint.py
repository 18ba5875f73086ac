"""Memory, and time from the start to the first detection: `edged run` against the shortest script, and ultralytics."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from bench.measure import Benchmark, Result, Say, Target, ratio
from bench.vision import ROOT, Device, Peer, models, pss_mib, write_pictures

SIZE = 640
THREADS = 2
PICTURES = 12  # answered before memory is read
ROUNDS, ROUNDS_QUICK = 5, 2


def of_edged(folder: Path, release: Path, pictures: list[bytes]) -> tuple[float, float]:
    """Seconds until a daemon that starts has answered a file that waits for it, and its PSS in MiB after PICTURES of them.

    It has run here before, as a device has: what only the first start does (the release is copied and proven) is done.
    """
    running = Device(folder, release, THREADS)
    (running.inbox / "installs.jpg").write_bytes(pictures[0])
    running.start()
    running.wait_left(0)
    running.stop()
    (running.inbox / "first.jpg").write_bytes(pictures[0])
    time.sleep(1.0)  # a file counts as whole when it has not changed for a while: it shall be so already
    started = time.perf_counter()
    running.start()
    try:
        running.wait_left(0)
        seconds = time.perf_counter() - started
        for number, picture in enumerate(pictures):
            beside = running.inbox / f".{number}"
            beside.write_bytes(picture)
            beside.rename(running.inbox / f"{number}.jpg")
        running.wait_left(0)
        return seconds, pss_mib(running.process.pid)
    finally:
        running.stop()


def of_peer(name: str, model: Path, files: list[Path]) -> tuple[float, float]:
    """The same of a peer."""
    started = time.perf_counter()
    running = Peer(name, model, SIZE, THREADS, files)
    try:
        running.hear()
        seconds = time.perf_counter() - started
        running.hear()
        return seconds, pss_mib(running.process.pid)
    finally:
        running.stop()


def run(quick: bool, say: Say) -> Result:
    """Start every side anew in every round."""
    made = models(SIZE)
    seen: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT / "build") as scratch:
        files = write_pictures(Path(scratch) / "pictures", SIZE, PICTURES)
        pictures = [file.read_bytes() for file in files]
        for number in range(ROUNDS_QUICK if quick else ROUNDS):
            folder = Path(scratch) / str(number)
            now = {
                "edged_int8": of_edged(folder / "int8", made.int8_release, pictures),
                "script_int8": of_peer("script", made.int8_float, files),
                "edged_fp32": of_edged(folder / "fp32", made.fp32_release, pictures),
                "script_fp32": of_peer("script", made.fp32, files),
                "ultralytics_fp32": of_peer("ultralytics", made.fp32, files),
            }
            for name, value in now.items():
                seen.setdefault(name, []).append(value)
            say(
                f"round {number + 1}: " + ", ".join(f"{name} {s:.2f} s {mib:.0f} MiB" for name, (s, mib) in now.items())
            )
    seconds = {name: [each[0] for each in values] for name, values in seen.items()}
    memory = {name: [each[1] for each in values] for name, values in seen.items()}
    return Result(
        {
            "pss_vs_bare": ratio(memory["edged_int8"], memory["script_int8"]),
            "pss_vs_ultralytics": ratio(memory["edged_int8"], memory["ultralytics_fp32"]),
            "start_vs_ultralytics": ratio(seconds["edged_int8"], seconds["ultralytics_fp32"]),
        },
        {
            "size": SIZE,
            "threads": THREADS,
            "pss_vs_bare_fp32": round(ratio(memory["edged_fp32"], memory["script_fp32"]), 3),
            "pss_vs_ultralytics_fp32": round(ratio(memory["edged_fp32"], memory["ultralytics_fp32"]), 3),
            "start_vs_ultralytics_fp32": round(ratio(seconds["edged_fp32"], seconds["ultralytics_fp32"]), 3),
            "start_vs_bare": round(ratio(seconds["edged_int8"], seconds["script_int8"]), 2),
        }
        | {f"{name}_pss_mib": round(statistics.median(values), 1) for name, values in memory.items()}
        | {f"{name}_start_s": round(statistics.median(values), 2) for name, values in seconds.items()},
    )


BENCHMARK = Benchmark(
    "footprint",
    "PSS and start to first detection of `edged run` (device-only environment) with the int8 release that ships, against a "
    "bare onnxruntime + cv2 script on the same int8 network and an ultralytics script on its fp32 export",
    {
        "pss_vs_bare": Target("<=", 1.35),
        "pss_vs_ultralytics": Target("<=", 0.2),
        "start_vs_ultralytics": Target("<=", 0.25),
    },
    run,
)
