"""`edged rollback|pin|unpin`, `edged models forget`: a person's word about a slot, to the daemon or for its next start."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from edged.cli_options import DEFAULT_CONFIG, Config, fail, settings_of

WAIT_S = 60.0  # for a daemon that takes the order, and for a rollback to be over
POLL_S = 0.1

Slot = Annotated[str, typer.Argument(help="Slot, as `edged status` names it.")]
Adapter = Annotated[bool, typer.Option("--adapter", help="The LoRA adapter in the slot instead of its model.")]
Release = Annotated[str, typer.Argument(help="name@version, as `edged status` and `edged models list` show it.")]


def register(app: typer.Typer, models_app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(rollback)
    app.command()(pin)
    app.command()(unpin)
    models_app.command("forget")(forget)


def rollback(slot: Slot, adapter: Adapter = False, config: Config = DEFAULT_CONFIG) -> None:
    """Let the release before serve again, at once and without the network.

    The one that leaves is not installed again before the fleet desires another one, or `edged unpin SLOT`."""
    _order(config, "rollback", {"slot": slot, "adapter": adapter}, f"{slot}: the release before serves again")


def pin(
    slot: Slot,
    release: Annotated[str | None, typer.Argument(help="A release on this device; none: the one that serves.")] = None,
    adapter: Adapter = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Keep a slot on one release, whatever the fleet desires, until `edged unpin SLOT`."""
    body: dict[str, Any] = {"slot": slot, "adapter": adapter}
    if release is not None:
        body["release"] = _here(config, release)
    _order(config, "pin", body, f"{slot}: pinned{f' to {release}' if release else ''}")


def unpin(slot: Slot, adapter: Adapter = False, config: Config = DEFAULT_CONFIG) -> None:
    """Let the fleet decide about a slot again, after `edged pin` or `edged rollback`."""
    _order(config, "unpin", {"slot": slot, "adapter": adapter}, f"{slot}: the fleet decides")


def forget(release: Release, config: Config = DEFAULT_CONFIG) -> None:
    """Forget what is known against a release that failed here: it may be tried again."""
    _order(config, "forget", {"release": release}, f"{release}: may be tried again")


def _here(config: Path, release: str) -> dict[str, str]:
    """The reference of a release on this device's disk."""
    from edged.releases import BadRelease, Releases, reference

    known = []
    for folder in Releases(settings_of(config).device.state_dir / "releases").candidates():
        try:
            known.append(reference(folder))
        except BadRelease:
            continue  # `edged models list` says what is wrong with it
    for ref in known:
        if ref.release == release:
            return ref.model_dump(mode="json")
    names = ", ".join(sorted(ref.release for ref in known)) or "none"
    raise fail(f"{release} is not on this device; here are: {names}. `trainer fleet pin` brings another one.")


def _order(config: Path, kind: str, body: dict[str, Any], success: str) -> None:
    import os

    from edged import orders
    from edged.status_socket import ask_status
    from edged.wire.ids import uuid7

    state = settings_of(config).device.state_dir
    order_id = orders.LOCAL + uuid7(int(time.time() * 1000), os.urandom(10))
    try:
        orders.place(state, order_id, kind, body)
    except FileNotFoundError:
        raise fail(f"{state}: edged has never run here: start it with `edged run --config {config}`") from None
    except OSError as error:
        raise fail(f"{state}: {error.strerror}; run this as root, or as the user that runs edged") from None
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        status = ask_status(state)
        if status is None and orders.waits(state, order_id):
            typer.echo("no edged runs here: it will do this when it starts")
            return
        answer = ((status or {}).get("orders") or {}).get(order_id, {})
        if answer.get("state") == "failed":
            raise fail(answer["reason"])
        if answer.get("state") == "done":
            typer.echo(success)
            return
        time.sleep(POLL_S)
    raise fail(f"not done within {WAIT_S:.0f} s; `edged status` shows how it goes on")
