"""SIGKILL a working device at random instants, and its broker too: afterwards everything must be there, once.

    make crash [ARGS="--kills 20 --seed 7 --only kills --json"]

Three parts: kills during downloads, proofs, swaps, escalations and starts; kills on a file system that is full (tmpfs, as
root); kills while the clock jumps both ways. Exit status 0 when nothing was lost, doubled or damaged, and the
device serves and can still be updated.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.crash_disturb import CannotDisturb, Clock, Disk
from bench.crash_findings import findings
from bench.measure import Say, to_stderr
from bench.soak import Rig, came_out
from bench.soak_load import Load
from edged.status_socket import ask_status
from edged.wire.manifest import ReleaseRef
from tests.support.device import Bus, Device, responder_tables, tables
from tests.support.models import copy_release, make_release
from tests.support.slow_link import SlowLink, slow_link
from tests.system.broker import Broker
from trainer.releases import Registry, build_manifest
from trainer.server import Server, ServerOptions

ROOT = Path(__file__).parents[1]
KILLS = {"kills": 200, "full": 20, "clock": 20}
BROKER_EVERY = 9  # kills of the device to one of the broker
LINE_BYTES_S = 384 << 10  # to the trainer
PADDING_BYTES = 192 << 10  # what only this release has: a download takes about half a second
START_S = 1.5  # a kill at a start comes within this
PHASE_S_MAX = 6.0  # for the phase to come; then the kill comes anyway
PHASE_S = {
    "downloading": 0.5,
    "proving": 0.6,
    "staged": 0.05,
    "switched": 0.4,
    "escalation": 0.3,
    "start": START_S,
    "any": 3.0,
}
POLL_S = 0.01
NEW_SHARE = 0.7  # of the kills after which another release is desired


@dataclass(slots=True)
class Fleet:
    """The trainer's side: releases without end, and the slow line to them."""

    folder: Path
    registry: Registry
    chance: random.Random
    padding_bytes: int = PADDING_BYTES
    made: int = 0

    def next(self) -> ReleaseRef:
        """A release that nobody has seen; every other one finds dogs."""
        self.made += 1
        source = self.folder / f"toy-{self.made % 2}"
        folder = self.folder / f"made-{self.made}"
        copy_release(source, folder, {"release": f"toy@2.{self.made}"})
        (folder / "padding.bin").write_bytes(self.chance.randbytes(self.padding_bytes))
        fields = json.loads((folder / "release.json").read_bytes())
        roles = {role: entry["path"] for role, entry in fields["files"].items()} | {"padding": "padding.bin"}
        files = build_manifest(folder, fields["release"], kind="detect", engine="onnx_detect", roles=roles).files
        ref = copy_release(folder, self.folder / f"whole-{self.made}", {
            "files": {role: entry.model_dump(mode="json") for role, entry in files.items()}})  # fmt: skip
        self.registry.register(self.folder / f"whole-{self.made}")
        return ref


