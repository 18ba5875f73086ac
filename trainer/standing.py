"""How far each device of a rollout is, kept from look to look: only devices that said or were told something are read again.

Law of this file: what stands here is what the database would say again. It is thrown away whenever a transaction fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, select

from trainer.core.presence import Lately
from trainer.core.rollout import ENDED, Outcome, Rollout
from trainer.database import desired, parts
from trainer.fleet import Member, gone, members, outcome, revoked
from trainer.presence import silent

DEVICES_A_SECOND = 10_000  # a fleet is looked at as often as this allows: 100 000 devices every 10 s
TICK_S = 0.5  # between two looks of the coordinator: nobody is looked at more often anyway
LISTEN_S = 30.0  # between two looks for devices that have fallen silent, which take hours to
AFTER = 10  # times as long between looks when it is over, and only who was away is waited for


@dataclass(slots=True)
class Standing:
    """One rollout. `row`: as it is stored, without its state; `told_to`: the release that a device should be running."""

    row: Any
    rollout: Rollout
    told_to: Callable[[Any, Rollout, Member], str | None]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    failing: dict[str, float] = field(default_factory=dict)  # device -> when its failure was first seen
    stale: set[str] | None = None  # devices to read again; None: all
    looked: float | None = None  # when
    out: frozenset[str] = frozenset()  # who is revoked: the command line says so to nobody
    silent: frozenset[str] = frozenset()  # of whom nothing was heard for too long: silence says so to nobody either
    listened: float | None = None  # when `silent` was read

    def due(self, now: float) -> bool:
        """Whether it is time for the next look."""
        pause = len(self.rollout.devices) / DEVICES_A_SECOND * (AFTER if self.rollout.phase in ENDED else 1)
        return self.looked is None or pause < TICK_S or not 0 <= now - self.looked < pause

    def heard(self, names: Iterable[str]) -> None:
        """These devices said something, or were told something."""
        if self.stale is not None:
            self.stale.update(names)

    def becomes(self, rollout: Rollout) -> None:
        """The rollout has taken a step: with another phase every device may be meant to run something else."""
        if self.rollout.phase is not rollout.phase or len(self.rollout.devices) != len(rollout.devices):
            self.stale = None
        elif self.stale is not None and len(rollout.told) != len(self.rollout.told):
            self.stale.update(rollout.told.keys() - self.rollout.told.keys())
        self.rollout = rollout

    def refresh(self, connection: Connection, now: float, grace_s: float, lately: Lately) -> None:
        """Read what may have changed. A failure counts when it lasts `grace_s`: a device tries again by itself after a fetch
        that broke off. `lately`: whose sign of life still counts."""
        self.looked, rollout = now, self.rollout
        out = revoked(connection)
        self.heard(out ^ self.out)
        self.out = out
        if self.listened is None or not 0 <= now - self.listened < LISTEN_S:
            quiet = silent(connection, lately)
            self.heard(quiet ^ self.silent)
            self.silent, self.listened = quiet, now
        if self.stale is None:
            names: Iterable[str] = rollout.devices
            found = members(connection, self.row.model, part=rollout.part, heard=lately)
        else:
            names = [name for name in sorted(self.stale | self.failing.keys()) if name in self.outcomes]
            found = members(connection, self.row.model, part=rollout.part, names=names, heard=lately)
        known = {member.device: member for member in found}
        lost = gone(connection, [name for name in names if name not in known])
        revs = _revs(connection, None if self.stale is None else list(names))
        for device in names:
            member = known.get(device)
            if member is not None:
                self.reasons[device] = member.reason
            if device in lost:
                self.outcomes[device] = Outcome.GONE
                self.failing.pop(device, None)
                continue
            if member is None or (device not in rollout.told and not member.online):
                self.outcomes[device] = Outcome.OFFLINE
                self.failing.pop(device, None)
                continue
            seen = outcome(member, self.told_to(self.row, rollout, member), revs.get(device, 0))
            self.outcomes[device] = self._lasting(member, seen, now, grace_s)
        self.stale = set()

    def _lasting(self, member: Member, seen: Outcome, now: float, grace_s: float) -> Outcome:
        if seen is not Outcome.FAILED:
            self.failing.pop(member.device, None)
            return seen
        since = self.failing.setdefault(member.device, now)
        return seen if member.update == "reverted" or now - since >= grace_s else Outcome.ON_THE_WAY


def _revs(connection: Connection, names: list[str] | None) -> dict[str, int]:
    query = select(desired.c.device, desired.c.rev)
    if names is None:
        return {row.device: row.rev for row in connection.execute(query)}
    found: dict[str, int] = {}
    for part in parts(names):
        found.update((row.device, row.rev) for row in connection.execute(query.where(desired.c.device.in_(part))))
    return found
