"""How the trainer's rows are read and written, in SQLite with a write-ahead log or in PostgreSQL.

Who writes is alone while he does, on both (`trainer.dialects`), so that what was read in a transaction still holds when it
writes. The tables are in `trainer.database`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, Engine, Integer, Table, insert, select, update
from sqlalchemy.exc import OperationalError

from trainer import dialects
from trainer.schema import String, metadata

# 2: leases, workers, opinions, pool, pulls, registrations. 3: detections, labels, schedules, notices, coordinators.
SCHEMA_VERSION = 4  # so far each brought new tables only, which `create_all` makes
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
        with self.engine.connect().execution_options(writes=True) as connection, connection.begin():
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
    where = [table.c[name] == value for name, value in key.items()]
    if connection.execute(update(table).where(*where).values(**values)).rowcount == 0:
        connection.execute(insert(table).values(**key, **values))
