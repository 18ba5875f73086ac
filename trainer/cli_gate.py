"""`trainer gate`: what the gate said of a release or of a training run, for people and for programs.

A verdict is kept where it was made, in one place each: in a run's metadata.json, and, when it passed, in its release's
release.json.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.terminal import CONFIG, Config, Json, fail, load, show

if TYPE_CHECKING:
    from trainer.config import TrainerConfig

WIDTH = 118  # of a reason's lines

gate_app = typer.Typer(help="What the gate measured, what it allows, and why it refused.", no_args_is_help=True)


@gate_app.command("show")
def gate_show(
    what: Annotated[
        str, typer.Argument(help="A release (name@version), a run's name, or a run's or release's folder.")
    ],
    reasons: Annotated[
        bool, typer.Option("--reasons", help="The reason of every check, also of those passed.")
    ] = False,
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Show a verdict: the reasons first when it refused, then every check with its value, its bound and its outcome."""
    path = find(what, config)
    name, verdict, evaluation = read(path)
    if as_json:
        show({"of": name, "path": str(path), **verdict, "evaluation": evaluation}, as_json=True)
        return
    for line in report(name, verdict, evaluation, reasons):
        typer.echo(line)


def find(what: str, config: Path) -> Path:
    """The release.json or metadata.json that `what` means; the configuration is read only when it is no folder."""
    from trainer.child import METADATA
    from trainer.releases import MANIFEST, Registry, ReleaseError

    folder = Path(what)
    if not folder.is_dir():
        settings = load(config)
        if "@" in what:
            try:
                return Registry(settings.releases).get(what).folder / MANIFEST
            except ReleaseError as error:
                fail(str(error))
        folder = settings.runs / what
        if not folder.is_dir():
            fail(f"{what}: neither a release (name@version), nor a folder, nor a run; runs: {_runs(settings)}")
    # A run's folder holds the candidate's release in a folder of its own.
    found = [folder / name for name in (METADATA, MANIFEST) if (folder / name).is_file()]
    if not found:
        fail(f"{folder} holds neither {METADATA} (of a finished run) nor {MANIFEST} (of a release)")
    return found[0]


def _runs(settings: TrainerConfig) -> str:
    found = sorted(path.name for path in settings.runs.iterdir() if path.is_dir()) if settings.runs.is_dir() else []
    return ", ".join(found[-10:]) or "none yet"


def read(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What the verdict in a file is of, the verdict, and the figures that it judged; ends the program when there is none."""
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        fail(f"{path}: {error}")
    if not isinstance(told, dict) or not isinstance(told.get("evaluation") or {}, dict):
        fail(f"{path}: not what a run or a release writes; it was changed by hand, or is another program's")
    evaluation = dict(told.get("evaluation") or {})
    if "release" in told:
        name, verdict = told["release"], evaluation.pop("gate", None)
    else:
        name, verdict = f"{told.get('target', '?')} (run {path.parent.name})", told.get("gate")
    if verdict is None:
        reason = (
            told.get("reason") or "a first release was packed from a checkpoint, and there was nothing to judge it by"
        )
        fail(f"{name}: no verdict in {path}: {reason}")
    if not _is_verdict(verdict):
        fail(f"{path}: its verdict is damaged: {json.dumps(verdict)[:80]}; run the training again")
    return name, verdict, evaluation


def _is_verdict(verdict: Any) -> bool:
    """Whether it has what `report` shows."""
    if not isinstance(verdict, dict) or not isinstance(verdict.get("checks"), list) or "passed" not in verdict:
        return False
    shown = {"name", "value", "bound", "passed", "reason"}
    return all(isinstance(check, dict) and shown <= check.keys() for check in verdict["checks"])


def report(name: str, verdict: dict[str, Any], evaluation: dict[str, Any], reasons: bool = False) -> list[str]:
    """The verdict as lines of text; `reasons`: of every check, not only of those that refused."""
    checks = verdict["checks"]
    failed = [check for check in checks if not check["passed"]]
    lines = [f"{name}: {'passed' if verdict['passed'] else 'REFUSED'}, {len(failed)} of {len(checks)} checks failed"]
    for check in [*failed, *(check for check in checks if reasons and check["passed"])]:
        lines += textwrap.wrap(f"- {check['name']}: {check['reason']}", WIDTH, subsequent_indent="  ")
    lines += ["", *_table([["check", "value", "bound", "verdict"], *map(_row, checks)])]
    figures = _figures(evaluation)
    return [*lines, "", *_table(figures)] if len(figures) > 1 else lines


def _row(check: dict[str, Any]) -> list[str]:
    outcome = "ok" if check["passed"] else "REFUSED"
    return [check["name"], _cell(check["value"]), _cell(check["bound"]), outcome]


def _figures(evaluation: dict[str, Any]) -> list[list[str]]:
    """The candidate's figures beside those of what it was compared with, one row a holdout and figure."""
    sides = ("candidate", "current", "base")
    holdouts = {name: value for name, value in evaluation.items() if isinstance(value, dict) and "candidate" in value}
    if isinstance(evaluation.get("candidate"), dict):  # a language model has one set
        holdouts = {"": evaluation}
    columns = [side for side in sides if any(isinstance(each.get(side), dict) for each in holdouts.values())]
    rows = [["holdout", "figure", *columns]]
    for holdout, both in holdouts.items():
        told = [both.get(side) or {} for side in columns]
        for figure in dict.fromkeys(name for each in told for name in each):
            values = [each.get(figure) for each in told]
            if any(isinstance(value, int | float) for value in values):
                rows.append([holdout, figure, *map(_cell, values)])
    return rows


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."  # hashes


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
