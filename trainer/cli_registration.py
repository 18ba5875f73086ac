"""`trainer release registrations`: which server was told of which release, and to try again."""

from __future__ import annotations

import datetime
from typing import Annotated

import typer

from trainer.terminal import CONFIG, Config, Json, fail, load, open_database, show

ANSWER_S = 15.0
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
    wait: Annotated[float, typer.Option(help="Seconds to wait for the running `trainer serve` to answer.")] = ANSWER_S,
) -> None:
    """Which servers ([[registration]]) were told of which release, with the last error of those that were not."""
    settings = load(config)
    if retry is not None:
        from edged.wire.manifest import ReleaseId
        from trainer.orders import await_answer, place

        try:
            release = str(ReleaseId(retry))
        except ValueError as error:
            fail(f"--retry: {error}")
        database = open_database(settings)
        order = place(database, "registration_retry", {"release": release, "target": target})
        answer = await_answer(database, order, wait)
        if answer is None:
            fail(f"no answer within {wait:.0f} s: is `trainer serve` running? It will send it when it does.")
        if "error" in answer:
            fail(answer["error"])
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
