"""Minutes of mixed load on a running device, disturbed on purpose: nothing may grow, and nothing may be lost.

    make soak [ARGS="--minutes 2 --json"]

Exit status 0 when everything that went in came out once and memory, file descriptors and threads stayed flat.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.measure import to_stderr
from bench.soak_load import Load
from bench.soak_report import Reading, markdown, plot, trends
from edged.engines.host import MODULE
from edged.releases import reference
from edged.wire.messages import Result
from tests.support.device import Bus, Device, merged, responder_tables, tables, toml
from tests.support.files import file_server
from tests.support.hosted import clerk
from tests.support.models import make_release
from tests.system.broker import Broker

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
STEP_S = 0.02
# Seconds between two disturbances of a kind; in a short run each comes three times at least.
BROKER_S, RELOAD_S, SWAP_S = 150.0, 75.0, 100.0
DOWN_S = 3.0  # the broker stays away for this long
READINGS_S = 10.0
QUIET_S_MAX = 180.0  # for everything that is still on its way to come out in the end
DEAF_S = 3.0  # around the time without a connection in which the listener may miss something
CAMERA_FPS = 10


@dataclass(slots=True)
class Rig:
    """What runs, and what was done to it."""

    broker: Broker
    bus: Bus
    device: Device
    releases: list[Path]
    plan: dict[str, Any]
    load: Load
    started: float
    seconds: float
    readings: list[Reading] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    turns: Counter[str] = field(default_factory=Counter)
    # From when to when (seconds since the epoch) the listener of this program may have been without the broker: a broker
    # that is killed forgets what it has taken, and what is published before the listener is back is heard by nobody.
    deaf: list[tuple[float, float]] = field(default_factory=list)
    _deaf_from: float = 0.0
    _broker_back: float = 0.0

    def every(self, usual_s: float) -> float:
        """How often a disturbance comes in a run of this length."""
        return min(usual_s, self.seconds / 4)

    def note(self, what: str) -> None:
        """Remember a disturbance."""
        self.events.append((time.monotonic() - self.started, what))

    def disturb_broker(self) -> None:
        """Stop it in order (it keeps what it holds), or kill it (it loses that)."""
        self.turns["broker"] += 1
        if self.turns["broker"] % 2:
            self.broker.stop()
            self.note("broker stopped")
        else:
            self.broker.kill9()
            self.note("broker killed")
        self._broker_back = time.monotonic() + DOWN_S
        self._deaf_from = time.time() - DEAF_S

    def listen(self) -> None:
        """Note when the listener hears again."""
        if self._deaf_from and not self._broker_back and self.bus.link.connected:
            self.deaf.append((self._deaf_from, time.time() + DEAF_S))
            self._deaf_from = 0.0

    def was_deaf(self, at: float) -> bool:
        """Whether what was said at this time (seconds since the epoch) may have been missed."""
        return any(begin <= at <= end for begin, end in self.deaf)

    def reload(self) -> None:
        """A good configuration, and every third time one that must be refused."""
        self.turns["reload"] += 1
        assert self.device.process is not None
        if self.turns["reload"] % 3 == 0:
            self.device.config.write_text("[device\n")
            self.note("reload of a broken configuration")
        else:
            answer_by = 1.0 + 2.0 * (self.turns["reload"] % 2)
            plan = merged(self.plan, {"pipelines": {"ask": {"answer_by_s": answer_by}}})
            self.device.config.write_text(toml(plan))
            self.note("reload")
        self.device.process.send_signal(signal.SIGHUP)

    def swap(self) -> None:
        """To the other release."""
        self.turns["swap"] += 1
        ref = reference(self.releases[self.turns["swap"] % 2])
        self.bus.desire(self.device.name, self.turns["swap"], {"eye": ref})
        self.note(f"swap to {ref.release}")

    def read(self) -> None:
        """Look at the daemon and its engines' processes; one that proves a release is gone again in seconds."""
        assert self.device.process is not None
        daemon = psutil.Process(self.device.process.pid)
        rss, pss, fds, threads = 0, 0, 0, 0
        for process in (daemon, *daemon.children()):
            try:
                if process is not daemon and MODULE not in process.cmdline():
                    continue
                with process.oneshot():
                    memory = process.memory_full_info()
                    rss += memory.rss
                    pss += memory.pss
                    fds += process.num_fds()
                    threads += process.num_threads()
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # one that has just ended
                continue
        self.readings.append(Reading(time.monotonic() - self.started, rss / 2**20, pss / 2**20, fds, threads))

    def run(self, say: Callable[[str], None]) -> None:
        """The whole time."""
        acts = [("read", min(READINGS_S, self.seconds / 60), self.read), ("reload", self.every(RELOAD_S), self.reload),
                ("swap", self.every(SWAP_S), self.swap), ("broker", self.every(BROKER_S), self.disturb_broker)]  # fmt: skip
        due = {name: self.started + every_s for name, every_s, _ in acts}
        said = self.started
        while (now := time.monotonic()) < self.started + self.seconds:
            if self._broker_back and now >= self._broker_back:
                self.broker.start()
                self._broker_back = 0.0
            for name, every_s, act in acts:
                away = self._broker_back or not self.bus.link.connected
                if now >= due[name] and not (away and name in {"swap", "broker"}):
                    due[name] = now + every_s
                    act()
            self.listen()
            self.load.tick(now)
            if now - said >= 60:
                said = now
                load, last = self.load, self.readings[-1]
                say(f"{(now - self.started) / 60:.0f} min: {len(load.files)} files, {len(load.requests)} requests, "
                    f"{len(load.open)} open, {last}")  # fmt: skip
            time.sleep(STEP_S)
        if self._broker_back:
            self.broker.start()
        self.device.config.write_text(toml(self.plan))

    def settle(self) -> None:
        """Wait until everything that is on its way has come out."""
        deadline = time.monotonic() + QUIET_S_MAX
        while time.monotonic() < deadline and not self.quiet():
            self.listen()
            self.load.repeat(time.monotonic())
            time.sleep(0.2)

    def quiet(self) -> bool:
        """Whether nothing is left anywhere."""
        status = self.device.status()
        waiting = [path for path in self.device.inbox.iterdir() if path.is_file()]
        asked = status is None or status["samples"].get("escalated") or status["outbox"]["messages"]
        return not (waiting or self.unanswered() or asked)

    def unanswered(self) -> list[str]:
        """Requests without a reply whose reply could not have been missed."""
        return [key for key in self.load.open if not self.was_deaf(self.load.requests[key].first)]


