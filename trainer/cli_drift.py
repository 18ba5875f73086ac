"""`trainer fleet drift`: how releases do on the live stream, and what has been found to change there."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from trainer.terminal import CONFIG, Config, Json, configured, fail, load, open_database, show


def register(fleet_app: typer.Typer) -> None:
    """Add the command."""
    fleet_app.command("drift")(drift)


def drift(
    model: Annotated[str, typer.Option(help="Only this model.")] = "",
    group_by: Annotated[
        list[str] | None,
        typer.Option(
            help="A label, as `site` or `line`: figures for each of its values. Repeatable; default: as configured."
        ),
    ] = None,
    selector: Annotated[
        str, typer.Option("--selector", "-l", help="Figures of these devices only, as site=plant1,line in (a,b).")
    ] = "",
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Live accuracy of each release with its 95 % interval, the last look at each stream, and the drift that was found.

    Reads only: the looks are taken by `trainer serve`, as the table `drift` of the configuration says.
    """
    from trainer.core.selectors import BadSelector
    from trainer.drift import report
    from trainer.host import Host
    from trainer.releases import Registry, ReleaseError

    settings = load(config)
    try:
        host = Host(settings, config.resolve(), open_database(settings), Registry(settings.releases))
        found = report(host, model, group_by=group_by, selector=selector)
    except (BadSelector, ReleaseError, OSError) as error:
        fail(str(error))
    if model and not any(found[key] for key in ("releases", "looks", "detections")):
        configured(settings, model)
    if as_json:
        show(found, as_json)
        return
    show([row for each in found["releases"] for row in _figures(each)], as_json=False)
    typer.echo("")
    show([row for each in found["looks"] for row in _look(each)], as_json=False)
    typer.echo("")
    show([{"found": _when(each["found_at"]), "rule": each["rule"], "text": each["text"]} for each in found["detections"]],
         as_json=False)  # fmt: skip
    due = found["next_look"]
    typer.echo(f"\nnext look: {_when(due) if due else 'never: nothing to look at yet, or drift.enabled = false'}")


def _figures(release: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [("fleet", release["fleet"])]
    parts += [*release["groups"].items(), *release["devices"].items()]
    return [
        {
            "release": release["release"],
            "of": name,
            "items": part["items"],
            "escalated": _share(part["escalation_rate"]),
            "accuracy": _share(part["accuracy"]["value"]),
            "95 % interval": f"{part['accuracy']['low']:.3f} - {part['accuracy']['high']:.3f}",
            "audits": part["accuracy"]["accepted"]["checked"],
            "answered": part["accuracy"]["escalated"]["checked"],
        }
        for name, part in parts
    ]


def _look(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"release": row["release"], "of": row["scope"] or "fleet", "looked": _when(row["at"]), "rule": each["rule"],
         "drift": each["found"], "text": each["text"]}
        for each in row["found"]
    ]  # fmt: skip


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
