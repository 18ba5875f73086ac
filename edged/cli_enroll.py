"""`edged enroll`: the bundle that the trainer's host made becomes this machine's identity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edged.cli_options import DEFAULT_CONFIG, Config, fail


def register(app: typer.Typer) -> None:
    """Add the command to `edged`."""
    app.command("enroll")(enroll)


def enroll(
    bundle: Annotated[Path, typer.Argument(help="The file that `trainer enroll` made.")],
    config: Config = DEFAULT_CONFIG,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="A bundle without a TUF root will do.")] = False,
    user: Annotated[str | None, typer.Option(help="Who runs edged and reads the keys; by default `edged`.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it and say what would change.")] = False,
) -> None:
    """Make this machine the device that a bundle is for: check it, install its certificates and keys, set the configuration.

    Everything else in the configuration stays. Again: nothing changes.
    """
    from edged import enroll as enrolling

    try:
        plan = enrolling.plan(bundle, config, unsigned=unsigned)
        for line in plan.changes():
            typer.echo(line)
        if dry_run:
            typer.echo(f"{bundle} is good for {plan.bundle.device}; nothing was written")
            return
        enrolling.carry_out(plan, user)
    except enrolling.CannotEnroll as error:
        raise fail(str(error)) from None
    except OSError as error:
        raise fail(f"{error.filename or config}: {error.strerror}; be root, or the owner of {config}") from None
    typer.echo(
        f"{config}: this is {plan.bundle.device} at {plan.bundle.site}, keys in {plan.folder}\n"
        f"next: `edged check -c {config}`, restart edged, and delete {bundle}: it holds the keys"
    )
