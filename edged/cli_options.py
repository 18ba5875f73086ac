"""What the commands of `edged` have in common: options, errors, the configuration and the store that they look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edged.config import Settings

DEFAULT_CONFIG = Path("/etc/edged/edged.toml")
Config = Annotated[Path, typer.Option("--config", "-c", help="Configuration file (TOML).", envvar="EDGED_CONFIG")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def fail(text: str, status: int = 1) -> typer.Exit:
    """What to raise: `text` on standard error, and this exit status."""
    typer.echo(text, err=True)
    return typer.Exit(status)


def settings_of(config: Path) -> Settings:
    """The configuration; where it cannot be used, what to raise says why, with status 2."""
    from edged import config as configuration

    try:
        return configuration.load(config)
    except configuration.ConfigError as error:
        raise fail(str(error), 2) from None


def settings_to_start(config: Path) -> tuple[Settings, str]:
    """The configuration to start with, and why it does without its overrides; "": it has them. A device whose overrides
    are wrong serves what it has. Where nothing can be used, what to raise says why, with status 2."""
    from edged import config as configuration

    try:
        return configuration.load(config), ""
    except configuration.BadOverrides as error:
        try:
            return configuration.load(config, overridden=False), str(error)
        except configuration.ConfigError as other:
            raise fail(str(other), 2) from None
    except configuration.ConfigError as error:
        raise fail(str(error), 2) from None


def store_of(config: Path) -> Any:
    """The store of the device, to be closed by `with`."""
    from contextlib import closing

    from edged.store import Store, StoreError

    folder = settings_of(config).device.state_dir
    if not (folder / "edged.db").is_file():
        raise fail(f"{folder}: no edged.db here yet; the daemon makes it on its first run")
    try:
        return closing(Store(folder))
    except StoreError as error:
        raise fail(str(error)) from None
