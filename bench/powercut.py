"""Cut the power of a virtual machine with the daemon inside, again and again: everything must be there, once.

    make powercut [ARGS="--cuts 3 --seed 7 --json"]

The machine is QEMU's, emulated (no KVM is needed), and a cut is its SIGKILL. Around it, on this machine: the broker,
the trainer's server behind a slow line, a second device that answers what is escalated, a client that asks. After each
boot, before the daemon starts, the guest says what lies on its disk, and that is compared with all that was heard until
the cut. Exit status 0 when nothing was lost, doubled, damaged or moved back; 1 when something was; 2 where this machine
cannot do it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.crash import NEW_SHARE, Fleet
from bench.measure import Say, to_stderr
from bench.powercut_findings import AT_REST, UNDER_WAY, Known, as_text, blamed, missing, phase_of, phases, unfinished
from bench.powercut_image import HOST, NAME, CannotCut, Image, file_system, image
from bench.powercut_machine import Machine, MachineFailed
from bench.powercut_report import markdown
from bench.soak_load import Load
from edged.files import sha256_of
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import Event, Result, SampleEntry
from tests.support.device import Bus, Device, merged, responder_tables, tables, toml
from tests.support.models import PLAIN, STRANGE, make_release, picture
from tests.support.slow_link import slow_link
from tests.system.broker import Broker
from trainer.releases import Registry
from trainer.server import Server, ServerOptions

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "powercut.md"
DEVICE = "dev1"
HURT = "complaints about the file system"
CUTS = 20
STOCK, STRANGE_SHARE = 300, 0.3
RUN_DISK_BYTES = 64 << 20
LINE_BYTES_S = 128 << 10  # to the trainer
PADDING_BYTES = 1 << 20  # what only one release has: a download takes about eight seconds
LOAD_EVERY_S = {"image": 2.0, "nonsense": 10.0}
BOOT_S_MAX, SERVE_S_MAX, SETTLE_S_MAX = 300.0, 300.0, 600.0
PHASE_S_MAX = 60.0  # for the phase to come; then the cut comes anyway
# How long after its begin each phase is cut at the latest: everything is some twenty times as slow as on real hardware.
PHASE_S = {"downloading": 6.0, "proving": 4.0, "switched": 4.0, "escalation": 1.0, "start": 12.0, "any": 8.0}
POLL_S = 0.05
START = """\
stty -F /dev/ttyS1 raw -echo
boot=$(sed 's/.*edged.boot=\\([0-9]*\\).*/\\1/' /proc/cmdline)
/usr/lib/edged/bin/python /mnt/powercut_guest.py /mnt/stock "$boot" <>/dev/ttyS1 >&0 2>/dev/console
"""


@dataclass(slots=True)
class Site:
    """What stands around the machine, and what is known of it."""

    folder: Path
    image: Image
    bus: Bus
    load: Load
    fleet: Fleet
    chance: random.Random
    known: Known
    phases: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, list[str]] = field(default_factory=dict)
    boots: list[dict[str, Any]] = field(default_factory=list)
    rev: int = 0
    _heard: int = 0

    def note(self, wrong: dict[str, list[str]]) -> None:
        """Remember what must not be; the same name of the same kind once."""
        for what, names in wrong.items():
            if names:
                self.wrong[what] = sorted({*self.wrong.get(what, []), *names})

    def hear(self) -> None:
        """Take in what the device has said since."""
        heard = self.bus.heard
        for _, fields, message in heard[self._heard : len(heard)]:
            self._heard += 1
            if fields.get("dev") != DEVICE:
                continue
            if isinstance(message, Result) and message.pipeline == "line":
                self.known.result(message.item, message.id, message.sample)
            elif isinstance(message, SampleEntry):
                self.known.sample(message.sample, message.state)
            elif isinstance(message, Event) and blamed(message.kind, message.text):
                self.note({"good releases that were blamed": [message.text]})

    def want(self) -> ReleaseRef:
        """Another release is desired."""
        self.rev += 1
        ref = self.fleet.next()
        self.bus.desire(DEVICE, self.rev, {"eye": ref})
        return ref

    def boot(self, number: int) -> Machine:
        """Switch the machine on and look at what lies on its disk before the daemon starts."""
        machine = Machine(self.folder, number, self.image, self.folder / "disk.raw", self.folder / "run.raw")
        try:
            found = machine.wait("what lies on the disk", lambda: machine.reported("found"), BOOT_S_MAX)[0]
        except BaseException:
            machine.cut()
            raise
        self.look(found)
        return machine

    def look(self, found: dict[str, Any]) -> None:
        """Compare what is there with what was heard; what is there is known from now on."""
        self.hear()
        self.note(missing(self.known, found))
        for id, _, state, _ in found.get("samples", []):
            self.known.sample(id, state)
        for place in ("waiting", "done"):
            self.known.put.update(found.get(place, []))

    def step(self, machine: Machine) -> dict[str, Any]:
        """Let time pass: pictures go in by the guest, requests from here. Where the device is now."""
        machine.read()
        self.hear()
        if ended := machine.reported("ended"):
            raise MachineFailed(f"the daemon ended by itself: status {ended[-1]}\n{machine.end()}")
        at: dict[str, Any] = (machine.reported("at") or [{}])[-1]
        now = time.monotonic()
        if at.get("active"):
            self.load.tick(now)
        time.sleep(POLL_S)
        return at

    def serves(self, machine: Machine) -> None:
        """Wait until a request of this boot is answered by its model."""
        before = set(self.load.requests)

        def answered() -> bool:
            self.step(machine)
            new = self.load.requests.keys() - before
            return any("" in self.load.replies.get(id, {}).values() for id in new)

        machine.wait("a request is answered", answered, SERVE_S_MAX)

    def cut(self, machine: Machine, wanted: str) -> str:
        """Wait for this phase and cut the power at a random instant of it; the phase that it was cut in."""
        at = self.step(machine)
        if wanted != "start":
            self.serves(machine)
            at = self.step(machine)
            desired = wanted not in UNDER_WAY
            deadline = time.monotonic() + PHASE_S_MAX
            while wanted not in phases(at) and time.monotonic() < deadline:
                if not desired and phases(at) & AT_REST:
                    self.want()
                    desired = True
                at = self.step(machine)
        until = time.monotonic() + self.chance.uniform(0.0, PHASE_S[wanted])
        while time.monotonic() < until:
            self.step(machine)
        machine.cut()
        self.known.put.update(machine.reported("put"))
        return phase_of((machine.reported("at") or [{}])[-1], wanted)

    def storm(self, cuts: int, say: Say) -> None:
        """All cuts."""
        wanted = [list(PHASE_S)[number % len(PHASE_S)] for number in range(cuts)]
        self.chance.shuffle(wanted)
        for number in range(1, cuts + 1):
            began = time.monotonic()
            machine = self.boot(number)
            try:
                if self.chance.random() < NEW_SHARE:
                    self.want()
                phase = self.cut(machine, wanted[number - 1])
            finally:
                machine.cut()
                self.note({HURT: machine.hurt()})
            self.phases[phase] += 1
            seconds = round(time.monotonic() - began)
            self.boots.append({"phase": phase, "put": len(machine.reported("put")), "seconds": seconds})
            say(f"{number}/{cuts} cuts, in {phase} ({wanted[number - 1]} was wanted): {len(self.known.put)} pictures, "
                f"{len(self.known.samples)} samples, {len(self.load.requests)} requests, {seconds} s; "
                + ("; ".join(as_text(self.wrong)) or "nothing is wrong"))  # fmt: skip

    def end(self, number: int, say: Say) -> dict[str, Any]:
        """Boot once more, let everything come out, update a last time, stop in order, and look; what came out."""
        machine = self.boot(number)
        try:
            self.serves(machine)
            last = self.want()
            machine.wait("the last release is committed", lambda: self._committed(machine, last), SETTLE_S_MAX)
            machine.tell("enough")
            self.load.every_s = {}
            machine.wait("everything has come out", lambda: self._quiet(machine), SETTLE_S_MAX)
            machine.stop()
        finally:
            machine.cut()
            self.note({HURT: machine.hurt()})
        found = machine.reported("found")[-1]
        self.known.put.update(machine.reported("put"))
        self.look(found)
        self.note(unfinished(self.known, found))
        replies = self.load.replies
        twice = [id for id, errors in replies.items() if list(errors.values()).count("") > 1]
        ends = [status for status in machine.reported("stopped") if status]
        self.note({"requests with two answers": twice, "ends that were not in order": [f"status {s}" for s in ends]})
        command = ["e2fsck", "-f", "-n", str(self.folder / "disk.raw")]
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        if checked.returncode:
            self.note({HURT: [f"e2fsck: {checked.stdout[-1000:]}"]})
        say("; ".join(as_text(self.wrong)) or "nothing lost, doubled, damaged or moved back")
        if "broken" in found:
            return {}
        return {"pictures done": len(found["done"]), "results heard": len(self.known.items),
                "samples": len(found["samples"]), "samples labelled": sum(r[2] == "labelled" for r in found["samples"]),
                "requests answered": len(replies.keys() & self.load.requests.keys()),
                "active in the end": found["updates"]["eye"][1]}  # fmt: skip

    def _committed(self, machine: Machine, last: ReleaseRef) -> bool:
        at = self.step(machine)
        return at.get("active") == last.release and at.get("update") == "committed"

    def _quiet(self, machine: Machine) -> bool:
        at = self.step(machine)
        put = self.known.put | set(machine.reported("put"))
        return bool(at) and not (at["asking"] or at["outbox"] or self.load.open or put - self.known.items.keys())


def stock(folder: Path, chance: random.Random) -> dict[str, str]:
    """Pictures for the guest, one in three of which it must ask about; name -> hash of the bytes."""
    folder.mkdir()
    for number in range(STOCK):
        strange = chance.random() < STRANGE_SHARE
        name = f"{number:03d}{'-strange' if strange else '-plain'}.png"
        (folder / name).write_bytes(picture(STRANGE if strange else PLAIN, number))
    return {path.name: sha256_of(path) for path in folder.iterdir()}


def run_disk(folder: Path, broker: Broker, port: int, known: Known, chance: random.Random) -> None:
    """The second disk, read-only: all that the guest needs of this run. Its keys guard a broker on loopback alone."""
    inside, mounted = folder / "run", Path("/mnt")
    (inside / "tls").mkdir(parents=True)
    known.sha256 = stock(inside / "stock", chance)
    shutil.copytree(folder / "toy-0", inside / "toy-0")
    shutil.copyfile(Path(__file__).with_name("powercut_guest.py"), inside / "powercut_guest.py")
    (inside / "start").write_text(START)
    plan = tables(folder, DEVICE, broker, mounted / "toy-0", host={"url": f"http://{HOST}:{port}"},
                  slots={"eye": {"probation_s": 5.0, "prove_s_max": 600.0}})  # fmt: skip
    for name in ("ca", "certificate", "key"):
        shutil.copyfile(plan["broker"][name], inside / "tls" / name)
        plan["broker"][name] = mounted / "tls" / name
    plan = merged(plan, {
        "device": {"state_dir": "/var/lib/edged"}, "broker": {"host": NAME},
        "pipelines": {"line": {"source": {"path": "/var/spool/edged/line"}}},
    })  # fmt: skip
    (inside / "edged.toml").write_text(toml(plan))
    for path in inside.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    file_system(inside, folder / "run.raw", RUN_DISK_BYTES)


def powercut(cuts: int, seed: int, folder: Path, say: Say) -> dict[str, Any]:
    """The whole run. Raises CannotCut where this machine cannot do it."""
    say("the image: Debian, its kernel, the package")
    base = image(folder)
    subprocess.run(["cp", "--sparse=always", base.disk, folder / "disk.raw"], check=True)
    chance = random.Random(seed)
    for number in range(2):
        make_release(folder / f"toy-{number}", f"toy@1.{number}", number)
    make_release(folder / "big", "big@1.0", 2)
    with ExitStack() as stack:
        broker = stack.enter_context(Broker(folder / "broker", tls=True))
        registry = Registry(folder / "registry")
        server = Server(ServerOptions("127.0.0.1", 0, 1 << 20), registry, folder / "samples",
                        claimed=lambda _: False, status=dict, arrived=lambda _: None)  # fmt: skip
        server.start()
        stack.callback(server.stop)
        line = stack.enter_context(slow_link(server.port, LINE_BYTES_S))
        known = Known()
        run_disk(folder, broker, line.port, known, chance)
        bus = Bus(broker)
        stack.callback(bus.close)
        stack.enter_context(Device(folder, responder_tables(folder, "teacher", broker, folder / "big")))
        fleet = Fleet(folder, registry, random.Random(seed), PADDING_BYTES)
        load = Load(bus, DEVICE, folder, random.Random(seed), LOAD_EVERY_S)
        site = Site(folder, base, bus, load, fleet, chance, known)
        out: dict[str, Any] = {}
        try:
            site.storm(cuts, say)
            out = site.end(cuts + 1, say)
        except MachineFailed as error:
            site.note({"boots that failed": [str(error).partition("\n")[0]]})
            say(str(error))
        return {
            "passed": not site.wrong, "failures": as_text(site.wrong), "cuts": sum(site.phases.values()), "seed": seed,
            "machine": f"{platform.machine()} with {os.cpu_count()} cores", "qemu": qemu_version(),
            "by_phase": dict(sorted(site.phases.items())), "boots": site.boots,
            "put_in": {"pictures": len(known.put), **load.put_in, "releases": fleet.made}, "came_out": out,
        }  # fmt: skip


def qemu_version() -> str:
    """Of this machine's QEMU, without Debian's revision."""
    said = subprocess.check_output(["qemu-system-x86_64", "--version"], text=True)
    return said.split("version ")[1].split()[0]


def main() -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.powercut", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", type=int, default=CUTS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the report")
    parser.add_argument("--report", type=Path, default=REPORT, help="where the report is written")
    options = parser.parse_args()
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".powercut-", dir=ROOT / "build") as scratch:
        try:
            result = powercut(options.cuts, options.seed, Path(scratch), to_stderr)
        except CannotCut as error:
            print(f"powercut: not run: {error}", file=sys.stderr)
            return 2
        if not result["passed"]:  # what the consoles said
            kept = ROOT / "build" / "powercut-failed"
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            for path in Path(scratch).glob("*-??.log"):
                shutil.copy(path, kept)
    options.report.write_text(markdown(result))
    print(json.dumps(result, indent=2) if options.json else options.report.read_text())
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
