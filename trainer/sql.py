"""How the trainer's rows are read and written, in SQLite with a write-ahead log or in PostgreSQL.

Who writes is alone while he does, on both (`trainer.dialects`), so that what was read in a transaction still holds when it
writes. The tables are in `trainer.database`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, Engine, Insert, Integer, Table, Update, bindparam, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError

from trainer import dialects
from trainer.schema import String, metadata

# 2: leases, workers, opinions, pool, pulls, registrations. 3: detections, labels, schedules, notices, coordinators.
# 5: removed.
SCHEMA_VERSION = 5  # so far each brought new tables only, which `create_all` makes
_IDS_A_QUERY = 500  # SQLite limits the variables of a statement

coordinators = Table(  # who works on this database: one row, whose epoch only grows; see Database.serve
    "coordinators",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Integer, nullable=False),
    Column("name", String, nullable=False),
)


class DatabaseError(RuntimeError):
    """The database cannot be used; the message names it and the fix."""


class Served(DatabaseError):
    """Another coordinator works on this database."""


class Changed(set[str]):
    """Keys of rows of one table that this process has written since its owner last took them out (`Database.changed`)."""

    def take(self) -> list[str]:
        """What is in it, by name; it is empty afterwards."""
        taken = sorted(self)
        self.clear()
        return taken


class Database:
    """Opens the SQLite file at a path, making it when needed, or the PostgreSQL database of an URL; threads may share one
    object. Raises DatabaseError."""

    def __init__(self, where: Path | str) -> None:
        try:
            self.engine: Engine = dialects.engine(where)
        except dialects.BadUrl as error:
            raise DatabaseError(str(error)) from None
        self._mine = threading.local()  # the transaction that this thread is in
        self._epoch: int | None = None
        self._changed: dict[str, list[weakref.ref[Changed]]] = {}  # table -> who wants to know
        try:
            self._make(dialects.shown(self.engine))
        except OperationalError as error:
            self.engine.dispose()
            raise DatabaseError(
                f"{dialects.shown(self.engine)}: {error.orig}; is it there, and may we write?"
            ) from None

    def _make(self, name: str) -> None:
        with self.read() as connection:
            found = dialects.schema_version(connection)
        if found > SCHEMA_VERSION:
            raise DatabaseError(
                f"{name} has schema {found}, this program knows {SCHEMA_VERSION}: use the newer trainer"
            )
        if found < SCHEMA_VERSION:
            with self.write() as connection:
                metadata.create_all(connection)  # also what a newer schema adds to an older database
                dialects.set_schema_version(connection, SCHEMA_VERSION)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write: all of it or nothing. One inside another is part of it, and undone alone when an
        exception leaves it. Raises Served when another coordinator has taken the database from us."""
        if (outer := getattr(self._mine, "connection", None)) is not None:
            with outer.begin_nested():
                yield outer
            return
        options = {"writes": True, "changed": self._changed}
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            if self._epoch is not None:
                self._check(connection, self._epoch)
            self._mine.connection = connection
            try:
                yield connection
            finally:
                self._mine.connection = None

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of everything and writes nothing; inside `write` it sees what that wrote."""
        if (outer := getattr(self._mine, "connection", None)) is not None:
            yield outer
            return
        with self.engine.connect() as connection, connection.begin():
            yield connection

    def serve(self, name: str) -> None:
        """From now on this object is the coordinator's: who served before can write no more. Raises Served when another
        process holds the lock, which ends with its process or its connection."""
        lock = dialects.lock(self.engine)
        if lock is None:
            raise Served(
                f"{dialects.shown(self.engine)}: another `trainer serve` works on this database ({self._served_by()}): "
                "stop it first, or give this one a database of its own"
            )
        self._lock, self._name = lock, name
        with self.write() as connection:
            row = connection.execute(select(coordinators.c.epoch)).first()
            epoch = 1 if row is None else int(row.epoch) + 1
            put(connection, coordinators, {"id": 0}, {"epoch": epoch, "name": name})
            self._epoch = (
                epoch  # before anybody else may write, so that none of our own threads is taken for a stranger
            )

    def keep(self) -> None:
        """Take the lock of `serve` again after the database was restarted; raises Served when another has it."""
        if self._epoch is not None and not dialects.holds(self._lock):
            self.serve(self._name)

    def _served_by(self) -> str:
        with self.read() as connection:
            return str(connection.execute(select(coordinators.c.name)).scalar() or "unknown")

    def _check(self, connection: Connection, epoch: int) -> None:
        row = connection.execute(select(coordinators.c.epoch, coordinators.c.name)).one()
        if row.epoch != epoch:
            raise Served(
                f"{dialects.shown(self.engine)} was taken over by another `trainer serve` ({row.name}); this one ends"
            )

    def changed(self, *tables: Table) -> Changed:
        """From now on the keys that `note_changed` is told of in these tables. A transaction that is undone may have told of
        some as well: who is told looks at the rows."""
        found = Changed()
        for table in tables:
            # Replaced, not changed in place: a writer may be going through it.
            known = [each for each in self._changed.get(table.name, []) if each() is not None]
            self._changed[table.name] = [*known, weakref.ref(found)]
        return found

    def close(self) -> None:
        """Close every connection."""
        if self._epoch is not None:
            self._lock.close()
        self.engine.dispose()


def parts(values: Sequence[str]) -> Iterator[Sequence[str]]:
    """The values in portions that a statement takes."""
    for start in range(0, len(values), _IDS_A_QUERY):
        yield values[start : start + _IDS_A_QUERY]


def put(connection: Connection, table: Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Set `values` in the row with this key, or add it; only inside `Database.write`, where nobody else writes."""
    change, add = _statements(table, tuple(key))
    if connection.execute(change, {**{f"of_{name}": value for name, value in key.items()}, **values}).rowcount == 0:
        connection.execute(add, {**key, **values})


@lru_cache(maxsize=256)
def _statements(table: Table, key: tuple[str, ...]) -> tuple[Update, Insert]:
    """Made once: SQLAlchemy takes longer to build a statement than SQLite to run it."""
    return update(table).where(*(table.c[name] == bindparam(f"of_{name}") for name in key)), insert(table)


def put_all(connection: Connection, table: Table, key: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """`put` for many rows with one statement; every row has the same columns, `key` among them, and no two the same key."""
    if not rows:
        return
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table)
    values = {name: statement.excluded[name] for name in rows[0] if name not in key}
    connection.execute(
        statement.on_conflict_do_update(index_elements=list(key), set_=values), [dict(row) for row in rows]
    )


def note_changed(connection: Connection, table: Table, keys: Iterable[str]) -> None:
    """Tell whoever asked `Database.changed` that these rows of a table are written in this transaction."""
    wanted = connection.get_execution_options().get("changed", {}).get(table.name, ())
    known = list(keys) if wanted else ()
    for each in wanted:
        if (found := each()) is not None:
            found.update(known)
