"""Prove a release in a throw-away process: load it, let it answer its golden set, measure. `python -m edged.prove FOLDER`.

A model that crashes or eats the memory kills this process, not the daemon. It may take no more than `--memory-max` bytes
beyond its libraries: the daemon looks many times a second and ends it, and what would be far too much is not even granted
(RLIMIT_DATA: memory mapped for writing, which is what makes the kernel kill. RLIMIT_AS is of no use: it counts address
space, of which ONNX Runtime and llama.cpp map many times what they touch, whole model files with it).
Prints one JSON object; exit status 0 when the release is good.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from edged.core.limits import MIB, mib
from edged.engines.base import ENGINES, EngineError, EngineOptions
from edged.needs import PROCESS_BYTES

NICENESS = 10  # items in hand go first
OOM_SCORE = 1000  # of 1000: when memory runs out all the same, the kernel takes this process first
RESERVED = 2  # allocators take up to twice what is asked of them: ONNX Runtime's arena grows in powers of two
# Address space that is counted as data and hardly touched: the stack of each of an engine's threads, and what allocators
# keep in advance.
STACK_BYTES, SPARE_BYTES = 8 * MIB, 16 * MIB
# How an allocation that was refused reads in the messages of NumPy, ONNX Runtime, llama.cpp and the C library.
_OUT_OF_MEMORY = re.compile(
    r"bad_?alloc|failed to (re)?alloc|allocat\w* fail|(unable|cannot) (to )?alloc|out of memory|MemoryError|pthread_create",
    re.IGNORECASE,
)
POLL_S = 0.5  # how soon a proof that nobody wants any more ends
WATCH_S = 0.005  # how often it is looked what the child holds; a millisecond fills one or two MiB


class ProveFailed(Exception):
    """The candidate did not prove itself; the message says how."""


class ProveShort(ProveFailed):
    """There was too little memory to find out; the message says how much."""


class ProveCancelled(Exception):
    """Nobody wants to know any more."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What proving measured: seconds to load, seconds for the golden set, number of golden inputs, and the most memory that
    it took, in bytes: by the model alone, and together with a process of its own. `fastest_ms`: milliseconds of the fastest
    answer to a picture, or of a token of the fastest answer: what else the machine does makes others slower, never this."""

    load_s: float
    golden_s: float
    golden: int
    memory_bytes: int = 0
    process_bytes: int = 0
    fastest_ms: float = 0.0


def too_slow(proof: Proof, ms_max: float | None) -> str:
    """Why a release is too slow for its slot; empty when it is not."""
    if ms_max is None or proof.fastest_ms <= ms_max:
        return ""
    return f"too slow: {proof.fastest_ms:.1f} ms for the fastest golden answer, latency_ms_max = {ms_max:g} in its slot"


def prove(
    folder: Path, options: EngineOptions, seconds_max: float, base: Path | None = None,
    cancelled: Callable[[], bool] = lambda: False, memory_max: int | None = None,
) -> Proof:  # fmt: skip
    """Prove the release in `folder` in a niced child; `base` is the folder of an adapter's base. `memory_max`: the bytes of
    data that the model may take there.

    Raises ProveFailed, ProveShort when `memory_max` (or the kernel's patience) was too little, or ProveCancelled soon after
    `cancelled` said so.
    """
    command = [sys.executable, "-m", "edged.prove", str(folder), "--options", json.dumps(asdict(options))]
    if base is not None:
        command += ["--base", str(base)]
    if memory_max is not None:
        command += ["--memory-max", str(memory_max)]
    deadline = time.monotonic() + seconds_max
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        while True:
            try:
                stdout, stderr = child.communicate(timeout=POLL_S if memory_max is None else WATCH_S)
                break
            except subprocess.TimeoutExpired:
                if memory_max is not None and _private(child.pid) > memory_max + PROCESS_BYTES:
                    child.kill()
                    raise ProveShort(f"it took more than {mib(memory_max)} MiB and was stopped") from None
                if cancelled():
                    child.kill()
                    raise ProveCancelled(str(folder)) from None
                if time.monotonic() > deadline:
                    child.kill()
                    raise ProveFailed(f"it did not prove itself within {seconds_max:.0f} s") from None
    return _outcome(child.returncode, stdout, stderr.decode(errors="replace").strip(), memory_max)


def _outcome(status: int, stdout: bytes, stderr: str, memory_max: int | None) -> Proof:
    """What the child found; raises ProveFailed or ProveShort."""
    try:
        answer = json.loads(stdout.splitlines()[-1])
    except (ValueError, IndexError):
        answer = {
            "error": f"the proving process ended with status {status}: {(stderr.splitlines() or ['no output'])[-1][:300]}"
        }
        if status == -signal.SIGKILL:  # nobody else does that to it
            raise ProveShort("the kernel ended the proving process: memory ran out") from None
        if memory_max is not None and _OUT_OF_MEMORY.search(stderr):
            answer["short"] = True
    if answer.get("short"):
        at_most = "" if memory_max is None else f" within {mib(memory_max)} MiB"
        raise ProveShort(f"it cannot be loaded and answer{at_most}: {answer['error']}")
    if status != 0:
        raise ProveFailed(str(answer.get("error", "unknown reason")))
    return Proof(**answer)


def _private(pid: int) -> int:
    """Bytes in memory that a process shares with no file: what the kernel cannot take back."""
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except (OSError, ValueError):
        return 0  # it has just ended
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _be_modest() -> None:
    """Go last in everything: processor, disk, and the kernel's choice of what survives when memory runs out."""
    os.nice(NICENESS)
    with suppress(OSError):  # what a machine does not offer is not worth a word
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    import psutil

    with suppress(OSError, AttributeError, psutil.Error):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


def _allow(bytes_max: int, threads: int) -> None:
    """From here on this process is granted no more data than a model could reserve that takes this much."""
    data = _field("status", "VmData") + RESERVED * bytes_max + threads * STACK_BYTES + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))


