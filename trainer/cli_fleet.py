"""`trainer fleet status|label` and `trainer jobs`: who is there, what they are called, and what was trained."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.terminal import ANSWER_S, CONFIG, Config, Json, Wait, configured, fail, load, open_database, order, show

if TYPE_CHECKING:
    from trainer.config import TrainerConfig

JOBS_SHOWN = 20


def register(app: typer.Typer, fleet_app: typer.Typer) -> None:
    """Add the commands."""
    fleet_app.command("status")(fleet_status)
    fleet_app.command("label")(fleet_label)
    app.command("jobs")(jobs)


def fleet_status(
    selector: Annotated[
        str, typer.Option("--selector", "-l", help="Devices, as site=plant1,profile!=pi4,line in (a,b). Default: all.")
    ] = "",
    removed: Annotated[bool, typer.Option("--removed", help="Those that were taken out, and when and why.")] = False,
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Every device that was ever seen, what it is called, and what it runs; on standard error what cannot go on."""
    import time

    from trainer.core.presence import lately
    from trainer.core.selectors import BadSelector
    from trainer.inventory import fleet
    from trainer.status import faults
    from trainer.status import fleet_status as rows_of

    settings = load(config)
    if removed:
        _show_removed(settings, as_json)
        return
    with open_database(settings).read() as connection:
        try:
            heard = lately(time.time(), settings.silent_s_max)
            rows = fleet(connection, rows_of(connection, heard), settings.site, selector)
        except BadSelector as error:
            fail(str(error))
        for text in faults(connection, time.time()):
            typer.echo(text, err=True)
    if as_json:
        show(rows, as_json)
        return
    own = ("device", "site", "profile", "tier")
    flat = [
        {
            "device": row["device"],
            "online": "revoked" if row["revoked"] else "silent" if row["silent"] else row["online"],
            "tier": row["tier"],
            "profile": row["profile"],
            "labels": ",".join(f"{key}={value}" for key, value in row["labels"].items() if key not in own),
            "slot": slot,
            "active": report.get("active"),
            "adapter": report.get("adapter"),
            "update": report.get("update"),
            "pinned": report.get("pinned"),
        }
        for row in rows
        for slot, report in (row["models"] or {"": {}}).items()
    ]
    show(flat, as_json=False)


def _show_removed(settings: TrainerConfig, as_json: bool) -> None:
    from trainer.removed import listed

    with open_database(settings).read() as connection:
        rows = listed(connection)
    if not as_json:
        rows = [{**row, "removed_at": datetime.datetime.fromtimestamp(row["removed_at"]).isoformat(" ", "seconds")}
                for row in rows]  # fmt: skip
    show(rows, as_json)


def fleet_label(
    device: Annotated[str, typer.Argument(help="The device, as `trainer fleet status` names it.")],
    labels: Annotated[list[str], typer.Argument(help="KEY=VALUE, or KEY- to take it away; several.")],
    config: Config = CONFIG,
    as_json: Json = False,
    wait: Wait = ANSWER_S,
) -> None:
    """Call a device by labels; they go before what the device says of itself."""
    from trainer.core.selectors import BadLabel, parse_label

    settings = load(config)
    try:
        changes = dict(map(parse_label, labels))
    except BadLabel as error:
        fail(str(error))
    answer = order(open_database(settings), "label", {"device": device, "labels": changes}, wait)
    show(answer, as_json)


def jobs(
    model: Annotated[str, typer.Option(help="Only this model.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most this many, the newest.")] = JOBS_SHOWN,
    long: Annotated[bool, typer.Option("--long", help="With --json: all that is known of each.")] = False,
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Training jobs, newest first, and how far what they made is on its way to the fleet."""
    from sqlalchemy import select

    from trainer.database import jobs as table
    from trainer.status import job_status, promised

    settings = load(config)
    query = select(table).order_by(table.c.created.desc()).limit(limit)
    with open_database(settings).read() as connection:
        found = connection.execute(query.where(table.c.model == model) if model else query).all()
        if model and not found:
            configured(settings, model)
        rows = [job_status(connection, settings, row) for row in found]
    if as_json:
        show(rows if long else [promised(row) for row in rows], as_json)
        return
    show(
        [
            {
                "job_id": row["job_id"],
                "target": row["target_model"],
                "status": row["status"],
                "accuracy": row["metrics"]["accuracy"],
                "improvement": row["metrics"]["improvement"],
                "samples": row["metrics"]["samples_used"],
                "minutes": row["metrics"]["training_time_minutes"],
                "deployment": row["deployment"]["status"],
                "progress": row["deployment"]["progress"],
                "detail": row["detail"],
            }
            for row in rows
        ],
        as_json=False,
    )
