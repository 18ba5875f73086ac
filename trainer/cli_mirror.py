"""`trainer release mirror`: the registered releases in an object store, for devices to fetch them from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from trainer.terminal import CONFIG, Config, Json, fail, load, show


def mirror(
    to: Annotated[str, typer.Option(help="An fsspec URL, as s3://bucket/prefix. Default: storage.mirror.")] = "",
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Copy every registered release, and the signed metadata, to an object store; what is there already is left.

    `trainer serve` does so by itself for `storage.mirror`.
    """
    from trainer.config import ConfigError
    from trainer.mirror import MirrorError, mirror_of
    from trainer.releases import Registry, ReleaseError

    settings = load(config)
    if not to and not settings.storage.mirror:
        fail("no store is configured: give --to, or set storage.mirror")
    try:
        copied = mirror_of(settings, Registry(settings.releases), to).sync()
    except (ConfigError, MirrorError, ReleaseError, OSError) as error:
        fail(str(error))
    show(asdict(copied), as_json)
