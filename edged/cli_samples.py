"""`edged samples recover` and `edged samples verify`: what an operator does about a damaged store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from edged.cli_options import DEFAULT_CONFIG, Config, Json, fail, settings_of


def register(app: typer.Typer) -> None:
    """Add the commands to `edged samples`."""
    app.command("recover")(recover)
    app.command("verify")(verify)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While nobody else works in the folder: a daemon would sweep away what is not yet taken over."""
    import fcntl

    try:
        with (folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        raise fail(f"edged runs with state_dir {folder}: stop it first, for example `systemctl stop edged`") from None


def recover(
    file: Annotated[Path | None, typer.Argument(help="Set-aside database; default: all of them, newest first.")] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Take over what can still be read of a database that was set aside: samples whose pixels are there with the right
    hash, their questions, and language requests. The daemon must be stopped. May be run again. Exit status 1 when something
    is lost."""
    import time

    from edged.store import Store, StoreError
    from edged.store.recover import wanted

    folder = settings_of(config).device.state_dir
    if file is not None and not file.is_file():
        raise fail(f"{file}: no such file; set-aside databases are {folder}/edged.db.broken-*", 2)
    if not folder.is_dir():
        raise fail(f"{folder}: no such folder; the daemon makes it on its first run")
    files = list(wanted(folder, file))
    reports = []
    try:
        with _alone(folder), closing(Store(folder)) as store:
            for each in files:
                reports.append(store.recover(each, time.time()))
    except (StoreError, OSError) as error:
        raise fail(str(error)) from None
    if as_json:
        typer.echo(json.dumps([asdict(report) for report in reports], indent=2))
    for report in reports if not as_json else ():
        states = ", ".join(f"{state} {n}" for state, n in sorted(report.states.items())) or "none"
        typer.echo(f"{report.file}")
        typer.echo(f"  samples recovered: {report.samples} ({states}); already here: {report.already}")
        typer.echo(f"  language requests recovered: {report.requests}")
        for reason, n in sorted(report.lost.items()):
            typer.echo(f"  lost: {n} samples, {reason}")
        if report.damaged:
            typer.echo(f"  lost: {report.damaged} rows or pages of any kind that cannot be read")
    if not files and not as_json:
        typer.echo(f"{folder}: no database was set aside; nothing to do")
    elif not as_json:
        typer.echo("what was set aside stays where it is: delete it when it is no longer needed", err=True)
    if any(report.lost or report.damaged for report in reports):
        raise typer.Exit(1)


def verify(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Read every page of the database and every blob, also while the daemon runs. Exit status 1 when something is wrong."""
    from edged.store import BrokenStore, Store, StoreError

    folder = settings_of(config).device.state_dir
    if not (folder / "edged.db").is_file():
        raise fail(f"{folder}: no edged.db here yet; the daemon makes it on its first run")
    damage, samples, blobs, bad = "", 0, 0, []
    try:
        with closing(Store(folder, check="quick")) as store:
            found = store.verify()
            samples, blobs, bad = found.samples, found.blobs, found.bad_blobs
    except BrokenStore as error:
        damage = str(error)
    except StoreError as error:
        raise fail(str(error)) from None
    if as_json:
        typer.echo(json.dumps({"damage": damage, "samples": samples, "blobs": blobs, "bad_blobs": bad}, indent=2))
    else:
        typer.echo(damage or f"the database is whole: {samples} samples, {blobs} blobs")
        for sha256 in bad:
            typer.echo(
                f"blob {sha256}: gone, or not what its name says; the next start rejects its samples if it is gone"
            )
    if damage or bad:
        raise typer.Exit(1)
