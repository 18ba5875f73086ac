"""`trainer rollout start|pause|resume|promote|abort|status`: what an operator says to a rollout, and how far it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.terminal import ANSWER_S, CONFIG, Config, Json, Wait, fail, load, open_database, order, show

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trainer.config import TrainerConfig
    from trainer.database import Database

REFRESH_S = 1.0
_ENDED = ("done", "aborted")
_NEEDS_A_PERSON = ("held", "paused")

rollout_app = typer.Typer(help="Bring a release to the fleet: canary first, then everybody.", no_args_is_help=True)

Which = Annotated[
    str,
    typer.Argument(metavar="ROLLOUT", help="Its id, or the release or the model that it brings; see `rollout status`."),
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Show how it goes until it ends or waits for a person.")]


@rollout_app.command("start")
def start(
    release: Annotated[str, typer.Argument(help="name@version, registered")],
    unjudged: Annotated[
        str, typer.Option(help="Why a release that no gate has judged shall go out all the same.")
    ] = "",
    config: Config = CONFIG, as_json: Json = False, wait: Wait = ANSWER_S, follow: Follow = False,
) -> None:  # fmt: skip
    """Bring a release to its fleet: step by step, each watched against the others, then everybody."""
    settings = load(config)
    answer = order(open_database(settings), "rollout_start", {"release": release, "unjudged": unjudged}, wait)
    if follow:
        _follow(settings, answer["rollout"], as_json)
    else:
        show(answer, as_json)


@rollout_app.command("pause")
def pause(rollout: Which, config: Config = CONFIG, as_json: Json = False, wait: Wait = ANSWER_S) -> None:
    """Nobody else is given the release and no watch ends; what fails or is surely worse goes back all the same."""
    _say("rollout_pause", rollout, load(config), wait, as_json)


@rollout_app.command("resume")
def resume(rollout: Which, config: Config = CONFIG, as_json: Json = False, wait: Wait = ANSWER_S) -> None:
    """Go on where it was paused; one that is held is watched once more."""
    _say("rollout_resume", rollout, load(config), wait, as_json)


@rollout_app.command("promote")
def promote(rollout: Which, config: Config = CONFIG, as_json: Json = False, wait: Wait = ANSWER_S) -> None:
    """Go on to everybody on your own judgement, when a rollout is held or being watched."""
    _say("rollout_promote", rollout, load(config), wait, as_json)


@rollout_app.command("abort")
def abort(rollout: Which, config: Config = CONFIG, as_json: Json = False, wait: Wait = ANSWER_S) -> None:
    """Give every device its previous release back."""
    _say("rollout_abort", rollout, load(config), wait, as_json)


@rollout_app.command("status")
def status(
    rollout: Annotated[
        str, typer.Argument(metavar="[ROLLOUT]", help="Only this one: id, release or model; with what it is judged by.")
    ] = "",
    config: Config = CONFIG, as_json: Json = False, follow: Follow = False,
) -> None:  # fmt: skip
    """Rollouts and the training jobs that they came from, newest first."""
    settings = load(config)
    if follow:
        _follow(settings, rollout, as_json)
        return
    if rollout:
        chosen = _one(open_database(settings), rollout)
        if as_json:
            show(chosen, as_json)
        else:
            _print(chosen)
        return
    rolled, trained = _read(settings)
    if as_json:
        show({"rollouts": rolled, "jobs": trained}, as_json)
    else:
        keys = ("rollout_id", "release", "status", "step", "progress", "canary_result", "reason")
        show([{key: row[key] for key in keys} for row in rolled], as_json=False)
        job_keys = ("job_id", "target_model", "status", "detail")
        show([{key: row[key] for key in job_keys} for row in trained], as_json=False)


def _say(kind: str, name: str, settings: TrainerConfig, wait: float, as_json: bool) -> None:
    """Say something to the rollout that is meant now: carried out late, it must not hit another one."""
    from trainer.rollouts import find_rollout, no_rollout

    database = open_database(settings)
    with database.read() as connection:
        row = find_rollout(connection, name)
        if row is None:
            fail(no_rollout(connection, name))
    show(order(database, kind, {"rollout": row.id}, wait), as_json)


def _read(settings: TrainerConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from sqlalchemy import select

    from trainer.database import jobs, rollouts
    from trainer.rollouts import Known, progress
    from trainer.status import job_status

    with open_database(settings).read() as connection:
        rolled = connection.execute(select(rollouts).order_by(rollouts.c.created.desc())).all()
        trained = connection.execute(select(jobs).order_by(jobs.c.created.desc())).all()
        known: Known = {}
        return (
            [progress(connection, row, known) for row in rolled],
            [job_status(connection, settings, row) for row in trained],
        )


def _one(database: Database, name: str) -> dict[str, Any]:
    """The rollout of this id, else the newest of this release or model, or of all for ""; no other is read."""
    from sqlalchemy import select, true

    from trainer.database import rollouts
    from trainer.rollouts import progress

    table = rollouts.c
    named = (table.release == name) | (table.model == name) if name else true()
    with database.read() as connection:
        row = connection.execute(select(rollouts).where(table.id == name)).first()
        if row is None:
            row = connection.execute(select(rollouts).where(named).order_by(table.created.desc()).limit(1)).first()
        if row is None:
            fail(f"rollout {name!r} does not exist; `trainer rollout status` lists them")
        return progress(connection, row)


def _follow(settings: TrainerConfig, name: str, as_json: bool) -> None:
    """Show it until it ends or waits for a person; in a terminal in place, else a line each time that it changes.
    With JSON a line each time."""
    import json
    import sys

    from rich.console import Console
    from rich.live import Live

    shown, live, database = "", None, open_database(settings)
    if sys.stdout.isatty() and not as_json:
        live = Live(console=Console(highlight=False), auto_refresh=False)
        live.start()
    try:
        while True:
            row = _one(database, name)
            text = json.dumps(row, default=str) if as_json else _line(row)
            if live is not None:
                live.update(_picture(row, time.time()), refresh=True)
            elif text != shown:
                shown = text
                typer.echo(text)
            if row["status"] in _ENDED or row["status"] in _NEEDS_A_PERSON:
                return
            time.sleep(REFRESH_S)
    finally:
        if live is not None:
            live.stop()


def _line(row: dict[str, Any]) -> str:
    return f"{row['release']} {row['status']} step {row['step']} {row['progress']}: {row['reason']}"


def _print(row: dict[str, Any]) -> None:
    from rich.console import Console

    Console(highlight=False).print(_picture(row, time.time()))


def _picture(row: dict[str, Any], now: float) -> RenderableType:
    """One rollout: how far, for how long still, and each thing that it is judged by."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text(f"{row['release']}  {row['status']}  step {row['step']}  rollout {row['rollout_id']}")]
    parts += [ProgressBar(total=row["devices"], completed=len(row["running"]), width=40)]
    parts += [Text(f"{row['progress']} run it, {row['told']} were told; canary: {row['canary_result']}")]
    if row["status"] == "watching":
        left = max(0.0, row["watch_until"] - now)
        parts += [Text(f"the watch ends in {left:.0f} s; extended {row['extended']} times")]
    parts += [Text(row["reason"])] if row["reason"] else []
    parts += [Text(f"away: {', '.join(row['away'])}")] if row["away"] else []
    parts += [Text(f"too late: {', '.join(row['stalled'])}")] if row["stalled"] else []
    judged = row["judged"]
    if judged.get("findings"):
        table = Table(box=None, pad_edge=False)
        for name in ("judged by", "", "change for the worse", "±", "evidence to one"):
            table.add_column(name)
        for each in judged["findings"]:
            numbers = ["" if each[key] is None else f"{each[key]:.3g}" for key in ("change", "error", "odds")]
            table.add_row(each["measure"], each["verdict"], *numbers)
        parts += [table, Text(f"{judged['audited']} audited answers of canaries")]
    return Group(*parts)
