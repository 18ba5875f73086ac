"""`trainer samples pull`: pixels of chosen samples from the devices into the pool, without a training."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.cli_options import PROBLEMS_SHOWN, OnlyClass, OnlyDevice, OnlyModel, SureMax, SureMin, progress
from trainer.terminal import ANSWER_S, CONFIG, Config, Json, fail, load, open_database, order, show

if TYPE_CHECKING:
    from trainer.database import Database

LOOK_S = 0.25


def register(app: typer.Typer) -> None:
    """Add the command to `trainer samples`."""
    app.command("pull")(samples_pull)


def samples_pull(
    ids: Annotated[list[str] | None, typer.Argument(help="Samples, as `trainer samples list` names them.")] = None,
    model: OnlyModel = "",
    device: OnlyDevice = "",
    label: OnlyClass = "",
    confidence_min: SureMin = 0.0,
    confidence_max: SureMax = 1.0,
    limit: Annotated[int, typer.Option(min=1, max=5000, help="At most this many, the newest.")] = 100,
    seconds: Annotated[float, typer.Option(min=1, help="How long the devices may take.")] = 3600.0,
    wait: Annotated[bool, typer.Option(help="Wait for the end; else it goes on in `trainer serve`.")] = True,
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Have the running `trainer serve` fetch labelled samples from the devices into the pool, and keep them there.

    Samples by id, or the newest labelled ones that the options mean. The devices keep theirs. Status 1: not all came.
    """
    from trainer.fleet import find_samples

    settings = load(config)
    database = open_database(settings)
    wanted = list(ids or [])
    if not wanted:
        if not (model or device or label):
            fail("which ones? Give ids (`trainer samples list` shows them), or --model, --device or --class")
        with database.read() as connection:
            found = find_samples(
                connection, model=model, state="labelled", device=device, label=label, confidence_min=confidence_min,
                confidence_max=confidence_max, limit=limit,
            )  # fmt: skip
        wanted = [row["id"] for row in found if row["job"] is None]
        if not wanted:
            fail("no device has told of a labelled sample like that; see `trainer samples counts`")
    answer = order(database, "pull", {"samples": wanted, "seconds": seconds}, ANSWER_S)
    if not wait:
        show(answer, as_json)
        return
    row = _follow(database, answer["pull"], answer["samples"], seconds + ANSWER_S)
    for key, reason in list(row["missing"].items())[:PROBLEMS_SHOWN]:
        typer.echo(f"{key}: {reason}", err=True)
    result: dict[str, Any] = {"pull": row["id"], "state": row["state"], "here": len(row["here"])}
    show({**result, "missing": row["missing"] if as_json else len(row["missing"])}, as_json)
    if row["missing"] or row["state"] != "done":
        raise typer.Exit(1)


def _follow(database: Database, pull: str, count: int, seconds: float) -> dict[str, Any]:
    """Show how far a pull is until it has ended, or for these seconds; its row."""
    from sqlalchemy import select

    from trainer.database import pulls

    deadline, shown = time.monotonic() + seconds, 0
    with progress(pull, count) as step:
        while True:
            with database.read() as connection:
                row = dict(connection.execute(select(pulls).where(pulls.c.id == pull)).one()._mapping)
            done = len(row["here"]) + len(row["missing"])
            step(done - shown)
            shown = done
            if row["state"] == "done" or time.monotonic() > deadline:
                return row
            time.sleep(LOOK_S)
