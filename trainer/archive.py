"""Samples that have done their work: `archived` on their devices once the training with them is confirmed (L14).

Law of this file (L15): only what its device itself says is used may be archived. Nothing here deletes anything: a device
gives up used and archived samples when it needs the room, and archived ones when they are as old as its `age_days` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, and_, bindparam, select, update

from edged.wire.messages import CommandState
from trainer import fleet
from trainer.claims import by_device
from trainer.database import commands, parts, samples
from trainer.host import Host

NAMED_MAX = 5  # samples named in one message
_OPEN = and_(*(commands.c.state != ended for ended in fleet.ENDED))  # a list would be another statement for each row
_ANSWERED = update(commands).where(commands.c.id == bindparam("of_id"), _OPEN)


def order(
    host: Host, connection: Connection, *, ids: Sequence[str] = (), model: str = "", release: str = "", device: str = ""
) -> dict[str, Any]:
    """Have the devices archive used samples: these, or those of a model, of the release that they trained, of a device.

    How many are asked for, and how many wait: their devices have not confirmed the training. Raises ValueError for an id
    that is not there or not used, and where nothing narrows it.
    """
    if not (ids or model or release or device):
        raise ValueError("archive which samples? Give ids, a model, a release or a device")
    query = select(samples.c.id, samples.c.device, samples.c.state)
    for column, value in ((samples.c.model, model), (samples.c.used_by, release), (samples.c.device, device)):
        query = query.where(column == value) if value else query
    rows: list[Any] = []
    for part in parts(list(dict.fromkeys(ids))) if ids else [None]:
        rows += connection.execute(query.where(samples.c.id.in_(part)) if part else query).all()
    _refuse(ids, rows)
    used = [row for row in rows if row.state == "used"]
    busy = _under_way(connection)
    ready = [row for row in used if row.id not in busy]
    for name, told in by_device(ready):
        host.command_samples(connection, name, "archive", told)
    return {"asked": len(ready), "devices": len({row.device for row in ready}), "waiting": len(used) - len(ready)}


def _refuse(ids: Sequence[str], rows: Sequence[Any]) -> None:
    """Raise for ids that cannot be archived: who names a sample must hear what is wrong with it."""
    found = {row.id: row.state for row in rows}
    wrong = [
        f"{each} ({found.get(each, 'no such sample')})" for each in ids if found.get(each) not in ("used", "archived")
    ]
    if wrong:
        more = f" and {len(wrong) - NAMED_MAX} more" if len(wrong) > NAMED_MAX else ""
        raise ValueError(
            f"not used in a confirmed training: {', '.join(wrong[:NAMED_MAX])}{more}; only samples in the state `used` may "
            "be archived"
        )


def _under_way(connection: Connection) -> set[str]:
    """Samples whose devices have not answered that they are used, or to archive them."""
    query = select(commands.c.body).where(commands.c.type == "samples", commands.c.state.in_(fleet.UNFINISHED))
    told = (body for (body,) in connection.execute(query) if body["action"] in ("used", "archive"))
    return {each for body in told for each in body["samples"]}


def take_command_states(host: Host, connection: Connection, said: Sequence[tuple[str, str, CommandState]]) -> None:
    """How far commands are, as (device, command, state), in this order (`take_command_state`), with few statements."""
    found: dict[str, Any] = {}
    for part in parts([command for _, command, _ in said]):
        query = select(commands.c.id, commands.c.type, commands.c.device, commands.c.body).where(
            commands.c.id.in_(part)
        )
        found.update((row.id, row) for row in connection.execute(query))
    changes = []
    for device, command, state in said:
        row = found.get(command)
        if row is None or row.device != device:
            continue  # it is forgotten, or was never ours, or another device's
        if row.type == "samples" and state.state == "done":  # it may move samples
            take_command_state(host, connection, device, command, state)
            continue
        told = "refused" if state.state == "failed" and row.type in fleet.ORDERS else state.state
        changes.append({"of_id": command, "state": told, "reason": state.reason, "detail": state.detail})
    if changes:
        connection.execute(_ANSWERED, changes)


def take_command_state(host: Host, connection: Connection, device: str, command: str, state: CommandState) -> None:
    """How far a command is (`fleet.take_command_state`). A device that confirms a training has its samples archived where
    `models.NAME.archive` says so; one that has archived them is believed."""
    row = connection.execute(select(commands).where(commands.c.id == command, commands.c.device == device)).first()
    fleet.take_command_state(connection, device, command, state)
    if row is None or row.type != "samples" or row.state in fleet.ENDED or state.state != "done":
        return
    if row.body["action"] == "used":
        _after_use(host, connection, row.device, _told(state, "moved"))
    elif row.body["action"] == "archive":
        # What a device does not have any more was given up, as used samples may be.
        _archived(connection, row.device, [*_told(state, "moved"), *_told(state, "unknown")], state.ts)


def _told(state: CommandState, key: str) -> list[str]:
    given = state.detail.get(key)
    return [each for each in given if isinstance(each, str)] if isinstance(given, list) else []


def _after_use(host: Host, connection: Connection, device: str, moved: Sequence[str]) -> None:
    wanted = [name for name, model in host.config.models.items() if model.archive]
    ready: list[str] = []
    for part in parts(moved) if wanted else ():
        mine = (samples.c.id.in_(part), samples.c.device == device, samples.c.state == "used")
        ready += connection.execute(select(samples.c.id).where(*mine, samples.c.model.in_(wanted))).scalars()
    if ready:
        host.command_samples(connection, device, "archive", ready)


def _archived(connection: Connection, device: str, ids: Sequence[str], ts: float) -> None:
    for part in parts(ids):
        mine = (samples.c.id.in_(part), samples.c.device == device, samples.c.state == "used")
        connection.execute(update(samples).where(*mine).values(state="archived", entry_ts=ts))
