"""`trainer fleet rollback|pin|unpin|forget`: a person's word about one slot of one device, passed on by `trainer serve`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.terminal import fail, load, open_database, order, show

if TYPE_CHECKING:
    from trainer.config import TrainerConfig

CONFIG = Path("trainer.toml")
WAIT_S = 30.0
POLL_S = 0.2

Config = Annotated[
    Path, typer.Option("--config", "-c", envvar="TRAINER_CONFIG", help="The trainer's TOML file.", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait for `trainer serve`, and then for the device.")]
Device = Annotated[str, typer.Argument(help="The device, as `trainer fleet status` names it.")]
Slot = Annotated[str, typer.Argument(help="The slot, as `trainer fleet status` names it.")]
Adapter = Annotated[bool, typer.Option("--adapter", help="The LoRA adapter in the slot instead of its model.")]


def register(fleet_app: typer.Typer) -> None:
    """Add the commands."""
    for command in (rollback, pin, unpin, forget):
        fleet_app.command()(command)


def rollback(
    device: Device, slot: Slot, adapter: Adapter = False, config: Config = CONFIG, as_json: Json = False,
    wait: Wait = WAIT_S,
) -> None:  # fmt: skip
    """Let the release before serve again on one device. A running rollout counts it as failed there."""
    _pass_on(load(config), "rollback", {"device": device, "slot": slot, "adapter": adapter}, wait, as_json)


def pin(
    device: Device, slot: Slot,
    release: Annotated[str | None, typer.Argument(help="name@version, registered; none: the one that serves.")] = None,
    adapter: Adapter = False, config: Config = CONFIG, as_json: Json = False, wait: Wait = WAIT_S,
) -> None:  # fmt: skip
    """Keep a slot of one device on one release. Rollouts of others pass it by."""
    body = {"device": device, "slot": slot, "adapter": adapter, **({"release": release} if release else {})}
    _pass_on(load(config), "pin", body, wait, as_json)


def unpin(
    device: Device, slot: Slot, adapter: Adapter = False, config: Config = CONFIG, as_json: Json = False,
    wait: Wait = WAIT_S,
) -> None:  # fmt: skip
    """Let desired state count again, after `pin` or `rollback`."""
    _pass_on(load(config), "unpin", {"device": device, "slot": slot, "adapter": adapter}, wait, as_json)


def forget(
    device: Device, release: Annotated[str, typer.Argument(help="name@version")], config: Config = CONFIG,
    as_json: Json = False, wait: Wait = WAIT_S,
) -> None:  # fmt: skip
    """Forget what one device knows against a release: it may be tried there again."""
    _pass_on(load(config), "forget", {"device": device, "release": release}, wait, as_json)


def _pass_on(settings: TrainerConfig, kind: str, body: dict[str, Any], wait: float, as_json: bool) -> None:
    """Have the running `trainer serve` send it, and say how the device answered."""
    database = open_database(settings)
    answer = order(database, kind, body, wait)
    state, reason = _ended(lambda: _state(database, answer["command"]), wait)
    if state == "refused":
        fail(f"{body['device']}: {reason}")
    show({**answer, "state": state}, as_json)


def _state(database: Any, command: str) -> tuple[str, str]:
    from sqlalchemy import select

    from trainer.database import commands

    with database.read() as connection:
        row = connection.execute(select(commands.c.state, commands.c.reason).where(commands.c.id == command)).one()
    return str(row.state), str(row.reason)


def _ended(look: Callable[[], tuple[str, str]], wait: float) -> tuple[str, str]:
    """How far the command is once it has ended, or after `wait` seconds: a device that is off hears of it later."""
    from trainer.fleet import ENDED

    deadline = time.monotonic() + wait
    while True:
        state, reason = look()
        if state in ENDED or time.monotonic() >= deadline:
            return state, reason
        time.sleep(POLL_S)
