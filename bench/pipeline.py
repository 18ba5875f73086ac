"""The whole data path against its own inference alone, and against ultralytics on the same files."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.measure import Benchmark, Result, Say, Target, alternate, ratio
from bench.vision import ROOT, Device, Models, device, models, peer, write_pictures

THREADS = 1  # of ONNX Runtime, on every side: the default of a slot


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured at one size: pictures a pass, of which the first are not timed, and rounds."""

    pictures: int
    untimed: int
    rounds: int


FULL = {640: Plan(48, 8, 7), 160: Plan(400, 60, 9)}
QUICK = {640: Plan(16, 4, 3), 160: Plan(120, 20, 3)}


def daemon_pass(running: Device, pictures: list[bytes], plan: Plan) -> float:
    """Pictures a second of a daemon that always has the next file at hand, from the pictures before the first timed
    one until the last file is gone."""
    for number, picture in enumerate(pictures):
        beside = running.inbox / f".{number:05d}"
        beside.write_bytes(picture)
    for number in range(len(pictures)):
        os.rename(running.inbox / f".{number:05d}", running.inbox / f"{number:05d}.jpg")
    timed = len(pictures) - plan.untimed
    running.wait_left(timed)
    started, used = time.perf_counter(), running.cpu_s()
    running.wait_left(0)
    seconds, used = time.perf_counter() - started, running.cpu_s() - used
    running.cpu_ms.append(used / timed * 1000)
    return timed / seconds


def at_size(made: Models, plan: Plan, folder: Path, say: Say) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Pictures a second, and processor milliseconds a picture, of every side by its name, round by round."""
    files = write_pictures(folder / "pictures", made.size, plan.pictures)
    pictures = [file.read_bytes() for file in files]
    with ExitStack() as stack:
        ours = {
            name: stack.enter_context(device(folder / name, release, THREADS))
            for name, release in (("edged_fp32", made.fp32_release), ("edged_int8", made.int8_release))
        }
        peers = {
            name: stack.enter_context(peer(kind, model, made.size, THREADS, files))
            for name, kind, model in (
                ("bare_int8", "bare", made.int8_float),
                ("bare_fp32", "bare", made.fp32),
                ("ultralytics_fp32", "ultralytics", made.fp32),
                ("stream_fp32", "ultralytics_stream", made.fp32),
            )
        }
        sides: dict[str, Callable[[], float]] = {name: each.go for name, each in peers.items()}
        for name, running in ours.items():
            sides[name] = partial(daemon_pass, running, pictures, plan)
        values = alternate(plan.rounds, *sides.values(), say=say, names=[f"{made.size} {name}" for name in sides])
        used = {name: each.cpu_ms for name, each in peers.items()} | {name: each.cpu_ms for name, each in ours.items()}
        return dict(zip(sides, values, strict=True)), used


def run(quick: bool, say: Say) -> Result:
    """Measure both sizes."""
    keys: dict[str, float] = {}
    facts: dict[str, object] = {"threads": THREADS}
    for size, plan in (QUICK if quick else FULL).items():
        made = models(size)
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT / "build") as scratch:
            seen, used = at_size(made, plan, Path(scratch), say)
        keys[f"vs_bare_{size}_int8"] = ratio(seen["edged_int8"], seen["bare_int8"])
        keys[f"vs_ultralytics_{size}"] = ratio(seen["edged_fp32"], seen["ultralytics_fp32"])
        keys[f"shipped_vs_ultralytics_{size}"] = ratio(seen["edged_int8"], seen["ultralytics_fp32"])
        facts[f"vs_bare_{size}_fp32"] = round(ratio(seen["edged_fp32"], seen["bare_fp32"]), 3)
        facts[f"vs_ultralytics_stream_{size}"] = round(ratio(seen["edged_fp32"], seen["stream_fp32"]), 3)
        facts[f"shipped_vs_ultralytics_stream_{size}"] = round(ratio(seen["edged_int8"], seen["stream_fp32"]), 3)
        for name, values in seen.items():
            facts[f"{name}_{size}"] = (
                f"{statistics.median(values):.1f} pictures/s, {statistics.median(used[name]):.2f} ms of processor time each"
            )
    return Result(keys, facts)


BENCHMARK = Benchmark(
    "pipeline",
    "a folder of pictures through the daemon (decode, letterbox, infer, decide, commit) against session.run alone, and "
    "against ultralytics.YOLO(onnx).predict on the same files; with the same fp32 file, and as shipped (our int8 release)",
    {
        "vs_bare_640_int8": Target(">=", 0.95),
        "vs_ultralytics_640": Target(">=", 1.0),
        "vs_ultralytics_160": Target(">=", 1.3),
        "shipped_vs_ultralytics_640": Target(">=", 1.9),
        "shipped_vs_ultralytics_160": Target(">=", 1.6),
    },
    run,
)