def came_out(rig: Rig) -> tuple[dict[str, int], dict[str, int]]:
    """What came out, and how often each thing that must not be was found."""
    load, inbox, status = rig.load, rig.device.inbox, rig.device.status()
    assert status is not None
    done, rejected = ({path.name for path in (inbox / name).iterdir()} for name in ("done", "rejected"))
    results: dict[str, set[str]] = {}
    for message in rig.bus.of(Result, rig.device.name):
        if message.pipeline == "line":
            results.setdefault(message.item, set()).add(message.id)
    # The inode's time is that of the rename into `done` or `rejected`: the result was in the outbox right before.
    settled = {path.name: path.stat().st_ctime for name in ("done", "rejected") for path in (inbox / name).iterdir()}
    silent = set(load.files) - results.keys()
    unheard = {name for name in silent if rig.was_deaf(settled.get(name, 0.0))}
    good = {name for name in load.files if name.endswith("-good.png")}
    samples = status["samples"]
    wrong = {
        "files that are nowhere": len(set(load.files) - done - rejected),
        "files that are in two places": len(done & rejected),
        "good files that were rejected": len(good & rejected),
        "bad files that were not": len((set(load.files) - good) & done),
        "files without a result": len(silent - unheard),
        "files with two results": sum(len(ids) > 1 for ids in results.values()),
        "requests without a reply": len(rig.unanswered()),
        # One that was refused may be sent again, refused again, and answered then.
        "requests with two answers": sum(list(errors.values()).count("") > 1 for errors in load.replies.values()),
        "questions without a label": samples.get("escalated", 0) + samples.get("unresolved", 0),
        "messages left in the outbox": status["outbox"]["messages"],
    }
    out = {"files done": len(done), "files rejected": len(rejected), "results heard": len(results),
           "replies heard": len(load.replies), "results said while the broker or the listener was away": len(unheard),
           "replies likewise": len(load.open) - len(rig.unanswered()), "samples labelled": samples.get("labelled", 0),
           "swaps asked for": status["counters"].get("updates_desired", 0)}  # fmt: skip
    return out, wrong