@dataclass(slots=True)
class Storm:
    """One part of the run: `kills` kills of the device in `rig`."""

    rig: Rig
    fleet: Fleet
    chance: random.Random
    phases: Counter[str] = field(default_factory=Counter)  # in which the device was killed
    brokers: int = 0
    rev: int = 0
    desired: ReleaseRef | None = None
    disturb: Callable[[], None] = lambda: None  # before each kill: the disk, the clock

    def run(self, kills: int, say: Say) -> None:
        """All of them; the device runs in the end."""
        for number in range(1, kills + 1):
            self.want()
            self.kill(self.chance.choice(list(PHASE_S)))
            if number % BROKER_EVERY == 0:
                self.kill_broker()
            if number % 20 == 0 or number == kills:
                say(f"{number}/{kills} kills: {dict(self.phases)}, {self.brokers} of the broker, "
                    f"{len(self.rig.load.files)} files, {len(self.rig.load.requests)} requests")  # fmt: skip
        self.rig.device.start()

    def want(self) -> None:
        """Another release is desired, unless one is under way."""
        if self.chance.random() < NEW_SHARE or self.desired is None:
            self.rev += 1
            self.desired = self.fleet.next()
        self.rig.bus.desire(self.rig.device.name, self.rev, {"eye": self.desired})

    def kill(self, phase: str) -> None:
        """Start the device and end it `phase`, at a random instant of it."""
        device = self.rig.device
        device.spawn()
        if phase != "start":
            deadline = time.monotonic() + PHASE_S_MAX
            while time.monotonic() < deadline and phase not in self.where():
                self.rig.load.tick(time.monotonic())
                time.sleep(POLL_S)
        self.disturb()
        until = time.monotonic() + self.chance.uniform(0.0, PHASE_S[phase])
        while time.monotonic() < until:
            self.rig.load.tick(time.monotonic())
            time.sleep(POLL_S)
        now = self.where()
        self.phases[phase if phase in now else min(now - {"any"}, default="any")] += 1
        assert device.process is not None
        if device.process.poll() is None:
            device.kill9()
        else:
            raise AssertionError(
                f"{device.name} ended by itself: status {device.process.returncode}\n{device.log()[-3000:]}"
            )

    def where(self) -> set[str]:
        """The phases that the device is in."""
        status = ask_status(self.rig.device.state_dir)
        if status is None:
            return {"start"}
        found = {"any", status["models"].get("eye", {}).get("update", "idle")}
        if status["samples"].get("escalated"):
            found.add("escalation")
        return found

    def kill_broker(self) -> None:
        """It loses what it held in memory; the fleet's desired state is said again, as the trainer does."""
        self.brokers += 1
        rig = self.rig
        rig.deaf.append((time.time() - 5.0, time.time() + 5.0))
        rig.broker.kill9()
        rig.broker.start()
        deadline = time.monotonic() + 20
        while not rig.bus.link.connected and time.monotonic() < deadline:
            time.sleep(POLL_S)
        rig.deaf[-1] = (rig.deaf[-1][0], time.time() + 5.0)


def storm(part: str, kills: int, seed: int, folder: Path, say: Say) -> dict[str, Any]:
    """One part of the run and what it found. Raises CannotDisturb where this machine cannot do it."""
    chance = random.Random(f"{part} {seed}")
    for number in range(2):
        make_release(folder / f"toy-{number}", f"toy@1.{number}", number)
    make_release(folder / "big", "big@1.0", 2)
    with ExitStack() as stack:
        disk = stack.enter_context(Disk(folder / "dev1")) if part == "full" else None
        clock = Clock(folder / "clock", chance) if part == "clock" else None
        broker = stack.enter_context(Broker(folder / "broker", tls=True))
        registry = Registry(folder / "registry")
        server = Server(ServerOptions("127.0.0.1", 0, 1 << 20), registry, folder / "samples",
                        claimed=lambda _: False, status=dict, arrived=lambda _: None)  # fmt: skip
        server.start()
        stack.callback(server.stop)
        line: SlowLink = stack.enter_context(slow_link(server.port, LINE_BYTES_S))
        plan = tables(folder, "dev1", broker, folder / "toy-0", host={"url": f"http://127.0.0.1:{line.port}"},
                      slots={"eye": {"probation_s": 1.0}}, store={"free_bytes_min": 0 if disk else 128 << 20})  # fmt: skip
        bus = Bus(broker)
        stack.callback(bus.close)
        stack.enter_context(Device(folder, responder_tables(folder, "teacher", broker, folder / "big")))
        device = Device(folder, plan, env=clock.env if clock else {})
        stack.callback(device.__exit__, None, None, None)
        load = Load(bus, "dev1", device.inbox, random.Random(seed))
        rig = Rig(broker, bus, device, [], plan, load, time.monotonic(), 0.0)
        storming = Storm(rig, Fleet(folder, registry, random.Random(seed)), chance)
        if disk is not None:
            storming.disturb = lambda: disk.fill(chance)
        if clock is not None:
            storming.disturb = clock.jump
        storming.run(kills, say)
        if disk is not None:
            disk.free()
        if clock is not None:
            clock.right()
        return (
            _end(part, kills, storming, say)
            | ({"full": disk.filled} if disk else {})
            | ({"jumps": clock.jumps} if clock else {})
        )


