"""Samples that devices keep for somebody (a training job, a pull): claims that end, and pixels that nobody needs any more.

`owner` is the id in `samples.job` and in the commands' `job`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Connection, select, update

from trainer.database import commands, parts, samples
from trainer.fleet import UNFINISHED
from trainer.host import Host


class Held(Protocol):
    """A sample as a manifest or a catalogue row names it."""

    @property
    def id(self) -> str: ...
    @property
    def device(self) -> str: ...


def by_device(given: Iterable[Held]) -> list[tuple[str, list[str]]]:
    """(device, ids) of samples, by name."""
    found: dict[str, list[str]] = {}
    for each in given:
        found.setdefault(each.device, []).append(each.id)
    return sorted(found.items())


def refused(connection: Connection, owner: str) -> dict[str, str]:
    """Samples that their device says it does not have, or not to give, with the reason."""
    found: dict[str, str] = {}
    for row in connection.execute(select(commands.c.detail, commands.c.body).where(commands.c.job == owner)):
        if row.body["action"] == "claim":
            found.update(dict.fromkeys(_names(row.detail.get("unknown")), "the device does not have it"))
            given = row.detail.get("refused", {})
            found.update(given if isinstance(given, dict) else dict.fromkeys(_names(given), "refused"))
    return found


def _names(said: Any) -> list[str]:
    """The texts of what should be a list of them: rows of earlier versions may hold anything."""
    return [each for each in said if isinstance(each, str)] if isinstance(said, list) else []


def end_claims(connection: Connection, owner: str) -> None:
    """No claim is sent any more: a device that comes back late must not keep its samples for nobody."""
    query = select(commands.c.id, commands.c.body).where(commands.c.job == owner, commands.c.state.in_(UNFINISHED))
    claims = [row.id for row in connection.execute(query) if row.body["action"] == "claim"]
    for part in parts(claims):
        connection.execute(update(commands).where(commands.c.id.in_(part)).values(state="expired"))


def give_back(host: Host, connection: Connection, owner: str, given: Sequence[Held], *, tried: int) -> None:
    """The samples may be claimed again. `tried`: how many trainings they have been tried in by this."""
    for part in parts([each.id for each in given]):
        changes = {"job": None, "state": "labelled", "tried": samples.c.tried + tried}
        # Not what a device has moved on by itself meanwhile, such as a label that a person rejected.
        where = (samples.c.id.in_(part), samples.c.job == owner)
        connection.execute(
            update(samples).where(*where, samples.c.state.in_(("labelled", "claimed"))).values(**changes)
        )
        connection.execute(update(samples).where(*where).values(job=None))
    for device, ids in by_device(given):
        host.command_samples(connection, device, "release", ids, job=owner)


def forget_pixels(connection: Connection, folder: Path, digests: Sequence[str]) -> None:
    """Remove uploaded pixels that nobody claims; the devices still have them."""
    for part in parts(digests):
        query = select(samples.c.sha256).where(samples.c.sha256.in_(part), samples.c.job.is_not(None))
        needed = set(connection.execute(query).scalars())
        for digest in set(part) - needed:
            (folder / digest).unlink(missing_ok=True)
