"""The fleet's rows go from SQLite to PostgreSQL and back, every one of every table, or none at all."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import JSON, BigInteger, Boolean, Column, Float, Integer, insert, null
from typer.testing import CliRunner

from tests.support.postgres import Postgres
from trainer.cli import app
from trainer.database import Database, judged, metadata, samples, windows
from trainer.dialects import lock
from trainer.transfer import ROWS_AT_ONCE, copy

ROWS = 3
MANY = 2 * ROWS_AT_ONCE + 1  # of one table: more than are read at once


def value(column: Column[Any], number: int) -> Any:
    """Another one for each row, and for each kind of column one that a careless copy would change."""
    kind = column.type
    if column.nullable and number == 1:
        return null() if isinstance(kind, JSON) else None
    if isinstance(kind, JSON):
        return None if column.nullable and number == 2 else {"ü\u0000": [number, 0.1, None, {"b": 1, "a": 2}]}
    if isinstance(kind, Boolean):
        return bool(number % 2)
    if isinstance(kind, BigInteger):
        return 2**40 + number
    if isinstance(kind, Integer):
        return number
    if isinstance(kind, Float):
        return 1.8e9 + number + 0.1
    return f"{column.name} {'zäÄZ'[number % 4]}{number} 'x' \\ %s"


def fill(path: Path) -> None:
    database = Database(path)
    with database.write() as connection:
        for table in metadata.sorted_tables:
            count = MANY if table is windows else ROWS
            rows = [{column.name: value(column, number) for column in table.columns} for number in range(count)]
            connection.execute(insert(table), rows)
    database.close()


def dump(path: Path) -> dict[str, list[Any]]:
    """All rows as SQLite itself says them."""
    with sqlite3.connect(path) as connection:
        return {
            name: connection.execute(f'SELECT * FROM "{name}" ORDER BY 1, 2').fetchall() for name in metadata.tables
        }


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["db", "copy", *map(str, arguments)])


def test_every_row_of_every_table_goes_to_postgresql_and_back(tmp_path: Path, postgres: Postgres) -> None:
    old, back, url = tmp_path / "old.sqlite", tmp_path / "back.sqlite", postgres.url("moved")
    fill(old)
    before = dump(old)
    done = run(old, url, "--json")
    assert done.exit_code == 0, done.output
    counts = json.loads(done.output)
    assert counts == {name: len(rows) for name, rows in before.items()}
    assert counts["windows"] == MANY and {"measured", "judged", "looks", "detections"} < counts.keys()
    with postgres.connect("moved") as connection:  # as another program sees them
        for name, count in counts.items():
            assert connection.execute(f'SELECT count(*) FROM "{name}"').fetchone() == (count,)  # type: ignore[arg-type]
        unknown = connection.execute("SELECT count(*) FROM requests WHERE answer IS NULL").fetchone()
        assert unknown == (1,), "NULL stays NULL, and JSON's null is something else"
    assert run(url, back).exit_code == 0
    assert dump(back) == before == dump(old)

    again = run(old, url)
    assert again.exit_code == 1
    assert "rows already: name an empty database as target" in again.output
    assert dump(back) == before


def test_a_row_that_the_target_does_not_take_is_named_and_nothing_is_copied(tmp_path: Path, postgres: Postgres) -> None:
    old, url = tmp_path / "old.sqlite", postgres.url("refused")
    fill(old)
    with sqlite3.connect(old) as connection:
        connection.execute("UPDATE windows SET release = ? WHERE rowid = 700", ("a\0b",))
    done = run(old, url)
    assert done.exit_code == 1
    assert "table windows, between the rows" in done.output and "nothing was copied" in done.output
    with postgres.connect("refused") as rows:
        for name in metadata.tables:
            assert rows.execute(f'SELECT count(*) FROM "{name}"').fetchone() == (0,)  # type: ignore[arg-type]
    with sqlite3.connect(old) as connection:
        connection.execute("UPDATE windows SET release = 'ab' WHERE rowid = 700")
    assert run(old, url).exit_code == 0


@pytest.mark.parametrize("served", ["old", "new"])
def test_what_is_served_is_not_copied(tmp_path: Path, served: str) -> None:
    paths = {name: tmp_path / f"{name}.sqlite" for name in ("old", "new")}
    fill(paths["old"])
    database = Database(paths[served])
    held = lock(database.engine)
    assert held is not None
    done = run(paths["old"], paths["new"])
    assert done.exit_code == 1
    assert f"{served}.sqlite: a `trainer serve` works on it: stop it first" in done.output
    held.close()
    database.close()
    assert run(paths["old"], paths["new"]).exit_code == 0


def test_nobody_adds_a_row_to_the_source_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, refused = tmp_path / "old.sqlite", []
    fill(old)
    from trainer import transfer

    kept = transfer._copy_table

    def meanwhile(*arguments: Any) -> int:
        with sqlite3.connect(old, timeout=0) as other:
            try:
                other.execute("DELETE FROM samples")
            except sqlite3.OperationalError as error:
                refused.append(str(error))
        return kept(*arguments)

    monkeypatch.setattr(transfer, "_copy_table", meanwhile)
    counts = copy(old, tmp_path / "new.sqlite")
    assert set(refused) == {"database is locked"}
    assert counts[samples.name] == counts[judged.name] == ROWS


def test_what_cannot_be_the_source_is_said(tmp_path: Path) -> None:
    missing = run(tmp_path / "missing.sqlite", tmp_path / "new.sqlite")
    assert "missing.sqlite does not exist" in missing.output
    assert not (tmp_path / "missing.sqlite").exists()
    fill(tmp_path / "old.sqlite")
    assert "the same database" in run(tmp_path / "old.sqlite", tmp_path / "." / "old.sqlite").output
    said = run(tmp_path / "old.sqlite", "mysql://me:secret@host/name").output
    assert "this kind of database is not known" in said and "secret" not in said
