"""The same test on SQLite and on PostgreSQL: `pytestmark = pytest.mark.usefixtures("each_database")`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.support.postgres import Postgres, programs
from trainer import dialects
from trainer.database import Database

_numbers = itertools.count()
_made = dialects.engine


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL with the database `made`, which has the tables."""
    if programs() is None:
        pytest.skip("no PostgreSQL here: packaging/setup.sh tests installs Debian's")
    with Postgres() as server:
        Database(server.url("made").replace("postgresql:", "postgresql+psycopg:")).close()
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def each_database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With `postgresql` every path of a SQLite file stands for a database of its own in a real PostgreSQL."""
    if request.param == "sqlite":
        yield "sqlite"
        return
    server: Postgres = request.getfixturevalue("postgres")
    names: dict[Path, tuple[str, str]] = {}
    engines: list[Engine] = []

    def engine(where: Path | str) -> Engine:
        if isinstance(where, Path):
            if where not in names:
                name = f"t{next(_numbers)}"
                names[where] = name, server.url(name, "made").replace("postgresql:", "postgresql+psycopg:")
            where = names[where][1]
        engines.append(_made(where))
        return engines[-1]

    monkeypatch.setattr(dialects, "engine", engine)
    yield "postgresql"
    for each in engines:
        each.dispose()
    for name, _ in names.values():
        server.drop(name)
