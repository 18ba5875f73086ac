"""Devices that come after the last rollout of their model is done: they are brought to what the others run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy import Connection, select

from trainer.core.rollout import Rollout
from trainer.database import desired, parts, rollouts
from trainer.fleet import Member, members
from trainer.host import Host
from trainer.telling import references
from trainer.watch import base_of


@dataclass(frozen=True, slots=True)
class _Done:
    """A rollout that is done. `base`: of an adapter the release that it goes onto; `devices`: whom it knows; `heard`: others
    that said something since they were looked at."""

    model: str
    release: str
    part: str
    base: str | None
    devices: set[str]
    heard: set[str] = field(default_factory=set)


class Newcomers:
    """Finds them; belongs to one thread. What it remembers is what the database would say again."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._done: dict[str, _Done] = {}  # rollout -> what is asked of it, once all devices were looked at

    def heard(self, names: Iterable[str], ids: Iterable[str]) -> None:
        """These devices said something. `ids`: the rollouts that are asked about, all others are forgotten."""
        kept = frozenset(ids)
        self._done = {name: done for name, done in self._done.items() if name in kept}
        for done in self._done.values():
            done.heard.update(name for name in names if name not in done.devices)

    def find(self, connection: Connection, rollout_id: str) -> list[str]:
        """Devices that this rollout, which is done, did not know and should reach: at first all are looked at, then those
        that were heard, until `joined` says that it is committed. Only reads."""
        done = self._done.get(rollout_id)
        if done is not None:
            return _newcomers(self._host, connection, done, sorted(done.heard)) if done.heard else []
        done = self._read(connection, rollout_id)
        new = _newcomers(self._host, connection, done, None)
        done.heard.update(new)
        self._done[rollout_id] = done
        return new

    def joined(self, rollout_id: str, names: Iterable[str]) -> None:
        """The rollout knows these now."""
        self._done[rollout_id].devices.update(names)
        self._done[rollout_id].heard.clear()

    def _read(self, connection: Connection, rollout_id: str) -> _Done:
        row = connection.execute(select(rollouts).where(rollouts.c.id == rollout_id)).one()
        rollout = Rollout.from_dict(row.state)
        base = base_of(self._host, row, rollout)
        return _Done(row.model, row.release, rollout.part, base, set(rollout.devices))


def _newcomers(host: Host, connection: Connection, done: _Done, names: list[str] | None) -> list[str]:
    """Of these devices (None: of all) those that a rollout did not know and should reach.

    Not who runs the release, is pinned, or was told by a person what to run; nor who runs something that is not registered,
    for there would be no way back. With an adapter who runs another model is told the adapter's too.
    """
    settings = host.config.models.get(done.model)
    tier, heard = settings.tier if settings else "", host.lately()
    found = members(connection, done.model, tier, done.part, names=names, heard=heard)
    new = [
        each
        for each in found
        if each.device not in done.devices and each.online and each.pinned is None and each.active != done.release
    ]
    others = [each.device for each in new if done.base is not None and each.base != done.base]
    whole = {each.device: each for each in members(connection, done.model, tier, names=others)} if others else {}
    back = references(host, connection, [each.device for each in new], done.model, "models")
    told = _told(connection, done.model, [each.device for each in new])
    return [
        each.device
        for each in new
        if done.part not in told.get(each.device, ())
        and (each.device not in whole or _may_change(whole[each.device], told.get(each.device, ())))
        and (back[each.device] is not None or (each.active is None and done.part == "models"))  # nothing to go back to
    ]


def _told(connection: Connection, slot: str, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Device -> of its slot what was desired by name: "models", "adapters"."""
    found = {}
    for some in parts(names):
        for each in connection.execute(select(desired).where(desired.c.device.in_(some))):
            found[each.device] = tuple(part for part in ("models", "adapters") if slot in getattr(each, part))
    return found


def _may_change(member: Member, told: tuple[str, ...]) -> bool:
    """Whether a device may be given another model for the sake of an adapter."""
    return member.pinned is None and "models" not in told