def _end(part: str, kills: int, storming: Storm, say: Say) -> dict[str, Any]:
    """Let everything come out, update once more, and look."""
    rig = storming.rig
    last = storming.fleet.next()
    rig.bus.desire(rig.device.name, storming.rev + 1, {"eye": last})
    rig.device.wait("the last release is committed", lambda s: s["models"]["eye"]["active"] == last.release
                    and s["models"]["eye"]["update"] == "committed", 120.0)  # fmt: skip
    rig.settle()
    out, wrong = came_out(rig)
    status = rig.device.status()
    assert status is not None
    counters = {name: count for name, count in status["counters"].items() if count}
    rig.device.stop()
    wrong |= findings(rig.device.state_dir, rig.device.inbox, rig.device.log())
    failures = [f"{name}: {count}" for name, count in wrong.items() if count]
    say(f"{part}: " + ("; ".join(failures) if failures else "nothing lost, doubled or damaged"))
    return {
        "kills": kills, "by_phase": dict(sorted(storming.phases.items())), "broker_kills": storming.brokers,
        "put_in": dict(sorted(rig.load.put_in.items())), "came_out": out, "releases": storming.fleet.made,
        "counters": counters, "failures": failures,
    }  # fmt: skip


def run(parts: dict[str, int], seed: int, say: Say) -> dict[str, Any]:
    """Every part, with as many kills; a part that this machine cannot do says why."""
    found: dict[str, Any] = {}
    for part, kills in parts.items():
        (ROOT / "build").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".crash-", dir=ROOT / "build") as scratch:
            try:
                found[part] = storm(part, kills, seed, Path(scratch), say)
            except CannotDisturb as error:
                found[part] = {"not_run": str(error), "failures": []}
                say(f"{part}: not run: {error}")
    return {
        "passed": not any(part["failures"] for part in found.values()), "seed": seed,
        "machine": f"{platform.machine()}, Python {platform.python_version()}", "parts": found,
    }  # fmt: skip


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The result for people."""
    for name, part in result["parts"].items():
        if "not_run" in part:
            yield f"{name}: not run: {part['not_run']}"
            continue
        more = ", ".join(
            f"{part[key]} {key.replace('_', ' ')}" for key in ("disk_filled", "clock_jumps") if key in part
        )
        yield (f"{name}: {part['kills']} kills of the device, {part['broker_kills']} of the broker, "
               f"{part['releases']} releases" + (f", {more}" if more else ""))  # fmt: skip
        yield "  killed during: " + ", ".join(f"{phase} {count}" for phase, count in part["by_phase"].items())
        yield "  put in: " + ", ".join(f"{count} {what}" for what, count in part["put_in"].items())
        yield "  came out: " + ", ".join(f"{count} {what}" for what, count in part["came_out"].items())
        yield "  " + (
            "FAILED: " + "; ".join(part["failures"]) if part["failures"] else "nothing lost, doubled or damaged"
        )
    yield f"{'passed' if result['passed'] else 'FAILED'} (seed {result['seed']}, {result['machine']})"


def main() -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.crash", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, help="of each part; default: " + ", ".join(f"{k} {v}" for k, v in KILLS.items())
    )
    parser.add_argument("--only", choices=list(KILLS), help="one part alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    parts = {name: options.kills or kills for name, kills in KILLS.items() if options.only in (None, name)}
    result = run(parts, options.seed, to_stderr)
    print(json.dumps(result, indent=2) if options.json else "\n".join(lines(result)))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
