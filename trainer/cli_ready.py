"""`trainer ready`: whether there is enough that is new to train on."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from trainer.terminal import CONFIG, EXIT_TOO_FEW, Config, Json, fail, load, show


def ready(
    model: Annotated[str, typer.Argument(help="A model of the configuration, models.NAME.")],
    dataset: Annotated[
        Path | None, typer.Option(help="A dataset.jsonl or labelled folder here, instead of the fleet's samples.")
    ] = None,
    min_samples: Annotated[int | None, typer.Option(min=1, help="Instead of the configured threshold.")] = None,
    config: Config = CONFIG,
    as_json: Json = False,
) -> None:
    """Whether to train a model now: status 0 when there is enough that no training has had, 4 when there is not.

    For cron: `trainer ready clerk --dataset d.jsonl && trainer train --dataset d.jsonl`.
    """
    from trainer.config import ConfigError
    from trainer.database import DatabaseError
    from trainer.datasets import DatasetError
    from trainer.jobfile import JobError, dataset_job, strategies
    from trainer.ready import ready as look
    from trainer.releases import ReleaseError

    settings = load(config)
    try:
        job = None
        if dataset is not None:
            strategy = strategies(settings.any_model(model))[0]
            job = dataset_job(
                settings, model, strategy, dataset.absolute(), settings.runs / "none", created="", job="none"
            )
        found = look(settings, model, now=time.time(), dataset=job, samples_min=min_samples)
    except (ConfigError, DatabaseError, DatasetError, JobError, ReleaseError, OSError) as error:
        fail(str(error))
    show(asdict(found), as_json)
    raise typer.Exit(0 if found.ready else EXIT_TOO_FEW)
