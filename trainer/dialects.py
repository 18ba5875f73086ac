"""What SQLite and PostgreSQL do differently: the beginning of a transaction, the schema's version, the coordinator's lock.

Law of this file: a transaction that writes is alone, on both. SQLite has one writer anyway and is asked for that at the
beginning; in PostgreSQL an advisory lock does the same, for a transaction that reads first and writes later would else fail
or lose what another wrote in between.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO, Any, Protocol

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

BUSY_MS_MAX = 10_000
CONNECT_S_MAX = 10
# A server whose machine is gone says nothing: without these the loop would wait for it for a quarter of an hour.
ALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}
WRITE_LOCK, SERVE_LOCK = 0x65646701, 0x65646702  # "edg" and a number: advisory locks are the whole database's


class BadUrl(ValueError):
    """The address of a database is none."""


class Lock(Protocol):
    """A lock that is held until it is closed or its process ends."""

    def close(self) -> None: ...


def engine(where: Path | str) -> Engine:
    """An engine for a SQLite file, whose folder is made, or for an URL; raises BadUrl for one that is none."""
    if isinstance(where, Path):
        where.parent.mkdir(parents=True, exist_ok=True)
        made = create_engine(f"sqlite:///{where}", connect_args={"timeout": BUSY_MS_MAX / 1000})
        event.listen(made, "connect", _configure)
        event.listen(made, "begin", _begin_sqlite)
        return made
    try:
        url = make_url(where)
    except (ArgumentError, ValueError):  # their texts may hold parts of a password
        raise BadUrl(
            "database.url is no URL: use postgresql://user:password@host/name, and %40 for an @ within the password"
        ) from None
    made = create_engine(
        url,
        pool_pre_ping=True,  # a server that was restarted has forgotten our connections
        connect_args={"connect_timeout": CONNECT_S_MAX, "options": f"-c lock_timeout={BUSY_MS_MAX}", **ALIVE},
    )
    event.listen(made, "begin", _begin_postgresql)
    return made


def shown(made: Engine) -> str:
    """The database's name for people, without a password."""
    if made.dialect.name == "sqlite":
        return str(made.url.database)
    return made.url.render_as_string(hide_password=True).replace("+psycopg", "")


def schema_version(connection: Connection) -> int:
    """0: nothing is there yet."""
    if connection.dialect.name == "sqlite":
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    there = connection.exec_driver_sql("SELECT to_regclass('edged_schema')").scalar_one()
    if there is None:
        return 0
    return int(connection.exec_driver_sql("SELECT version FROM edged_schema").scalar_one())


def set_schema_version(connection: Connection, version: int) -> None:
    """Part of the caller's transaction, as the tables are."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA user_version = {version}")
        return
    connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS edged_schema (version INTEGER NOT NULL)")
    connection.exec_driver_sql("DELETE FROM edged_schema")
    connection.exec_driver_sql(f"INSERT INTO edged_schema VALUES ({version})")


def lock(made: Engine) -> Lock | None:
    """The lock of the one who serves; None: somebody else holds it."""
    if made.dialect.name == "sqlite":
        return _lock_file(Path(f"{made.url.database}.lock"))
    # A connection of its own, outside the pool: the lock lives as long as it does.
    options = {"connect_timeout": CONNECT_S_MAX, **ALIVE}
    alone = create_engine(made.url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args=options)
    held = alone.connect()
    if held.exec_driver_sql(f"SELECT pg_try_advisory_lock({SERVE_LOCK})").scalar_one():
        return held
    held.close()
    return None


def holds(held: Lock) -> bool:
    """Whether the lock is still there: one in PostgreSQL ends with its connection."""
    if not isinstance(held, Connection):
        return True
    try:
        held.exec_driver_sql("SELECT 1")
    except SQLAlchemyError:
        held.close()
        return False
    return True


def _lock_file(path: Path) -> IO[str] | None:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _configure(connection: Any, _record: Any) -> None:
    # The driver's own transaction control begins too late: `_begin_sqlite` decides instead.
    connection.isolation_level = None
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", f"busy_timeout = {BUSY_MS_MAX}"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later fails when another wrote in between; IMMEDIATE waits instead.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("writes", False):
        # With READ COMMITTED every statement after the lock sees all that was committed before it was given.
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITE_LOCK})")
    else:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