def _field(file: str, name: str) -> int:
    """Bytes of `name: N kB` in /proc/self/`file`; 0 where the machine does not say."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self", file).read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _mapped(folder: Path) -> int:
    """Bytes in memory of the files in `folder` that are mapped."""
    total, inside = 0, False
    with suppress(OSError), open("/proc/self/smaps") as lines:
        for line in lines:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = f" {folder.resolve()}/" in line
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


class _Meter:
    """The most memory that this process takes from now on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins now
        self._anonymous, self._files = _field("status", "RssAnon"), _field("status", "RssFile")
        self._own = _field("smaps_rollup", "Pss")

    def used(self) -> dict[str, int]:
        """Bytes at the peak, without the pages of libraries that were read meanwhile: the daemon shares those."""
        mapped = _mapped(self._folder)
        libraries = max(0, _field("status", "RssFile") - self._files - mapped)
        peak = _field("status", "VmHWM") - self._anonymous - self._files - libraries
        model = max(peak, _field("status", "RssAnon") - self._anonymous + mapped, 0)
        return {"memory_bytes": model, "process_bytes": model + self._own}


def _main() -> int:
    from edged import golden, releases
    from edged.engines.base import Generator, open_engine

    parser = argparse.ArgumentParser(prog="edged.prove", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--memory-max", type=int)
    arguments = parser.parse_args()
    _be_modest()
    options = EngineOptions(**arguments.options)
    try:
        started = time.monotonic()
        manifest = releases.read_manifest(arguments.folder)
        loaded_folder = arguments.base or arguments.folder
        loaded = manifest if arguments.base is None else releases.read_manifest(arguments.base)
        if loaded.engine in ENGINES:  # its libraries are in the daemon already
            import_module(ENGINES[loaded.engine].partition(":")[0])
        meter = _Meter(loaded_folder)
        if arguments.memory_max is not None:
            _allow(arguments.memory_max, options.threads)
        engine = open_engine(loaded_folder, loaded, options)
        if arguments.base is not None:
            if not isinstance(engine, Generator):
                raise EngineError(f"{loaded.release} takes no adapter (kind {loaded.kind})")
            engine.attach(arguments.folder / manifest.files["adapter"].path)
        loaded_at = time.monotonic()
        answers: list[float] = []
        count = golden.check(engine, arguments.folder, manifest, took=answers.append)
    except (EngineError, releases.BadRelease, OSError, KeyError, ValueError, MemoryError) as error:
        text = str(error) or type(error).__name__
        short = isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(text))
        print(json.dumps({"error": text, "short": short and arguments.memory_max is not None}))
        return 1
    found = {"load_s": loaded_at - started, "golden_s": time.monotonic() - loaded_at, "golden": count,
             "fastest_ms": min(answers, default=0.0)}  # fmt: skip
    print(json.dumps(found | meter.used()))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
