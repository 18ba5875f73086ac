"""`trainer train`: a job here and now, or one that the running `trainer serve` carries out; and what cron asks before."""

from __future__ import annotations

import datetime
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.terminal import (
    ANSWER_S,
    CONFIG,
    EXIT_FAILED,
    EXIT_REFUSED,
    EXIT_TOO_FEW,
    Config,
    Wait,
    fail,
    load,
    open_database,
    order,
    show,
)

if TYPE_CHECKING:
    from trainer.config import TrainerConfig
    from trainer.jobfile import TrainJob

SHOWN_MAX = 5  # of what is wrong with a manifest
SHOWN = ("job", "model", "strategy", "source", "target", "outcome", "reason", "summary", "timings_s")


def train(
    model: Annotated[
        str | None, typer.Option(help="The model, as configured under models.NAME. Default: the only one that fits.")
    ] = None,
    config: Config = CONFIG,
    strategy: Annotated[
        str | None, typer.Option(help="lora or dpo for a language model, yolo for a vision model.")
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(help="Train on this here and now: a dataset.jsonl, or for a vision model a labelled folder."),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="Train this manifest here and now. Without both the running `trainer serve` trains."),
    ] = None,
    samples: Annotated[Path | None, typer.Option(help="Folder of pixels, each file named by its SHA-256.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="The run's folder. Default: a new one by time.")] = None,
    ablate: Annotated[
        str, typer.Option(help="For proving that the gate works: `train` (old weights again) or `labels` (shuffled).")
    ] = "",
    require_threshold: Annotated[
        bool, typer.Option("--require-threshold", help="Leave with status 4 when there are too few samples.")
    ] = False,
    min_samples: Annotated[
        int | None, typer.Option(min=1, help="Leave with status 4 below this; instead of the configured threshold.")
    ] = None,
    activate: Annotated[
        Path | None,
        typer.Option(help="Record an adapter that passed the gate in this overrides file of an `edged` here."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and do nothing; needs no heavy package.")
    ] = False,
    wait: Wait = ANSWER_S,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Fine-tune a model: a JSON summary on stdout, logs and progress on stderr.

    Status 0: a candidate passed the gate. 3: the gate refused it. 4: too few samples. 1: it failed.
    """
    from trainer.config import ConfigError
    from trainer.jobfile import JobError, choose_model

    settings = load(config)
    try:
        name, chosen = choose_model(settings, model, strategy)
    except (JobError, ConfigError) as error:
        fail(str(error))
    samples_min = min_samples if min_samples is not None else -1 if require_threshold else None
    if manifest is None and dataset is None:
        _order(settings, name, {"--samples": samples, "--output-dir": output_dir, "--ablate": ablate or None,
                                "--activate": activate}, samples_min, dry_run, wait)  # fmt: skip
        return
    if manifest is not None and dataset is not None:
        fail("--manifest and --dataset: give one of them")
    if dataset is not None and samples is not None:
        fail(f"--samples {samples}: only with --manifest; a --dataset has its pixels with it")
    if parent is not None:
        die_with(parent)
    from trainer.watched import logged

    logged()
    job = _job(_ablated(settings, name, ablate), name, chosen, manifest, dataset, samples, output_dir)
    if parent is None:
        _train_here(job, samples_min, dry_run, activate)
    else:
        _train_alone(job, samples_min, dry_run, activate)


def _ablated(settings: TrainerConfig, name: str, ablate: str) -> TrainerConfig:
    if ablate not in ("", "train", "labels"):
        fail(f"--ablate {ablate}: use train or labels")
    own = settings.any_model(name)
    if not ablate:
        return settings
    if own.kind == "llm":
        fail(f"--ablate {ablate}: only for vision models")
    return settings.model_copy(
        update={"models": {**settings.models, name: own.model_copy(update={"ablate": ablate})}}
    )  # fmt: skip


def _job(
    settings: TrainerConfig, name: str, strategy: str, manifest: Path | None, dataset: Path | None,
    samples: Path | None, output_dir: Path | None,
) -> TrainJob:  # fmt: skip
    from pydantic import ValidationError

    from edged.wire.manifest import TrainingManifest
    from trainer.datasets import DatasetError
    from trainer.jobfile import JobError, TrainJob, continued, dataset_job
    from trainer.releases import ReleaseError

    now = datetime.datetime.now(datetime.UTC)
    run = output_dir or _new_folder(settings.runs, f"{name}-{now.strftime('%Y%m%dT%H%M%SZ')}")
    run = run.absolute()
    if run.exists() and not run.is_dir():
        fail(f"--output-dir {output_dir}: a file; name a folder")
    try:
        if dataset is not None:
            created = now.strftime("%Y-%m-%dT%H:%M:%SZ")
            job = dataset_job(settings, name, strategy, dataset.absolute(), run, created=created, job=run.name)
            return job if output_dir else continued(job)
        assert manifest is not None
        parsed = TrainingManifest.model_validate_json(manifest.read_bytes())
    except (JobError, ReleaseError, DatasetError) as error:
        fail(str(error))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg']}" for each in error.errors()]
        more = f"; and {len(wrong) - SHOWN_MAX} more" if len(wrong) > SHOWN_MAX else ""
        fail(
            f"--manifest {manifest}: no manifest of a training: {'; '.join(wrong[:SHOWN_MAX])}{more}; write one with "
            "`trainer samples manifest`"
        )
    except OSError as error:
        fail(f"{manifest or dataset}: {error.strerror}")
    if parsed.model != name:
        fail(
            f"--manifest {manifest}: it is for model {parsed.model}, not {name}; write one with `trainer samples manifest`"
        )
    return TrainJob(settings, name, parsed, samples or settings.samples, run, strategy)


def _new_folder(runs: Path, name: str) -> Path:
    """A folder that no other run has, also when two begin in one second."""
    number = 1
    while (runs / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return runs / (name if number == 1 else f"{name}-{number}")


def _train_here(
    job: TrainJob, samples_min: int | None, dry_run: bool, activate: Path | None, lock: int | None = None
) -> None:
    """Train, print the summary, and end with the status that says how it went. The training holds `lock` too."""
    from trainer.child import EXIT_UNWRITTEN
    from trainer.jobfile import JobError, needed, plan
    from trainer.ready import at_work, unused

    least = None if samples_min is None else needed(job.settings, samples_min if samples_min > 0 else None)
    try:
        said = plan(job) if dry_run else {}
        new = len(unused(job.config, job)) if job.dataset is not None else None
    except (ValueError, OSError) as error:
        fail(str(error))
    if dry_run:
        said |= {} if new is None else {"samples_new": new}
        if least is not None and said.get("samples_new", said["samples_usable"]) < least:
            show({**said, "needed": least, "outcome": "too_few_samples"}, as_json=True)
            raise typer.Exit(EXIT_TOO_FEW)
        show(said, as_json=True)
        if said["problems"]:
            fail("; ".join(said["problems"]))
        return
    if activate is not None and job.kind != "llm":
        fail("--activate: only adapters of language models are activated by an overrides file")
    if new is not None and least is not None and new < least:
        reason = f"{new} new samples, {least} are needed: what a training has had does not count again"
        show({"outcome": "too_few_samples", "reason": reason, "samples_new": new, "needed": least}, as_json=True)
        raise typer.Exit(EXIT_TOO_FEW)
    from trainer.ending import TooFewSamples
    from trainer.watched import Died, Unwritten, die, watch

    try:
        with at_work(job.config, job.model) if job.dataset else nullcontext() as own:
            result = watch(job, least, [each for each in (lock, own) if each is not None])
    except JobError as error:  # it is under way, or the ledger is damaged
        fail(str(error))
    except TooFewSamples as error:
        show({"outcome": "too_few_samples", "reason": str(error), "needed": least}, as_json=True)
        raise typer.Exit(EXIT_TOO_FEW) from None
    except Unwritten as error:
        typer.echo(f"trainer: the run's folder cannot be written: {error}", err=True)
        raise typer.Exit(EXIT_UNWRITTEN if lock is not None else EXIT_FAILED) from None
    except Died as error:
        typer.echo(f"trainer: {error}", err=True)
        die(error)
    said = {**{key: result[key] for key in SHOWN}, "run": str(job.run)}
    if activate is not None and result["outcome"] == "passed":
        said["activated"] = _activate(job, activate)
    show(said, as_json=True)
    raise typer.Exit({"passed": 0, "refused": EXIT_REFUSED}.get(result["outcome"], EXIT_FAILED))


def _train_alone(job: TrainJob, samples_min: int | None, dry_run: bool, activate: Path | None) -> None:
    """Train as the child of `trainer serve` or a worker; ends with EXIT_BUSY where another one does in the same folder."""
    from trainer.child import EXIT_BUSY, LOCK
    from trainer.locks import Held, held

    try:
        with held(job.run / LOCK) as lock:
            _train_here(job, samples_min, dry_run, activate, lock)
    except Held as error:
        typer.echo(f"trainer: {error}", err=True)
        raise typer.Exit(EXIT_BUSY) from None


def _activate(job: TrainJob, overrides: Path) -> dict[str, str]:
    """Register what passed the gate, and record it as what an `edged` here shall use; ends the program when it cannot."""
    from trainer.keys import TrustError
    from trainer.overrides import OverridesError
    from trainer.overrides import activate as record
    from trainer.releases import Registry, ReleaseError
    from trainer.signing import register

    registry = Registry(job.config.releases)
    try:
        ref = register(job.config, registry, job.run / "candidate")
        record(overrides, job.model, registry.get(ref.release).folder)
    except (OverridesError, ReleaseError, TrustError, OSError) as error:
        fail(f"{job.manifest.target} passed the gate and lies in {job.run / 'candidate'}, but is not active: {error}")
    return {"release": ref.release, "overrides": str(overrides)}


def _order(
    settings: TrainerConfig, model: str, given: dict[str, Any], samples_min: int | None, dry_run: bool, wait: float
) -> None:
    """Have the running `trainer serve` train, when there is enough to train on."""
    for option, value in given.items():
        if value is not None:
            fail(f"{option} {value}: needs --manifest or --dataset; without, `trainer serve` trains as configured")
    if samples_min is not None or dry_run:
        _check_counts(settings, model, samples_min, dry_run)
    show(order(open_database(settings), "train", {"model": model}, wait), as_json=True)


def _check_counts(settings: TrainerConfig, model: str, samples_min: int | None, dry_run: bool) -> None:
    """For cron: leave early when the samples known are too few, or say what would be trained on."""
    from trainer.config_text import own_names
    from trainer.fleet import training_counts
    from trainer.jobfile import needed

    own, new, usable = settings.any_model(model), 0, 0
    if not isinstance(settings.database_at, Path) or settings.database_at.is_file():  # to look is not to make one
        with open_database(settings).read() as connection:
            new, usable = training_counts(connection, model, own.label_confidence_min, own_names(model, own))
    least = needed(own, samples_min if samples_min is not None and samples_min > 0 else None)
    found = {"model": model, "samples_new": new, "samples_usable": usable, "needed": least}
    if samples_min is not None and new < least:
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
