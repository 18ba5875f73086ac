"""Whether a model should be trained now, for cron and for programs. Only new samples count: what a training has had once,
whatever came of it, never calls for another, and one that is under way is not begun twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, func, select

from trainer.config import TrainerConfig
from trainer.config_text import own_names
from trainer.core.rollout import Phase
from trainer.core.triggers import Facts, Fire, TriggerRules, Wait, Wish, decide, due, last_due
from trainer.database import Database, detections, jobs, put, rollouts, schedules
from trainer.fleet import running_release, training_counts
from trainer.jobfile import JobError, TrainJob, needed, refusals
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
    if isinstance(config.database_at, Path) and not config.database_at.is_file():  # to look is not to make one
        return Ready(model, False, "no labelled sample", 0, 0, least)
    database = Database(config.database_at)
    try:
        with database.read() as connection:
            new, usable = training_counts(connection, model, settings.label_confidence_min, own_names(model, settings))
            rules = TriggerRules(least - 1, settings.minimum_interval_s, settings.samples_min)
            decided = decision(connection, config, model, rules, now=now)
    finally:
        database.close()
    return Ready(model, isinstance(decided, Fire), decided.reason, new, usable, least)


def decision(
    connection: Connection, config: TrainerConfig, model: str, rules: TriggerRules, *, now: float, wish: Wish = ""
) -> Fire | Wait:
    """Whether to train a model on the fleet's samples now; changes nothing."""
    settings = config.any_model(model)
    new, usable = training_counts(connection, model, settings.label_confidence_min, own_names(model, settings))
    rows = connection.execute(select(jobs.c.created, jobs.c.status).where(jobs.c.model == model)).all()
    # A rollout by hand counts too: while two releases are about, there is no one to improve.
    ended = (Phase.DONE.value, Phase.ABORTED.value)
    rolling = connection.execute(
        select(rollouts.c.id).where(rollouts.c.model == model, rollouts.c.phase.notin_(ended))
    ).first()
    facts = Facts(
        samples_new=new,
        samples_usable=usable,
        # A start in the future is from a clock that was ahead: it must not hide the real one.
        last_started=max((row.created for row in rows if row.created <= now), default=None),
        job_open=rolling is not None or any(row.status in OPEN for row in rows),
        due=_due(connection, config, model, now),
        drift=_drifted(connection, model, settings.tier, now) if config.triggers.drift else None,
    )
    return decide(facts, rules, now, wish)


def to_note(connection: Connection, config: TrainerConfig, model: str, decided: Fire | Wait, now: float) -> bool:
    """Whether `note_schedule` is called for: the schedule is new here, or its time that is due was dealt with, because a
    training begins or there is nothing to train on."""
    rule = _rule(config, model)
    row = connection.execute(select(schedules).where(schedules.c.model == model)).first()
    if not rule:
        return False
    if row is None or row.rule != rule or row.looked > now:  # new, changed, or the clock was set back
        return True
    return _due(connection, config, model, now) is not None and not (isinstance(decided, Wait) and decided.passes)


def note_schedule(connection: Connection, config: TrainerConfig, model: str, now: float) -> None:
    """Every time of the model's schedule until now was dealt with."""
    put(connection, schedules, {"model": model}, {"rule": _rule(config, model), "looked": now})


def _rule(config: TrainerConfig, model: str) -> str:
    own = config.any_model(model).cron
    cron = config.triggers.cron if own is None else own
    return f"{cron} {config.triggers.time_zone}".strip() if cron else ""


def _due(connection: Connection, config: TrainerConfig, model: str, now: float) -> float | None:
    rule = _rule(config, model)
    if not rule:
        return None
    row = connection.execute(select(schedules).where(schedules.c.model == model)).first()
    looked = row.looked if row is not None and row.rule == rule else None
    own = config.any_model(model).cron
    last = last_due(config.triggers.cron if own is None else own, config.triggers.zone(), now)
    return due(last, looked, now)


def _drifted(connection: Connection, model: str, tier: str, now: float) -> float | None:
    """When drift of the release that the fleet runs was found last, until now."""
    newest = select(detections.c.release, func.max(detections.c.found_at)).where(
        detections.c.model == model, detections.c.found_at <= now
    )
    rows = connection.execute(newest.group_by(detections.c.release))
    found: dict[str, float] = {row[0]: row[1] for row in rows}
    # Asked twice a second: the whole fleet is not looked at where nothing was ever found.
    return found.get(running_release(connection, model, tier) or "") if found else None


def _of_dataset(config: TrainerConfig, job: TrainJob, least: int) -> Ready:
    usable = len({each.sha256 for each in job.manifest.samples} - refusals(job).keys())
    new = len(unused(config, job))
    if is_held(_lock_path(config, job.model)):
        return Ready(job.model, False, "a training of this model is under way", new, usable, least)
    if new < least:
        return Ready(job.model, False, f"{new} new samples, {least} are needed", new, usable, least)
    return Ready(job.model, True, "sample_threshold", new, usable, least)


def unused(config: TrainerConfig, job: TrainJob) -> set[str]:
    """The samples (SHA-256) of a job's data set that may train and that no training of its model has had."""
    return {each.sha256 for each in job.manifest.samples} - refusals(job).keys() - had(config, job.model)


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
