"""What is still to be sent on this connection: desired states by device, open commands in pages.

Law of this file: rows decide what is sent, and here only stands which rows to look at. Every device is looked at after every
connection, so that what is remembered here may be lost at any point.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Connection, select, tuple_

from trainer.database import Database, commands, desired, devices, removed
from trainer.fleet import UNFINISHED
from trainer.removed import removed_names

STATES_MAX = 64  # desired states read in one turn: more than a connection takes at once
COMMANDS_MAX = 128  # open commands looked at in one turn; the next turn goes on behind them


class Due:
    """Keeps a fleet of any size from being read again and again by whoever sends."""

    def __init__(self, database: Database) -> None:
        self._changed = database.changed(desired)
        self._untold: dict[str, None] = {}  # devices whose desired state this connection was not told, in order
        self._behind: tuple[float, str] | None = None  # (created, id) of the last command that was looked at
        self._last: str | None = None  # the last of all open commands

    def connected(self, connection: Connection) -> None:
        """A new connection has been told nothing; of removed devices the broker may have found again what it retained."""
        names = [*connection.execute(select(desired.c.device)).scalars()]
        names += connection.execute(select(removed.c.device)).scalars()
        self._untold = dict.fromkeys(sorted(names))
        self._behind = None

    def again(self, names: Iterable[str]) -> None:
        """These are to be told once more on this connection."""
        self._untold |= dict.fromkeys(names)

    def states(self, connection: Connection) -> Sequence[Any]:
        """The next desired states to tell, in order; of a removed device a row with `rev` None."""
        self._untold |= dict.fromkeys(self._changed.take())
        names = list(itertools.islice(self._untold, STATES_MAX))
        if not names:
            return []
        rows: dict[str, Any] = {
            row.device: row for row in connection.execute(select(desired).where(desired.c.device.in_(names)))
        }
        out = removed_names(connection, names)
        rows |= {name: SimpleNamespace(device=name, rev=None) for name in out}
        for name in names:
            if name not in rows:
                self.told(name)  # by a transaction that was undone
        return [rows[name] for name in names if name in rows]

    def told(self, device: str) -> None:
        """This connection has taken the device's desired state; it is told again when that changes."""
        self._untold.pop(device, None)

    def commands(self, connection: Connection) -> Sequence[Any]:
        """The next commands that are not over, of those who listen: what waits in the broker for a device that is off crowds
        out what matters more. Those who are silent are among them, with `seen_at`: an answer would be a sign of life."""
        query = (
            select(commands, devices.c.seen_at)
            .join(devices, devices.c.device == commands.c.device)
            .where(devices.c.online.is_(True))
            .order_by(commands.c.created, commands.c.id)
            .limit(COMMANDS_MAX)
        )
        if self._behind is not None:
            query = query.where(tuple_(commands.c.created, commands.c.id) > tuple_(*self._behind))
        # A state at a time the index gives them in their order: neither those that are over nor a sort cost anything.
        each = [connection.execute(query.where(commands.c.state == state)).all() for state in UNFINISHED]
        in_order = heapq.merge(*each, key=lambda row: (row.created, row.id))
        found = list(itertools.islice(in_order, COMMANDS_MAX))
        if len(found) < COMMANDS_MAX:
            self._behind = (
                None  # from the beginning again, unless `looked_at` says that there was no room for all of them
            )
        self._last = found[-1].id if found and len(found) < COMMANDS_MAX else None
        return found

    def looked_at(self, row: Any) -> None:
        """This command needs no further look before all behind it had theirs."""
        self._behind = None if row.id == self._last else (row.created, row.id)
