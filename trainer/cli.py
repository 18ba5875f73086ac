"""The command line `trainer`: parses, calls the library, prints. Imports nothing heavy before a command needs it."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Annotated

import typer

from trainer import (
    cli_archive,
    cli_drift,
    cli_enroll,
    cli_export,
    cli_fleet,
    cli_hands,
    cli_pull,
    cli_ready,
    cli_remove,
    cli_report,
    cli_review,
    cli_samples,
    cli_simulate,
    cli_tools,
    cli_train,
    cli_virtual,
    cli_worker,
)
from trainer.cli_db import db_app
from trainer.cli_gate import gate_app
from trainer.cli_holdout import holdout_app
from trainer.cli_keys import keys_app
from trainer.cli_release import release_app
from trainer.cli_rollout import rollout_app
from trainer.terminal import ANSWER_S, CONFIG, Config, Json, Wait, fail, load, open_database, order, show

app = typer.Typer(
    name="trainer",
    help="Collects what devices are unsure about, fine-tunes, judges and releases models, and rolls them out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
fleet_app = typer.Typer(help="The devices: what they run, and what they shall run.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(release_app, name="release")
app.add_typer(gate_app, name="gate")
app.add_typer(rollout_app, name="rollout")
app.add_typer(fleet_app, name="fleet")
app.add_typer(cli_samples.samples_app, name="samples")
app.add_typer(holdout_app, name="holdout")
app.add_typer(db_app, name="db")
app.add_typer(cli_enroll.app)
cli_hands.register(fleet_app)
cli_fleet.register(app, fleet_app)
cli_tools.register(app)
cli_drift.register(fleet_app)
cli_remove.register(fleet_app)
cli_review.register(cli_samples.samples_app)
cli_pull.register(cli_samples.samples_app)
cli_archive.register(cli_samples.samples_app)
cli_report.register(cli_samples.samples_app)
app.command()(cli_train.train)
app.command()(cli_ready.ready)
app.command()(cli_worker.worker)
cli_export.register(app)
cli_virtual.register(app)
cli_simulate.register(app)


@app.command()
def serve(config: Config = CONFIG, verbose: Annotated[bool, typer.Option("--verbose", "-v")] = False) -> None:
    """Run the trainer: take in what devices say, train when enough new samples are labelled, roll out what passes."""
    settings = load(config)
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    from edged.link import BadCredentials
    from trainer.config import ConfigError
    from trainer.coordinator import Coordinator
    from trainer.database import DatabaseError

    try:
        coordinator = Coordinator(settings, config)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: coordinator.stop())
        coordinator.run()
    except (BadCredentials, ConfigError, DatabaseError, OSError) as error:
        fail(str(error))


@fleet_app.command("set")
def fleet_set(
    device: Annotated[str, typer.Argument(help="The device, as `trainer fleet status` names it.")],
    model: Annotated[list[str] | None, typer.Option(help="SLOT=NAME@VERSION, or NAME@VERSION; repeatable.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="SLOT=NAME@VERSION, or SLOT= for no adapter; repeatable.")
    ] = None,
    config: Config = CONFIG,
    as_json: Json = False,
    wait: Wait = ANSWER_S,
) -> None:
    """Tell one device what to run, without canary and watch."""
    from edged.wire.manifest import ReleaseId

    models: dict[str, str] = {}
    adapters: dict[str, str | None] = {}
    for text in model or []:
        slot, _, release = text.rpartition("=")
        try:
            models[slot or ReleaseId(release).name] = release
        except ValueError as error:
            fail(f"--model {text}: {error}")
    for text in adapter or []:
        slot, found, release = text.partition("=")
        if not found or not slot:
            fail(f"--adapter {text}: use SLOT=NAME@VERSION, or SLOT= for no adapter")
        adapters[slot] = release or None
    if not models and not adapters:
        fail("nothing to set: use --model or --adapter")
    answer = order(
        open_database(load(config)), "desire", {"device": device, "models": models, "adapters": adapters}, wait
    )
    show(answer, as_json)


def main() -> None:
    """Entry point."""
    app()
