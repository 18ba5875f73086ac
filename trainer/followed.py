"""Which rollouts that are over still concern somebody: who was away at their end is brought to what the others run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, func, select

from trainer.core.rollout import ENDED, Phase, Rollout
from trainer.database import desired, parts, rollouts
from trainer.host import Host
from trainer.releases import ReleaseError


class Followed:
    """Names them; belongs to one thread. Every turn reads the last one of each model, the others when those have changed."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._last: dict[str, str] | None = None  # the last rollout of each model -> its phase
        self._found: tuple[list[str], list[str]] = ([], [])

    def read(self, connection: Connection) -> tuple[list[str], list[str]]:
        """(the last rollout of each model, and those of which somebody may still be away; those that newcomers join)."""
        last = _last(connection)
        if last != self._last:
            done = _done(connection, last)
            kept = [name for name, phase in last.items() if phase not in ENDED] + done
            self._found = list(dict.fromkeys([*last, *done, *_under(self._host, connection, kept)])), done
            self._last = last
        return self._found


def _last(connection: Connection) -> dict[str, str]:
    """The last rollout of each model, with its phase."""
    newest = select(rollouts.c.model, func.max(rollouts.c.created).label("at")).group_by(rollouts.c.model).subquery()
    asked = select(rollouts.c.id, rollouts.c.phase).join(
        newest, (rollouts.c.model == newest.c.model) & (rollouts.c.created == newest.c.at)
    )
    return {row.id: row.phase for row in connection.execute(asked)}


def _done(connection: Connection, last: Mapping[str, str]) -> list[str]:
    """The last rollout of each model, where that is done; where it was aborted the last one that is, of whichever part: the
    fleet went back to that, and whom it did not reach it still has to."""
    found = [name for name, phase in last.items() if phase == Phase.DONE]
    for name in (name for name, phase in last.items() if phase == Phase.ABORTED):
        model = select(rollouts.c.model).where(rollouts.c.id == name).scalar_subquery()
        done = select(rollouts.c.id).where(rollouts.c.model == model, rollouts.c.phase == Phase.DONE)
        found += connection.execute(done.order_by(rollouts.c.created.desc()).limit(1)).scalars()
    return found


def _under(host: Host, connection: Connection, ids: Iterable[str]) -> list[str]:
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


def going_to(host: Host, connection: Connection, model: str, part: str) -> dict[str, dict[str, str] | None]:
    """Device -> the release (of adapters None: the bare base) that rollouts which are over are bringing it to, of those who
    were away at their end: what such a device runs, or ran when it was last heard, is no place to go back to."""
    names, _ = Followed(host).read(connection)
    asked = select(rollouts).where(rollouts.c.id.in_(names), rollouts.c.model == model, rollouts.c.phase.in_(ENDED))
    found: dict[str, dict[str, str] | None] = {}
    for row in connection.execute(asked.order_by(rollouts.c.created)).all():  # a later one knew of those before it
        rollout = Rollout.from_dict(row.state)
        if rollout.part == part:
            found |= _bringing(connection, row, rollout)
    return found if part == "adapters" else {device: ref for device, ref in found.items() if ref is not None}


def _bringing(connection: Connection, row: Any, rollout: Rollout) -> dict[str, dict[str, str] | None]:
    """Those who were away -> where this rollout brings them; without who was told something else since."""
    ours = {"release": row.release, "sha256": row.sha256} if rollout.phase is Phase.DONE else None
    wanted = {device: ours or row.previous.get(device) for device in rollout.left}
    told = [device for device in wanted if device in rollout.told]
    for some in parts(told):
        for each in connection.execute(select(desired).where(desired.c.device.in_(some))):
            if getattr(each, rollout.part).get(row.model) != wanted[each.device]:
                del wanted[each.device]
    return wanted
