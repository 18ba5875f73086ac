"""Moves everything that a trainer's database holds into another one, from SQLite to PostgreSQL or back.

Law of this file: all rows or none. The source cannot change meanwhile, the target is filled in one transaction, and that is
committed only after every row was read back from it and is what the source holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Connection, Table, func, insert, null, select
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from trainer import dialects
from trainer.database import Database, DatabaseError, metadata

ROWS_AT_ONCE = 500


def copy(source: Path | str, target: Path | str) -> dict[str, int]:
    """Copy every row of a database into another, empty one; table -> how many rows there are now.

    Each is the path of a SQLite file, or an URL as `config_fleet.DatabaseAt` makes it. Raises DatabaseError when the source
    is not there, a `trainer serve` works on one of them, the target has rows, or does not take one.
    """
    if source == target:
        raise DatabaseError("source and target are the same database: name another target")
    if isinstance(source, Path) and not source.is_file():
        raise DatabaseError(f"{source} does not exist: name the SQLite file, or the URL, that has the rows")
    # The source as one who writes: workers and command lines wait, so that no row comes too late to be copied.
    with _unserved(source) as old, _unserved(target) as new, old.write() as reading, new.write() as writing:
        _check_empty(writing, dialects.shown(new.engine))
        return {table.name: _copy_table(reading, writing, table) for table in metadata.sorted_tables}


@contextmanager
def _unserved(where: Path | str) -> Iterator[Database]:
    """The database, and nobody begins to serve it; raises DatabaseError."""
    database = Database(where)
    try:
        lock = dialects.lock(database.engine)
        if lock is None:
            raise DatabaseError(f"{dialects.shown(database.engine)}: a `trainer serve` works on it: stop it first")
        try:
            yield database
        finally:
            lock.close()
    finally:
        database.close()


def _check_empty(connection: Connection, name: str) -> None:
    for table in metadata.sorted_tables:
        count = connection.execute(select(func.count()).select_from(table)).scalar_one()
        if count:
            raise DatabaseError(
                f"{name}: table {table.name} has {count} rows already: name an empty database as target"
            )


def _copy_table(source: Connection, target: Connection, table: Table) -> int:
    count = 0
    for rows in source.execute(_all(table)).partitions():
        values = [_values(table, row) for row in rows]
        try:
            target.execute(insert(table), values)
        except (DataError, IntegrityError) as error:
            first, last = ([row._mapping[key.name] for key in table.primary_key] for row in (rows[0], rows[-1]))
            raise DatabaseError(
                f"table {table.name}, between the rows {first} and {last}: {str(error.orig).strip()}; nothing was copied: "
                "correct or remove that row in the source, and copy again"
            ) from None
        except DBAPIError as error:
            raise DatabaseError(f"table {table.name}: {str(error.orig).strip()}; nothing was copied") from None
        count += len(rows)
    pairs = zip_longest(source.execute(_all(table)), target.execute(_all(table)))
    for number, (given, found) in enumerate(pairs, start=1):
        if given is None or found is None or tuple(given) != tuple(found):
            raise DatabaseError(
                f"table {table.name}, row {number}: {found} came back for {given}; nothing was copied: this is a defect"
            )
    return count


def _all(table: Table) -> Any:
    """Every row in the order of the key, and of each JSON column whether it is NULL, which is not JSON's null."""
    absent = [column.is_(None).label(f"{column.name} is null") for column in _nullable(table)]
    return select(*table.columns, *absent).order_by(*table.primary_key).execution_options(yield_per=ROWS_AT_ONCE)


def _values(table: Table, row: Any) -> dict[str, Any]:
    told = row._mapping
    values = {column.name: told[column.name] for column in table.columns}
    return values | {column.name: null() for column in _nullable(table) if told[f"{column.name} is null"]}


def _nullable(table: Table) -> list[Any]:
    return [column for column in table.columns if isinstance(column.type, JSON) and column.nullable]
