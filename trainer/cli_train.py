"""`trainer train`: a job here and now, and what cron asks before it orders one."""

from __future__ import annotations

import datetime
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trainer.terminal import EXIT_FAILED, EXIT_REFUSED, EXIT_TOO_FEW, fail, open_database, show

if TYPE_CHECKING:
    from trainer.config import TrainerConfig


def train_here(
    settings: TrainerConfig,
    model: str,
    manifest: Path,
    samples: Path | None,
    output_dir: Path | None,
    ablate: str,
    require_threshold: bool,
    min_samples: int | None,
    dry_run: bool,
) -> None:
    """Train one manifest, print the summary, and end with the status that says how it went."""
    from pydantic import ValidationError

    from edged.wire.manifest import TrainingManifest
    from trainer.config import ConfigError

    if ablate not in ("", "train", "labels"):
        fail(f"--ablate {ablate}: use train or labels")
    try:
        parsed = TrainingManifest.model_validate_json(manifest.read_bytes())
        own = settings.model(model)
    except (OSError, ValidationError) as error:
        fail(f"manifest {manifest}: {error}")
    except ConfigError as error:
        fail(str(error))
    if ablate:
        changed = own.model_copy(update={"ablate": ablate})
        settings = settings.model_copy(update={"models": {**settings.models, model: changed}})
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    from trainer.jobfile import TrainJob, plan

    job = TrainJob(
        settings, model, parsed, samples or settings.samples, output_dir or settings.runs / f"{model}-{stamp}"
    )
    needed = (min_samples if min_samples is not None else own.threshold + 1) if require_threshold else None
    if dry_run:
        show(plan(job), as_json=True)
        return
    from trainer.train import TooFewSamples
    from trainer.train import train as run

    try:
        result = run(job, samples_min=needed)
    except TooFewSamples as error:
        show({"outcome": "too_few_samples", "reason": str(error)}, as_json=True)
        raise typer.Exit(EXIT_TOO_FEW) from None
    shown = ("job", "model", "source", "target", "outcome", "reason", "summary", "timings_s")
    show({**{key: result[key] for key in shown}, "run": str(job.run)}, as_json=True)
    raise typer.Exit({"passed": 0, "refused": EXIT_REFUSED}.get(result["outcome"], EXIT_FAILED))


def check_counts(settings: TrainerConfig, model: str, required: bool, min_samples: int | None, dry_run: bool) -> None:
    """For cron: leave early when the samples known are too few, or say what would be trained on."""
    from trainer.config import ConfigError
    from trainer.fleet import training_counts

    try:
        own = settings.model(model)
    except ConfigError as error:
        fail(str(error))
    with open_database(settings).read() as connection:
        new, usable = training_counts(connection, model, own.label_confidence_min)
    needed = min_samples if min_samples is not None else own.threshold + 1
    found = {"model": model, "samples_new": new, "samples_usable": usable, "needed": needed}
    if (required or min_samples is not None) and new < needed:
        show({**found, "outcome": "too_few_samples"}, as_json=True)
        raise typer.Exit(EXIT_TOO_FEW)
    if dry_run:
        show({"action": "dry_run", **found}, as_json=True)
        raise typer.Exit(0)


def die_with(parent: int) -> None:
    """End when the process that started us does, however it ends: two trainings of one job must never run."""
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        fail(f"the process {parent} that ordered this training is gone")
