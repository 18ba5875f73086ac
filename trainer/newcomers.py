"""Devices that come after the last rollout of their model is done: they are brought to what the others run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, select

from trainer.core.rollout import Phase, Rollout
from trainer.database import desired, parts, rollouts
from trainer.fleet import Member, members
from trainer.host import Host
from trainer.releases import ReleaseError
from trainer.telling import references
from trainer.watch import base_of


def newcomers(host: Host, connection: Connection, row: Any, rollout: Rollout, names: Iterable[str] | None) -> list[str]:
    """Of these devices (None: of all) those that a rollout, which is done, did not know and should reach.

    Not who runs the release, is pinned, or was told by a person what to run; nor who runs something that is not registered,
    for there would be no way back. With an adapter who runs another model is told the adapter's too.
    """
    known, settings = frozenset(rollout.devices), host.config.models.get(row.model)
    asked = None if names is None else sorted(frozenset(names) - known)
    tier, heard = settings.tier if settings else "", host.lately()
    found = members(connection, row.model, tier, rollout.part, names=asked, heard=heard)
    new = [
        each
        for each in found
        if each.device not in known and each.online and each.pinned is None and each.active != row.release
    ]
    base = base_of(host, row, rollout)
    others = [each.device for each in new if base is not None and each.base != base]
    whole = {each.device: each for each in members(connection, row.model, tier, names=others)} if others else {}
    back = references(host, connection, [each.device for each in new], row.model, "models")
    told = _told(connection, row.model, [each.device for each in new])
    return [
        each.device
        for each in new
        if rollout.part not in told.get(each.device, ())
        and (each.device not in whole or _may_change(whole[each.device], told.get(each.device, ())))
        and back[each.device] is not None
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


def under(host: Host, connection: Connection, ids: Iterable[str]) -> list[str]:
    """The rollouts of the models below these rollouts, where they are of adapters: who was away at the end of those still
    has to get the model before its adapter."""
    found: list[str] = []
    wanted = list(ids)
    rows = connection.execute(select(rollouts.c.model, rollouts.c.release).where(rollouts.c.id.in_(wanted))).all()
    for row in rows:
        try:
            base = host.registry.get(row.release).manifest.base
        except ReleaseError:
            continue
        if base is not None:
            same = (rollouts.c.model == row.model, rollouts.c.release == base.release, rollouts.c.phase == Phase.DONE)
            query = select(rollouts.c.id).where(*same).order_by(rollouts.c.created.desc()).limit(1)
            found += connection.execute(query).scalars()
    return found