def account(rig: Rig) -> tuple[dict[str, int], list[str]]:
    """What came out, and everything that is wrong about it."""
    out, wrong = came_out(rig)
    status = rig.device.status()
    assert status is not None
    wrong |= {f"counter {name}": status["counters"].get(name, 0) for name in (
        "pipeline_faults", "control_faults", "updater_faults", "store_errors", "messages_dropped", "outbox_buried",
        "outbox_expired", "samples_not_kept", "updates_failed", "updates_reverted", "engine_ends",
    )}  # fmt: skip
    return out, [f"{name}: {count}" for name, count in wrong.items() if count]


def phi() -> Path:
    """The demo's small Phi; made once."""
    command = [sys.executable, "-m", "bench.demo.phi", str(ROOT / "build" / "test-phi"), "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return Path(json.loads(done.stdout.splitlines()[-1])["model_gguf"])


def film(path: Path) -> bool:
    """A video for the camera; false where this edged has none."""
    try:
        import edged.sources.camera  # noqa: F401
    except ImportError:
        return False
    import cv2

    from tests.support.models import PLAIN, SIDE, grey

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), CAMERA_FPS, (SIDE, SIDE))
    for _ in range(30 * CAMERA_FPS):
        writer.write(grey(PLAIN))
    writer.release()
    return True


def soak(minutes: float, folder: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], Rig]:
    """The run and its result."""
    releases = [folder / "toy-1.0", folder / "toy-1.1"]
    for number, release in enumerate(releases):
        make_release(release, f"toy@1.{number}", number)
    make_release(folder / "big", "big@1.0", 2)
    talker = clerk(folder / "clerk", phi(), "clerk@1.0")
    camera = film(folder / "film.avi")
    with ExitStack() as stack:
        broker = stack.enter_context(Broker(folder / "broker", tls=True))
        files = stack.enter_context(file_server())
        for release in releases:
            files.publish(release, reference(release))
        pipelines: dict[str, Any] = {"chat": {"slot": "tongue", "task": "generate", "source": {"type": "mqtt"}}}
        if camera:
            source = {"type": "camera", "device": folder / "film.avi", "loop": True}
            pipelines["gate"] = {"slot": "eye", "source": source}
        plan = tables(folder, "dev1", broker, releases[0], host={"url": files.url}, pipelines=pipelines,
                      slots={"eye": {"probation_s": 5.0}, "tongue": {"seed": talker}})  # fmt: skip
        bus = Bus(broker)
        stack.callback(bus.close)
        stack.enter_context(Device(folder, responder_tables(folder, "teacher", broker, folder / "big")))
        device = stack.enter_context(Device(folder, plan))
        bus.online("dev1")
        load = Load(bus, "dev1", device.inbox, random.Random(7))
        rig = Rig(broker, bus, device, releases, plan, load, time.monotonic(), minutes * 60)
        rig.run(say)
        rig.settle()
        out, failures = account(rig)
        found = trends(rig.readings, rig.seconds)
        failures += [
            f"{name} rises by {t.rise:.1f}, {t.allowed:g} is allowed" for name, t in found.items() if not t.flat
        ]
        status = device.status()
        assert status is not None
        result = {
            "passed": not failures, "failures": failures, "minutes": minutes, "camera": camera,
            "machine": f"{platform.machine()} with {os.cpu_count()} cores, Python {platform.python_version()}",
            "trends": {name: {**asdict(t), "flat": t.flat} for name, t in found.items()},
            "put_in": dict(sorted(load.put_in.items())), "came_out": out,
            "disturbed": dict(sorted(Counter(what.partition(" to ")[0] for _, what in rig.events).items())),
            "counters": {name: count for name, count in status["counters"].items() if count},
        }  # fmt: skip
        (folder / "dev1.log").rename(ROOT / "build" / "soak.log")
        return result, rig


def main() -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the report")
    parser.add_argument("--report", type=Path, default=DOCS / "soak.md", help="where the report is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=".soak-", dir=ROOT / "build") as scratch:
        result, rig = soak(options.minutes, Path(scratch), to_stderr)
    picture = options.report.with_suffix(".svg")
    plot(picture, rig.readings, rig.events)
    options.report.write_text(markdown(result, picture.name))
    print(json.dumps(result, indent=2) if options.json else options.report.read_text())
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
