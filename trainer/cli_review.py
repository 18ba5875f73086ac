"""`trainer samples review`: a person accepts, corrects or rejects labels of the pool."""

from __future__ import annotations

import getpass
import time
from pathlib import Path
from typing import Annotated

import typer

from trainer.cli_options import (
    PROBLEMS_SHOWN,
    Labels,
    OnlyClass,
    OnlyDevice,
    OnlyKind,
    SureMax,
    SureMin,
    TaskOption,
    known_labels,
    open_pool,
)
from trainer.terminal import CONFIG, Config, Json, fail, load, show

Who = Annotated[str, typer.Option(help="The person whose word this is. Default: the user's name here.")]


def register(app: typer.Typer) -> None:
    """Add the command to `trainer samples`."""
    app.command("review")(samples_review)


def samples_review(
    out: Annotated[Path | None, typer.Option(help="Write what is to be reviewed into this new folder.")] = None,
    take: Annotated[
        Path | None, typer.Option(help="Take a review back: its folder or review.csv, or Label Studio's JSON export.")
    ] = None,
    accept: Annotated[list[str] | None, typer.Option(help="This label is right; repeatable.")] = None,
    reject: Annotated[list[str] | None, typer.Option(help="This label is wrong; repeatable.")] = None,
    who: Who = "",
    model: Annotated[str, typer.Option(help="With --out: the model.")] = "",
    task: TaskOption = "",
    labels: Labels = "",
    device: OnlyDevice = "",
    label: OnlyClass = "",
    kind: OnlyKind = "",
    confidence_min: SureMin = 0.0,
    confidence_max: SureMax = 1.0,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="With --out: the least sure ones, so many.")] = 100,
    image_url: Annotated[str, typer.Option(help="Where Label Studio finds the pictures.")] = "",
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Write labels for a person to look at (--out), take what he says (--take), or say it here (--accept, --reject)."""
    from trainer.formats.base import FormatError
    from trainer.pool import PoolError, Wanted
    from trainer.review import IMAGE_URL, judge, take_review, write_review

    settings = load(config)
    asked = [out is not None, take is not None, bool(accept or reject)]
    if sum(asked) != 1:
        fail("review: give one of --out FOLDER, --take FILE, and --accept ID or --reject ID")
    name, pool = who or getpass.getuser(), open_pool(settings)
    try:
        if out is not None:
            if not model:
                fail("--out: needs --model")
            known = known_labels(settings, model, labels or ("" if model in settings.models else "*"))
            wanted = Wanted(model, task, device, label, kind, "labelled", confidence_min, confidence_max)
            count = write_review(pool, wanted, out, known or [], limit=limit, image_url=image_url or IMAGE_URL)
            show({"path": str(out), "count": count}, as_json)
        elif take is not None:
            given = known_labels(settings, model, labels) if model or labels else None
            reviewed = take_review(pool, take, name, known=given)
            for problem in reviewed.problems[:PROBLEMS_SHOWN]:
                typer.echo(f"{problem.place}: {problem.reason}", err=True)
            show(reviewed.to_dict() if as_json else {**reviewed.to_dict(), "named": "see above"}, as_json)
            if reviewed.problems and not (reviewed.accepted or reviewed.corrected or reviewed.rejected):
                fail(f"{take}: nothing could be taken: {reviewed.problems[0].reason}")
        else:
            show(judge(pool, accept or [], reject or [], name, time.time()).to_dict(), as_json)
    except (FormatError, PoolError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or settings.pool}: {error.strerror}")
