"""`trainer fleet remove|readmit`: an operator takes a device out of the fleet for good, or back."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from trainer.terminal import ANSWER_S, CONFIG, Config, Json, Wait, fail, load, open_database, order, show


def register(fleet_app: typer.Typer) -> None:
    """Add the commands."""
    fleet_app.command("remove")(fleet_remove)
    fleet_app.command("readmit")(fleet_readmit)


def fleet_remove(
    device: Annotated[str, typer.Argument(help="The device, as `trainer fleet status` names it.")],
    reason: Annotated[str, typer.Option(help="Kept with it.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: Config = CONFIG,
    as_json: Json = False,
    wait: Wait = ANSWER_S,
) -> None:
    """Take a device out for good: no rollout, trigger or list has it, and what it still sends is dropped.

    Its samples and what it measured stay. It keeps its certificate: `trainer revoke` takes that.
    """
    settings = load(config)
    if not yes:
        if as_json or not sys.stdin.isatty():
            fail(f"{device} is removed only with --yes where nobody can be asked")
        typer.confirm(f"Take {device} out of the fleet?", abort=True, err=True)
    answer = order(open_database(settings), "remove", {"device": device, "reason": reason}, wait)
    show(answer, as_json)
    if answer["may_connect"]:
        typer.echo(f"{device} may still connect: `trainer revoke {device}` takes its certificates back", err=True)


def fleet_readmit(
    device: Annotated[str, typer.Argument(help="The device, as `trainer fleet status --removed` names it.")],
    config: Config = CONFIG,
    as_json: Json = False,
    wait: Wait = ANSWER_S,
) -> None:
    """Take a removed device back: what was known of it counts again, and what it says from now on.

    A revoked one needs new certificates too: `trainer enroll DEVICE --renew`.
    """
    show(order(open_database(load(config)), "readmit", {"device": device}, wait), as_json)
