"""`trainer db copy`: the fleet's rows from one database to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.terminal import Json, fail, show

db_app = typer.Typer(help="The database that holds the fleet's rows.", no_args_is_help=True)


@db_app.callback()
def _group() -> None:
    """A group with one command is still a group."""


@db_app.command("copy")
def copy(
    source: Annotated[str, typer.Argument(help="What has the rows: a SQLite file, or postgresql://user@host/name.")],
    target: Annotated[str, typer.Argument(help="An empty database, named in the same way.")],
    as_json: Json = False,
) -> None:
    """Copy every row from one database into another, empty one, from SQLite to PostgreSQL or back; all rows or none.

    Stop `trainer serve` before, and set `database.url` to the target afterwards. A password is better in PGPASSWORD or in
    ~/.pgpass than in the URL: others on this machine see what a command is called with.
    """
    from trainer.database import DatabaseError
    from trainer.transfer import copy as copy_rows

    try:
        counts = copy_rows(_where(source), _where(target))
    except (DatabaseError, OSError) as error:
        fail(str(error))
    if as_json:
        show(counts, as_json)
        return
    show([{"table": name, "rows": count} for name, count in counts.items()], as_json=False)
    typer.echo(f"\n{sum(counts.values())} rows copied and read back; the source is as it was")


def _where(text: str) -> Path | str:
    from pydantic import ValidationError

    from trainer.config_fleet import DatabaseAt

    if "://" not in text:
        return Path(text).resolve()
    try:
        return DatabaseAt.model_validate({"url": text}).where(Path())
    except ValidationError:  # its text may hold the password
        fail("this kind of database is not known: use postgresql://user@host/name, or the path of a SQLite file")
