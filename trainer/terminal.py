"""What every command needs: read the configuration, print a result, end with a clear message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from trainer.config import TrainerConfig
    from trainer.database import Database

Config = Annotated[
    Path, typer.Option("--config", "-c", envvar="TRAINER_CONFIG", help="The trainer's TOML file.", show_default=True)
]


class _Refusals:
    """Whether the command that runs was given --json."""

    as_json = False


def _json(context: typer.Context, value: bool) -> bool:
    _Refusals.as_json = value
    context.call_on_close(lambda: setattr(_Refusals, "as_json", False))
    return value


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.", callback=_json)]
Wait = Annotated[float, typer.Option(help="Seconds to wait for the running `trainer serve` to answer.")]
CONFIG, ANSWER_S = Path("trainer.toml"), 15.0
EXIT_FAILED, EXIT_REFUSED, EXIT_TOO_FEW = 1, 3, 4


def load(path: Path) -> TrainerConfig:
    """The configuration in this file; ends the program with a message when it is wrong."""
    from trainer.config import ConfigError, load_config

    try:
        return load_config(path)
    except ConfigError as error:
        fail(str(error))


def open_database(settings: TrainerConfig) -> Database:
    """The trainer's database, for reading and for orders."""
    from trainer.database import Database, DatabaseError

    try:
        return Database(settings.database_at)
    except (DatabaseError, OSError) as error:
        fail(f"database: {error}")


def configured(settings: TrainerConfig, model: str) -> None:
    """Ends the program with a message when this is no model of ours."""
    from trainer.config import ConfigError

    try:
        settings.any_model(model)
    except ConfigError as error:
        fail(str(error))


def order(database: Database, kind: str, body: dict[str, Any], wait: float) -> dict[str, Any]:
    """Have the running `trainer serve` do something; its answer. Ends the program when there is none, or an error."""
    from trainer.orders import await_answer, place

    answer = await_answer(database, place(database, kind, body), wait)
    if answer is None:
        fail(f"no answer within {wait:.0f} s: is `trainer serve` running? It will carry the order out when it does.")
    if "error" in answer:
        fail(answer["error"])
    return answer


def fail(text: str) -> NoReturn:
    """End the program with a message on standard error; with --json also as JSON on standard output."""
    if _Refusals.as_json:
        typer.echo(json.dumps({"error": text}))
    typer.echo(f"trainer: {text}", err=True)
    raise typer.Exit(EXIT_FAILED)


def show(value: Any, as_json: bool) -> None:
    """Print a result: JSON, lines of `key: value`, or a table of a list's rows."""
    if as_json:
        typer.echo(json.dumps(value, indent=2, default=str))
    elif isinstance(value, dict):
        for key, each in value.items():
            typer.echo(f"{key}: {each}")
    else:
        _print_table(value, typer.echo)


def _print_table(rows: list[dict[str, Any]], echo: Callable[[str], None]) -> None:
    if not rows:
        echo("nothing yet")
        return
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
