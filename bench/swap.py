"""Model swaps in a running daemon under load: what they cost whoever waits for an answer, and whether anything is lost."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from bench.measure import Benchmark, Result, Say, Target
from bench.swap_adapters import swap_adapters
from bench.vision import ROOT, models, pss_mib, write_pictures
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import Result as Answer
from tests.support.device import EDGED, Bus, Device, tables, until
from tests.support.files import file_server
from tests.support.models import copy_release
from tests.system.broker import Broker

SIZE = 640
LOAD = 0.6  # of what the daemon answers when it always has the next picture at hand
CALM_S = 1.0  # after a swap, before anything is measured again
WAIT_S = 180.0
PICTURES = 48


@dataclass(frozen=True, slots=True)
class Plan:
    """How many swaps; pictures for finding out what the daemon can answer; windows that PSS is the median of."""

    onnx: int
    adapters: int
    flood: int
    pss: int


FULL, QUICK = Plan(50, 200, 120, 5), Plan(4, 6, 40, 1)


@dataclass(slots=True)
class Load:
    """Pictures for the daemon's folder at even times, whether it is ready for the next or not."""

    inbox: Path
    pictures: Sequence[Path]
    due: dict[str, float] = field(default_factory=dict)  # name -> when it was put in (seconds since the epoch)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def put(self, due: float) -> None:
        """One picture, at its time: what it has to wait for the daemon counts, also when this is late itself."""
        name = f"{len(self.due):06d}.jpg"
        os.link(self.pictures[len(self.due) % len(self.pictures)], self.inbox / f".{name}")
        time.sleep(max(0.0, due - time.time()))
        self.due[name] = due
        os.rename(self.inbox / f".{name}", self.inbox / name)

    @contextmanager
    def at(self, per_second: float) -> Iterator[None]:
        """So many pictures a second until the block ends."""

        def feed() -> None:
            began, number = time.time(), 0
            while not self._stopping.is_set():
                number += 1
                self.put(began + number / per_second)

        thread = threading.Thread(target=feed, name="load", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join()


class Log:
    """What the daemon's log, in JSON lines, says of its swaps."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def times(self) -> dict[str, float]:
        """When the last swap since the call before was proven, staged and unloaded: seconds since the epoch."""
        found: dict[str, float] = {}
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.startswith(b"{"):
                    continue
                row = json.loads(line)
                for what, text in (("proving", "-> proving"), ("staged", "-> staged"), ("unloaded", ": unloaded ")):
                    if text in row["message"]:
                        found[what] = datetime.fromisoformat(row["ts"]).timestamp()
            self._offset = file.tell()
        return found


@dataclass(slots=True)
class Seen:
    """Windows of time, and what was measured in them."""

    swaps: list[tuple[float, float]] = field(default_factory=list)
    steady: list[tuple[float, float]] = field(default_factory=list)
    proving_s: list[float] = field(default_factory=list)
    pss_mib: list[float] = field(default_factory=list)
    swap_ms: list[float] = field(default_factory=list)


def onnx(plan: Plan, folder: Path, broker: Broker, bus: Bus, say: Say) -> tuple[dict[str, float], dict[str, object]]:
    """Swap between two releases of one network while pictures come; keys and facts."""
    first = models(SIZE).int8_release
    refs = [
        copy_release(first, folder / "releases" / version, {"release": f"bench@{version}"})
        for version in ("1.1", "1.2")
    ]
    with ExitStack() as stack:
        files = stack.enter_context(file_server())
        for ref in refs:
            files.publish(folder / "releases" / ref.release.partition("@")[2], ref)
        more = {"host": {"url": files.url}, "slots": {"eye": {"probation_s": 0.5}}}
        plan_of = tables(folder, "bench", broker, folder / "releases" / "1.1", **more)
        plan_of["pipelines"].pop("ask")
        plan_of["pipelines"]["line"]["source"]["after"] = "delete"
        plan_of["pipelines"]["line"]["policy"] |= {"escalate": False}
        plan_of["log"] = {"format": "json"}
        device = stack.enter_context(Device(folder, plan_of, program=(EDGED,)))
        load = Load(device.inbox, write_pictures(folder / "pictures", SIZE, PICTURES))
        per_second = LOAD * capacity(device, bus, load, plan.flood)
        say(f"open loop: {per_second:.1f} pictures/s")
        log, seen = Log(device.log_path), Seen()
        with load.at(per_second):
            time.sleep(CALM_S)
            for number in range(plan.onnx):
                swap(number, refs[(number + 1) % 2], device, bus, log, seen)
                say(f"swap {number + 1}/{plan.onnx}: proven in {seen.proving_s[-1]:.1f} s, {seen.pss_mib[-1]:.1f} MiB")
        until("every answer", lambda: len(answered(bus)) >= len(load.due) or None, WAIT_S)
        time.sleep(CALM_S)  # for answers that nobody asked for
        return judged(plan, per_second, load, seen, bus)


def capacity(device: Device, bus: Bus, load: Load, count: int) -> float:
    """Pictures a second when the next one always lies there."""
    load.put(time.time())
    until("the first answer", lambda: answered(bus), WAIT_S)
    began = time.time()
    for _ in range(count):
        load.put(began)
    until("every answer", lambda: len(answered(bus)) >= len(load.due) or None, WAIT_S)
    done = max(answer.ts for answer in bus.of(Answer))
    load.due.update(dict.fromkeys(load.due, math.nan))  # of no window
    return count / (done - began)


def swap(number: int, ref: ReleaseRef, device: Device, bus: Bus, log: Log, seen: Seen) -> None:
    """One swap, and as much time without one."""
    assert device.process is not None
    bus.desire("bench", number + 1, {"eye": ref})

    def committed(status: dict[str, dict[str, dict[str, object]]]) -> bool:
        eye = status["models"]["eye"]
        return (eye["active"], eye["update"]) == (ref.release, "committed")

    status = device.wait(f"{ref.release} is committed", committed, WAIT_S)
    times = log.times()
    seen.swaps.append((times["proving"], times["unloaded"]))
    seen.proving_s.append(times["staged"] - times["proving"])
    seen.swap_ms.append(status["models"]["eye"]["swap_ms"])
    time.sleep(CALM_S)
    began = time.time()
    time.sleep(times["unloaded"] - times["proving"])
    seen.steady.append((began, time.time()))
    seen.pss_mib.append(pss_mib(device.process.pid))


def answered(bus: Bus) -> set[str]:
    """The pictures that have an answer."""
    return {answer.item for answer in bus.of(Answer)}


def judged(
    plan: Plan, per_second: float, load: Load, seen: Seen, bus: Bus
) -> tuple[dict[str, float], dict[str, object]]:  # fmt: skip
    """What the answers say."""
    answers = bus.of(Answer)
    times = Counter(item for item, _ in {(answer.item, answer.id) for answer in answers})
    latency = {answer.item: (answer.ts - load.due[answer.item]) * 1000 for answer in answers}
    during, steady = (
        sorted(
            latency[name]
            for name, due in load.due.items()
            if any(a <= due <= b for a, b in windows) and name in latency
        )
        for windows in (seen.swaps, seen.steady)
    )
    early, late = seen.pss_mib[1 : 1 + plan.pss], seen.pss_mib[-plan.pss :]
    keys = {
        "lost": float(len(load.due.keys() - times.keys())),
        "failed": float(sum(answer.error is not None for answer in answers)),
        "twice": float(sum(count - 1 for count in times.values())),
        "p99_vs_steady": quantile(during, 0.99) / quantile(steady, 0.99),
        "pss_growth": statistics.median(late) / statistics.median(early),
        "proving_s_max": max(seen.proving_s),
    }
    facts: dict[str, object] = {
        "pictures": f"{len(load.due)}, {per_second:.1f} a second, {len(during)} during swaps and {len(steady)} without",
        "during_swaps_ms": _spread(during),
        "steady_ms": _spread(steady),
        "swap_ms": f"median {statistics.median(seen.swap_ms):.0f}, at most {max(seen.swap_ms):.0f}",
        "pss_mib": f"{statistics.median(early):.1f} after the second swap, {statistics.median(late):.1f} at the end",
        "proving_s": f"median {statistics.median(seen.proving_s):.1f}, at most {max(seen.proving_s):.1f}",
    }
    return keys, facts


def quantile(ordered: Sequence[float], share: float) -> float:
    """Nearest-rank quantile of sorted values; NaN without any."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else math.nan


def _spread(ordered: Sequence[float]) -> str:
    return ", ".join(f"p{share * 100:g} {quantile(ordered, share):.0f}" for share in (0.5, 0.95, 0.99, 1.0))


def run(quick: bool, say: Say) -> Result:
    """Measure models first, then adapters."""
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT / "build") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        broker = stack.enter_context(Broker(folder / "broker"))
        bus = Bus(broker)
        stack.callback(bus.close)
        keys, facts = onnx(plan, folder, broker, bus, say)
        say(f"models: {keys} {facts}")
        adapted, more = swap_adapters(plan.adapters, folder / "adapters", broker, bus, say)
    for name in ("lost", "failed", "twice"):
        keys[name] += adapted.pop(name)
    return Result({**keys, **adapted}, {**facts, **more})


BENCHMARK = Benchmark(
    "swap",
    "models are swapped in a daemon that answers pictures at 60 % of what it can, each at its time: the 99th percentile of "
    "the time to the answer from the start of proving to the unloading of the old model, against as much time without a "
    "swap; and LoRA adapters on a GGUF model that answers prompts",
    {
        "lost": Target("<=", 0), "failed": Target("<=", 0), "twice": Target("<=", 0),
        "p99_vs_steady": Target("<=", 2.0), "pss_growth": Target("<=", 1.05), "proving_s_max": Target("<=", 60.0),
        "adapter_swap_ms": Target("<=", 5.0),
    },
    run,
)  # fmt: skip
