"""What commands on labelled samples share: options, the pool, the classes and the task that are meant, and how it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.terminal import fail, open_database, show

if TYPE_CHECKING:
    from trainer.config import TrainerConfig
    from trainer.core.labels import Task
    from trainer.exchange import Summary
    from trainer.pool import Pool

PROBLEMS_SHOWN = 20
ANY = "*"

Model = Annotated[str, typer.Option(help="The model, as configured under models.NAME.")]
Format = Annotated[str, typer.Option("--format", help="coco, yolo or jsonl.")]
TaskOption = Annotated[str, typer.Option(help="detect, segment, classify or text. Default: what the model is for.")]
Labels = Annotated[
    str, typer.Option(help="Classes, with commas between; * for any. Default: the model's configured ones.")
]
OnlyModel = Annotated[str, typer.Option(help="Only of this model.")]
OnlyDevice = Annotated[str, typer.Option(help="Only of this device.")]
OnlyClass = Annotated[str, typer.Option("--class", help="Only labels that name this class.")]
OnlyKind = Annotated[str, typer.Option(help="Only labels of a person, or of a model.")]
SureMin = Annotated[float, typer.Option(min=0, max=1, help="Only labels at least this sure.")]
SureMax = Annotated[float, typer.Option(min=0, max=1, help="Only labels at most this sure.")]
Limit = Annotated[int, typer.Option(min=1, max=100_000, help="At most this many.")]


def open_pool(settings: TrainerConfig) -> Pool:
    """The pool of this trainer."""
    from trainer.pool import Pool

    return Pool(open_database(settings), settings.pool)


def known_labels(settings: TrainerConfig, model: str, labels: str) -> list[str] | None:
    """The classes that are meant, None: any; ends the program when nobody says."""
    if labels == ANY:
        return None
    if labels:
        return [name.strip() for name in labels.split(",") if name.strip()]
    if model not in settings.models:
        configured = ", ".join(sorted(settings.models)) or "none"
        fail(f"--model {model}: configured are {configured}; add [models.{model}], or give --labels")
    configured_labels: list[str] | None = getattr(settings.models[model], "labels", None)
    return configured_labels and list(configured_labels)


def task_of(settings: TrainerConfig, model: str, task: str, format_: str) -> Task | None:
    """The task that is meant: as given, else what the model is for; None leaves it to the data."""
    from trainer.core.labels import TASKS
    from trainer.exchange import FORMATS

    if format_ not in FORMATS:
        fail(f"--format {format_}: use one of {', '.join(FORMATS)}")
    own = str(settings.models[model].kind) if model in settings.models else ""
    own = "text" if own == "llm" else own
    for name in TASKS:
        if name == (task or own):
            return name
    if task:
        fail(f"--task {task}: use one of {', '.join(TASKS)}")
    return None


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, where that is a terminal; yields what it is told of each step by."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)


def tell(summary: Summary, as_json: bool, more: dict[str, Any]) -> None:
    """Print what was done on standard output, and what was left out on standard error."""
    for problem in summary.named[:PROBLEMS_SHOWN]:
        typer.echo(f"{problem.place}: {problem.reason}", err=True)
    if (left := sum(summary.problems.values()) - PROBLEMS_SHOWN) > 0:
        typer.echo(f"... and {left} more, by kind in the summary; --json names them", err=True)
    result = {**more, **summary.to_dict()}
    if not as_json:
        result.pop("named")
        result = {key: value for key, value in result.items() if value != {}}
    show(result, as_json)
