"""Simulated devices that speak the real messages, without a process or a thread of their own.

Each differs from its neighbours by nature, in accuracy and in how much it asks; goes away now and then and comes back with
its next birth; does what its desired state says after a time that a download takes; and sometimes goes back by itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from edged.wire import messages, topics
from edged.wire.ids import uuid7
from edged.wire.messages import Box, Provenance
from trainer.simulate.virtual_world import VirtualWorld

SITE, SLOT, PIPELINE, CLASS = "virtual", "part", "line", "part"
BIRTHS_S = 600.0  # in which all devices connect for the first time
WHOLE = (0.0, 0.0, 1.0, 1.0)
DIGEST = "0" * 64
PERSON = Provenance(kind="person", who="inspector")
_DEVICE = re.compile(r"edged/v1/[^/]+/([^/]+)/down/")


@dataclass(frozen=True, slots=True)
class Habits:
    """How devices are. Shares are of 1, times in seconds."""

    window_s: float = 1800.0  # of metrics; a real device closes one a minute, in which the same items are
    items: int = 100  # a window
    audit_share: float = 0.0005  # of accepted answers, where desired state says nothing else
    accuracy: float = 0.9
    spread: float = 0.05  # standard deviation between devices
    escalated: float = 0.1
    away_share: float = 0.02  # of the time
    away_s: float = 1800.0  # about, each time
    fetch_s: float = 90.0  # about, of a release
    reverts: float = 0.0005  # of updates to a release that is not bad
    loss: float = 0.1  # of accuracy, with a bad release
    absent: int = 1  # devices that go away before the first rollout and come back after the last one


@dataclass(slots=True)
class VirtualDevice:
    """One of them."""

    name: str
    number: int
    accuracy: float
    escalated: float
    active: str
    online: bool = False
    boot: str = ""
    seq: int = 0
    rev: int = 0
    update: str = "idle"
    reason: str = ""
    audit_share: float | None = None  # as desired
    waiting: bytes | None = None  # its retained desired state, told while it was away
    since: float = 0.0  # when its open window began


@dataclass(slots=True)
class Counts:
    """What the devices did."""

    messages: int = 0
    births: int = 0
    away: int = 0
    windows: int = 0
    audits: int = 0
    updates: int = 0
    reverts: int = 0
    told: int = 0
    busy_max: int = 0  # most devices on their way at once
    had: dict[str, set[int]] = field(default_factory=dict)  # release -> devices that ever ran it


class VirtualFleet:
    """All of them; `said` takes what they publish."""

    def __init__(self, world: VirtualWorld, devices: int, release: str, habits: Habits, bad: frozenset[str]) -> None:
        self.world, self.habits, self.bad, self.counts = world, habits, bad, Counts()
        self.said: Callable[[topics.Address, bytes], None] = lambda _address, _payload: None
        self.busy: set[int] = set()
        self.absent: set[int] = set()  # numbers
        dice = world.dice
        self.devices = [
            VirtualDevice(
                f"sim-{number:06d}",
                number,
                min(1.0, max(0.0, dice.gauss(habits.accuracy, habits.spread))),
                min(1.0, max(0.0, dice.gauss(habits.escalated, habits.spread))),
                release,
            )
            for number in range(1, devices + 1)
        ]
        self.by_name = {device.name: device for device in self.devices}
        for device in self.devices:
            world.after(dice.uniform(0, BIRTHS_S), self._comes, device)

    def told(self, topic: str, payload: bytes) -> None:
        """The trainer published."""
        match = _DEVICE.match(topic)
        device = self.by_name.get(match[1]) if match else None
        if device is None:
            return
        if topic.endswith("/down/desired"):
            device.waiting = payload
            if device.online:
                self.world.after(self.world.dice.uniform(0.01, 0.5), self._hears, device)
        elif device.online:  # it has no samples to list, and says so
            _, fields, command = messages.decode(topic, payload)
            state = messages.CommandState(**self._stamp(device), command=command.id, state="done")
            self._say(device, topics.COMMAND_STATE, state, type=fields["type"], id=fields["id"])

    def running(self, release: str) -> int:
        """How many run it."""
        return sum(device.active == release for device in self.devices)

    # A device's life.

    def _comes(self, device: VirtualDevice) -> None:
        if device.online or device.number in self.absent:
            return
        device.online, device.seq, self.counts.births = True, 0, self.counts.births + 1
        device.boot = self._id()
        state = messages.State(
            **self._stamp(device), state="online", device=device.name, profile="virtual", tier="edge"
        )
        self._say(device, topics.STATE, state)
        self._report(device)
        if device.since == 0.0:  # for the first time
            device.since = self.world.clock.now()
            self.world.after(self.world.dice.uniform(0, self.habits.window_s), self._window, device)
        else:
            device.since = self.world.clock.now()
        if device.waiting is not None:
            self._hears(device)
        self.world.after(self._present_s(), self._goes, device)

    def leave(self) -> None:
        """Those who are absent during all rollouts go away now."""
        count = min(self.habits.absent, len(self.devices) // 10)
        self.absent = {device.number for device in self.devices[len(self.devices) - count :]}
        for device in self.devices:
            if device.number in self.absent and device.online:
                self._goes(device)

    def come_back(self) -> None:
        """They are there again; no other goes or comes for that."""
        numbers, self.absent = self.absent, set()
        for device in self.devices:
            if device.number in numbers:
                self._comes(device)

    def _present_s(self) -> float:
        share = self.habits.away_share
        return self.world.dice.expovariate(share / (1 - share) / self.habits.away_s) if share > 0 else 1e12

    def _goes(self, device: VirtualDevice) -> None:
        """Its Will is published."""
        if not device.online:
            return
        state = messages.State(**self._stamp(device), state="offline", device=device.name)
        self._say(device, topics.STATE, state)
        device.online, self.counts.away = False, self.counts.away + 1
        self.world.after(self.world.dice.expovariate(1 / self.habits.away_s), self._comes, device)

    def _window(self, device: VirtualDevice) -> None:
        """A window ends; the next one begins."""
        now, dice, habits = self.world.clock.now(), self.world.dice, self.habits
        self.world.after(habits.window_s, self._window, device)
        start, device.since = device.since, now
        if not device.online or now - start < 1.0:
            return
        items = max(1, round(habits.items * (now - start) / habits.window_s))
        escalated = _hits(dice, items, device.escalated)
        share = habits.audit_share if device.audit_share is None else device.audit_share
        audited = _hits(dice, items - escalated, share)
        latency = 40.0 + 20.0 * (device.number % 7) + dice.uniform(0, 4)
        window = messages.Metrics(
            **self._stamp(device), start=start, end=now, pipeline=PIPELINE, release=device.active, items=items,
            accepted=items - escalated - audited, audited=audited, escalated=escalated, latency_ms_p50=latency * 0.6,
            latency_ms_p95=latency, confidence_histogram=[0, 0, 0, 0, 0, 0, 0, escalated, 0, items - escalated],
            machine=messages.Machine(memory_mib_max=200.0 + device.number % 50, temperature_c_max=45.0 + dice.uniform(0, 5)),
        )  # fmt: skip
        self.counts.windows += 1
        self._say(device, topics.METRICS, window)
        for _ in range(audited):
            self._audited(device, start, now, share)

    def _audited(self, device: VirtualDevice, start: float, end: float, share: float) -> None:
        right = self.world.dice.random() < device.accuracy - self.habits.loss * (device.active in self.bad)
        answer = Box(label=CLASS, box=WHOLE, score=0.9)
        truth = answer if right else Box(label="other", box=WHOLE)
        entry = messages.SampleEntry(
            **self._stamp(device), sample=self._id(), pipeline=PIPELINE, task="detect", model=SLOT, release=device.active,
            state="labelled", sha256=DIGEST, bytes=20_000, prediction=[answer], confidence=0.9, decision="audit",
            inclusion_probability=share, label=[truth], label_confidence=1.0, provenance=PERSON,
            captured=self.world.dice.uniform(start, end),
        )  # fmt: skip
        self.counts.audits += 1
        self._say(device, topics.SAMPLE, entry)

    # Its updates.

    def _hears(self, device: VirtualDevice) -> None:
        payload, device.waiting = device.waiting, None
        if payload is None or not device.online:
            device.waiting = payload
            return
        told = messages.Desired.model_validate_json(payload)
        if told.rev <= device.rev:
            return
        device.rev, self.counts.told = told.rev, self.counts.told + 1
        device.audit_share = told.policy.get(PIPELINE, {}).get("audit_share")
        wanted = told.models.get(SLOT)
        if wanted is None or wanted.release == device.active:
            self._report(device)
            return
        self.busy.add(device.number)
        self.counts.busy_max = max(self.counts.busy_max, len(self.busy))
        self._report(device, "downloading")
        seconds = self.habits.fetch_s * self.world.dice.lognormvariate(0.0, 0.5)
        self.world.after(seconds, self._installed, device, told.rev, wanted.release)

    def _installed(self, device: VirtualDevice, rev: int, release: str) -> None:
        """The release is here; what comes of it is reported, by a device that is away with its next birth."""
        if device.rev != rev:
            return  # it has been told something else meanwhile
        before = device.active
        reverts = self.world.dice.random() < self.habits.reverts and device.number not in self.counts.had.get(
            release, ()
        )
        self.counts.updates += 1
        self.busy.discard(device.number)
        if reverts:
            self.counts.reverts += 1
            self._report(device, "reverted", f"{release}: golden items differ; back on {before}")
            return
        self.counts.had.setdefault(release, set()).add(device.number)
        device.active, device.since = release, self.world.clock.now()  # its window is of one release
        self._report(device, "committed")

    # What it says.

    def _report(self, device: VirtualDevice, update: str = "", reason: str = "") -> None:
        if update:
            device.update, device.reason = update, reason
        if not device.online:
            return
        report = messages.ModelReport(active=device.active, update=device.update, reason=device.reason)
        said = messages.Reported(**self._stamp(device), desired_rev=device.rev, models={SLOT: report})
        self._say(device, topics.REPORTED, said)

    def _say(self, device: VirtualDevice, route: topics.Route, message: messages.Message, **fields: str) -> None:
        self.counts.messages += 1
        self.said(route(site=SITE, dev=device.name, **fields), messages.encode(message))

    def _stamp(self, device: VirtualDevice) -> dict[str, Any]:
        device.seq += 1
        return {"id": self._id(), "ts": self.world.clock.now(), "boot": device.boot or "never", "seq": device.seq}

    def _id(self) -> str:
        return uuid7(int(self.world.clock.now() * 1000), self.world.dice.randbytes(10))


def _hits(dice: Random, items: int, share: float) -> int:
    """How many of the items hit: binomial, by skipping from one hit to the next (Devroye 1986, chapter X.4)."""
    if share <= 0.0 or share >= 1.0:
        return items if share >= 1.0 else 0
    hits, at, scale = 0, 0, math.log1p(-share)
    while True:
        at += int(math.log(1.0 - dice.random()) / scale) + 1
        if at > items:
            return hits
        hits += 1
