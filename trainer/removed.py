"""Devices that an operator took out for good (`trainer fleet remove`), until one is taken back (`trainer fleet readmit`).

Law of this file: who stands in `removed` has no row in `devices` and none in `desired`, and gets none: what still comes from
it is dropped before it becomes rows (`trainer.incoming`), and nothing is desired of it. Its samples and what it measured
stay; none of them trains or calls for a training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from edged.wire import topics
from trainer.database import (
    commands,
    desired,
    devices,
    identities,
    jobs,
    note_changed,
    parts,
    pulls,
    removed,
    samples,
)
from trainer.fleet import ENDED
from trainer.host import Host

AGAIN_S = 60.0  # between two times that the broker is told to forget what it keeps of one device
REASON_MAX = 500  # characters
GONE = "its device was removed"
ENDS_A_CLAIM = ("release", "used")  # actions that a device which is taken back must hear


@dataclass(frozen=True, slots=True)
class Cleared:
    """The reference of an empty retained message where only the device itself may be allowed to speak."""

    device: str


def removed_names(connection: Connection, names: Sequence[str] | None = None) -> frozenset[str]:
    """Those of these devices (None: all) that are removed."""
    query = select(removed.c.device)
    if names is None:
        return frozenset(connection.execute(query).scalars())
    found: set[str] = set()
    for part in parts(names):
        found.update(connection.execute(query.where(removed.c.device.in_(part))).scalars())
    return frozenset(found)


def stranger(connection: Connection, device: str) -> str:
    """Why nothing can be done with a device of which there is no row."""
    row = connection.execute(select(removed).where(removed.c.device == device)).first()
    if row is not None:
        why = f" ({row.reason})" if row.reason else ""
        return f"device {device!r} was removed{why}: `trainer fleet readmit {device}` takes it back"
    known = connection.execute(select(devices.c.device).order_by(devices.c.device)).scalars().all()
    return f"device {device!r} was never seen; known: {', '.join(known[:20]) or 'none'}"


def listed(connection: Connection) -> list[dict[str, Any]]:
    """The devices that are removed, by name, for people."""
    query = select(removed.c.device, removed.c.at.label("removed_at"), removed.c.reason).order_by(removed.c.device)
    return [dict(row._mapping) for row in connection.execute(query)]


def remove(host: Host, connection: Connection, device: str, reason: str) -> dict[str, Any]:
    """Take a device out; the answer to show, or an `error`. Rollouts see it as gone from their next look on."""
    row = connection.execute(select(devices).where(devices.c.device == device)).first()
    if row is None:
        return {"error": stranger(connection, device)}
    known = dict(row._mapping)
    connection.execute(insert(removed).values(device=device, at=host.now(), reason=reason[:REASON_MAX], known=known))
    connection.execute(delete(devices).where(devices.c.device == device))
    connection.execute(delete(desired).where(desired.c.device == device))
    note_changed(connection, removed, [device])
    note_changed(connection, devices, [device])
    note_changed(connection, desired, [device])
    expired = _end_commands(connection, device)
    _refuse_claims(connection, device)
    text = f"{device} was removed" + (f": {reason[:REASON_MAX]}" if reason else "")
    host.announce(connection, "device_removed", text, device=device)
    who = connection.execute(select(identities.c.revoked).where(identities.c.name == device)).first()
    kept = connection.execute(select(samples.c.id).where(samples.c.device == device)).all()
    connects = who is not None and who.revoked is None
    return {"device": device, "removed": True, "samples_kept": len(kept), "commands_expired": expired,
            "may_connect": connects}  # fmt: skip


def readmit(host: Host, connection: Connection, device: str) -> dict[str, Any]:
    """Take a device back, as it was known; the answer to show, or an `error`."""
    row = connection.execute(select(removed).where(removed.c.device == device)).first()
    if row is None:
        names = ", ".join(sorted(removed_names(connection))[:20]) or "none"
        return {"error": f"device {device!r} is not removed; removed are: {names}"}
    connection.execute(delete(removed).where(removed.c.device == device))
    note_changed(connection, removed, [device])
    # Its whole catalogue is asked for: what it said of its samples meanwhile was dropped.
    connection.execute(insert(devices).values({**row.known, "listed_at": 0.0}))
    note_changed(connection, devices, [device])
    host.announce(connection, "device_readmitted", f"{device} is taken back", device=device)
    return {"device": device, "removed": False}


def _end_commands(connection: Connection, device: str) -> int:
    """What was sent to it and not answered is sent no more, except what ends a claim: if it is ever taken back it must not
    keep its samples for nobody."""
    query = select(commands.c.id, commands.c.body).where(commands.c.device == device, commands.c.state.notin_(ENDED))
    over = [row.id for row in connection.execute(query) if row.body.get("action") not in ENDS_A_CLAIM]
    for part in parts(over):
        connection.execute(update(commands).where(commands.c.id.in_(part)).values(state="expired", reason=GONE))
    return len(over)


def _refuse_claims(connection: Connection, device: str) -> None:
    """Jobs and pulls that wait for samples of this device hear that they will not come."""
    waiting = set(connection.execute(select(jobs.c.id).where(jobs.c.status == "claiming")).scalars())
    waiting |= set(connection.execute(select(pulls.c.id).where(pulls.c.state == "open")).scalars())
    query = select(commands.c.id, commands.c.body).where(commands.c.device == device, commands.c.type == "samples")
    for row in connection.execute(query).all():
        if row.body["action"] == "claim" and row.body["job"] in waiting:
            detail = {"refused": dict.fromkeys(row.body["samples"], GONE)}
            connection.execute(update(commands).where(commands.c.id == row.id).values(detail=detail))


def kept_by_the_broker(site: str, device: str) -> list[tuple[topics.Address, Any]]:
    """What the broker retains of a device, each with the reference of the message that empties it. Presence of a responder
    ends by itself (`topics.RESPONDER`)."""
    own = {"site": site, "dev": device}
    return [
        (topics.DESIRED(**own), ("cleared", device)),
        (topics.STATE(**own), Cleared(device)),
        (topics.REPORTED(**own), Cleared(device)),
    ]


class Clearing:
    """Removed devices that still speak, and so have the broker keep something again; each is due once in AGAIN_S."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._spoke: set[str] = set()
        self._last: dict[str, float] = {}

    def spoke(self, names: Collection[str]) -> None:
        """These said something that the broker retains."""
        self._spoke.update(names)

    def due(self) -> list[str]:
        """Whose retained messages are to be emptied now; they are due no more until they speak again."""
        now = self._monotonic()
        self._last = {name: at for name, at in self._last.items() if now - at < AGAIN_S}
        found = sorted(self._spoke - self._last.keys())
        self._spoke -= set(found)
        self._last |= dict.fromkeys(found, now)
        return found
