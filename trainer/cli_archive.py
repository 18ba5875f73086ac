"""`trainer samples archive`: samples that have trained a release are done with, and their devices are told so."""

from __future__ import annotations

from typing import Annotated

import typer

from trainer.cli_options import OnlyDevice, OnlyModel
from trainer.terminal import CONFIG, Config, Json, fail, load, open_database, show

ANSWER_S = 15.0


def register(app: typer.Typer) -> None:
    """Add the command to `trainer samples`."""
    app.command("archive")(samples_archive)


def samples_archive(
    ids: Annotated[list[str] | None, typer.Argument(help="Samples, as `trainer samples list` names them.")] = None,
    model: OnlyModel = "",
    release: Annotated[str, typer.Option(help="Only what trained this release, name@version.")] = "",
    device: OnlyDevice = "",
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Have devices archive samples that are `used`; others are refused. How long they keep them then is theirs (`age_days`).

    The running `trainer serve` tells the devices; a sample counts as archived when its device has said so.
    """
    from trainer.orders import await_answer, place

    if not (ids or model or release or device):
        fail("which ones? Give ids (`trainer samples list --state used` shows them), --model, --release or --device")
    database = open_database(load(config))
    body = {"ids": list(ids or []), "model": model, "release": release, "device": device}
    answer = await_answer(database, place(database, "archive", body), ANSWER_S)
    if answer is None:
        fail(
            f"no answer within {ANSWER_S:.0f} s: is `trainer serve` running? It will carry the order out when it does."
        )
    if "error" in answer:
        fail(answer["error"])
    show(answer, as_json)
