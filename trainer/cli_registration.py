"""`trainer release registrations`: which server was told of which release, and to try again."""

from __future__ import annotations

import datetime
from typing import Annotated

import typer

from trainer.terminal import ANSWER_S, CONFIG, Config, Json, Wait, fail, load, open_database, order, show

SHOWN_CHARS_MAX = 100  # of an error in the table; --json shows all of it


def registrations(
    state: Annotated[
        str | None, typer.Option(help="Only those in this state, such as `refused` or `still_there`.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Only this server: by the name of its registration.")] = None,
    retry: Annotated[
        str | None,
        typer.Option(help="name@version: tell the servers (--target: one) of it, or of its revocation, now."),
    ] = None,
    config: Config = CONFIG,
    as_json: Json = False,
    wait: Wait = ANSWER_S,
) -> None:
    """Which servers ([[registration]]) were told of which release, with the last error of those that were not."""
    settings = load(config)
    if retry is not None:
        from edged.wire.manifest import ReleaseId

        try:
            release = str(ReleaseId(retry))
        except ValueError as error:
            fail(f"--retry: {error}")
        body = {"release": release, "target": target}
        answer = order(open_database(settings), "registration_retry", body, wait)
        show(answer, as_json)
        return
    from trainer.registration import listing

    with open_database(settings).read() as connection:
        rows = listing(connection, state, target)
    if not as_json:
        keys = ("target", "release", "state", "tries", "status", "updated", "error")
        rows = [{key: row[key] for key in keys} for row in rows]
        for row in rows:
            row["updated"] = f"{datetime.datetime.fromtimestamp(row['updated'], datetime.UTC):%Y-%m-%d %H:%M:%S}"
            row["error"] = row["error"][:SHOWN_CHARS_MAX]
    show(rows, as_json)
