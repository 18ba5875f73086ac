"""Whether a model should be trained now, for cron and for programs. Only new samples count: what a training has had once,
whatever came of it, never calls for another, and one that is under way is not begun twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, select

from trainer.config import Model, TrainerConfig
from trainer.config_text import TextModel, own_names
from trainer.core.rollout import Phase
from trainer.core.triggers import Fire, TriggerRules, Wait, decide
from trainer.database import Database, jobs, rollouts
from trainer.fleet import training_counts
from trainer.jobfile import JobError, TrainJob, needed
from trainer.locks import Held, held, is_held
from trainer.trained import had

OPEN = ("claiming", "training", "deploying")  # statuses of a job that has not ended


@dataclass(frozen=True, slots=True)
class Ready:
    """Whether to train now, why or why not, and the counts that this follows from."""

    model: str
    ready: bool
    reason: str
    samples_new: int
    samples_usable: int
    needed: int


class UnderWay(JobError):
    """This model is being trained already."""


def ready(
    config: TrainerConfig, model: str, *, now: float, dataset: TrainJob | None = None, samples_min: int | None = None
) -> Ready:
    """Whether to train `model` at `now` (seconds since the epoch): on the fleet's samples, or on a data set that lies here.

    `samples_min` replaces the configured threshold. Raises ConfigError, DatabaseError.
    """
    settings = config.any_model(model)
    least = needed(settings, samples_min)
    if dataset is not None:
        return _of_dataset(config, dataset, least)
    database = Database(config.database)
    try:
        with database.read() as connection:
            new, usable = training_counts(connection, model, settings.label_confidence_min, own_names(model, settings))
            rules = TriggerRules(least - 1, settings.minimum_interval_s)
            decided = decision(connection, model, settings, rules, operator=False, now=now)
    finally:
        database.close()
    return Ready(model, isinstance(decided, Fire), decided.reason, new, usable, least)


def decision(
    connection: Connection, model: str, settings: Model | TextModel, rules: TriggerRules, *, operator: bool, now: float
) -> Fire | Wait:
    """Whether to train a model on the fleet's samples now."""
    new, usable = training_counts(connection, model, settings.label_confidence_min, own_names(model, settings))
    rows = connection.execute(select(jobs.c.created, jobs.c.status).where(jobs.c.model == model)).all()
    # A rollout by hand counts too: while two releases are about, there is no one to improve.
    ended = (Phase.DONE.value, Phase.ABORTED.value)
    rolling = connection.execute(
        select(rollouts.c.id).where(rollouts.c.model == model, rollouts.c.phase.notin_(ended))
    ).first()
    return decide(
        new,
        usable,
        rules,
        last_started=max((row.created for row in rows), default=None),
        job_open=rolling is not None or any(row.status in OPEN for row in rows),
        operator=operator,
        now=now,
    )


def _of_dataset(config: TrainerConfig, job: TrainJob, least: int) -> Ready:
    usable = len({each.sha256 for each in job.manifest.samples})
    new = len(unused(config, job))
    if is_held(_lock_path(config, job.model)):
        return Ready(job.model, False, "a training of this model is under way", new, usable, least)
    if new < least:
        return Ready(job.model, False, f"{new} new samples, {least} are needed", new, usable, least)
    return Ready(job.model, True, "sample_threshold", new, usable, least)


def unused(config: TrainerConfig, job: TrainJob) -> set[str]:
    """The samples (SHA-256) of a job's data set that no training of its model has had."""
    return {each.sha256 for each in job.manifest.samples} - had(config, job.model)


@contextmanager
def at_work(config: TrainerConfig, model: str) -> Iterator[int]:
    """Nobody else trains this model on a data set here while the block runs, also not when it ends by a kill.

    The block gets the lock's descriptor, for a child that shall hold it too. Raises UnderWay.
    """
    try:
        with held(_lock_path(config, model)) as lock:
            yield lock
    except Held as error:
        raise UnderWay(f"a training of {model} is under way: wait for its end ({error})") from None


def _lock_path(config: TrainerConfig, model: str) -> Path:
    return config.data_dir / "trained" / f"{model}.lock"
