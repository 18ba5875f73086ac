"""When to train: enough new labelled samples, a schedule, drift, or a wish; never too often, never twice at once.

What is said here holds for every caller: an operator's wish goes before threshold and interval, an agent's does not.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from typing import Literal

CRON = "0 2 * * sun"  # Sundays at two in the night
_FIELDS = 5

Wish = Literal["", "operator", "agent"]


class BadSchedule(ValueError):
    """The text is no schedule; the message names it and what to write."""


@dataclass(frozen=True, slots=True)
class TriggerRules:
    """`threshold`: train when there are MORE new labelled samples; `minimum_interval_s` between two starts;
    `samples_min`: new samples that a schedule, a drift or an agent's wish needs (never more than the threshold asks)."""

    threshold: int = 100
    minimum_interval_s: float = 3600.0
    samples_min: int = 10

    @property
    def called(self) -> int:
        """New samples with which anything but the count may call for a training."""
        return max(1, min(self.samples_min, self.threshold + 1))


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a model. Times in seconds since the epoch.

    `samples_new`: labelled, sure enough, and never part of a job; `samples_usable`: those and the ones that a refused job
    gave back, which may train but do not call for training. `due`: a time of the schedule that has passed and that nothing
    came of yet. `drift`: when the newest drift of the release that the fleet runs was found.
    """

    samples_new: int
    samples_usable: int
    last_started: float | None = None
    job_open: bool = False
    due: float | None = None
    drift: float | None = None


@dataclass(frozen=True, slots=True)
class Fire:
    """Train now; `reason` is `sample_threshold`, `schedule`, `drift`, `operator` or `agent`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Do not train, and why. `passes`: by time alone, so that a time of the schedule that is due stays due."""

    reason: str
    passes: bool = False


def decide(facts: Facts, rules: TriggerRules, now: float, wish: Wish = "") -> Fire | Wait:
    """Whether to train a model now.

    An operator overrides threshold and interval, but neither a job that is open nor having nothing to train on.
    """
    if facts.job_open:
        return Wait("a job of this model is open", passes=True)
    if facts.samples_usable <= 0:
        return Wait("no labelled sample")
    if wish == "operator":
        return Fire("operator")
    calls = _calls(facts, rules, wish)
    if not calls:
        return Wait(f"{facts.samples_new} new labelled samples, more than {rules.threshold} are needed")
    if facts.samples_new < rules.called:
        return Wait(f"{facts.samples_new} new labelled samples, {calls[0]} needs {rules.called}")
    # A clock that was set back must not stop training for ever, so a last start in the future does not count; who asks for
    # the last one looks for it among those that are not in the future.
    if facts.last_started is not None and 0 <= now - facts.last_started < rules.minimum_interval_s:
        left_s = rules.minimum_interval_s - (now - facts.last_started)
        text = f"the last job started too recently: {left_s:.0f} s of the minimum interval are left"
        return Wait(text, passes=True)
    return Fire(calls[0])


def _calls(facts: Facts, rules: TriggerRules, wish: Wish) -> list[str]:
    """What calls for a training, the most telling reason first."""
    drifted = facts.drift is not None and (facts.last_started is None or facts.drift > facts.last_started)
    calls = (
        ("agent", wish == "agent"),
        ("drift", drifted),
        ("sample_threshold", facts.samples_new > rules.threshold),
        ("schedule", facts.due is not None),
    )
    return [reason for reason, holds in calls if holds]


def last_due(cron: str, zone: datetime.tzinfo | None, now: float) -> float:
    """The last time of a schedule at or before `now`, in seconds since the epoch; raises BadSchedule.

    `zone` None: this machine's local time. The clock on the wall counts: a time that a change to summer time leaves out
    is due at the instant at which the clock jumps over it, and one that comes twice in autumn is due once.
    """
    from croniter import CroniterError, croniter  # here: a dry run does without it

    check_schedule(cron)
    wall = datetime.datetime.fromtimestamp(math.floor(now), zone).replace(tzinfo=None, fold=0)
    minute = wall.replace(second=0, microsecond=0) + datetime.timedelta(minutes=1)
    try:
        found: datetime.datetime = croniter(cron, minute).get_prev(datetime.datetime)
    except CroniterError as error:
        raise BadSchedule(f"schedule {cron!r}: no day fits it ({error}); for example {CRON!r}") from None
    return _instant(found, zone)


def _instant(wall: datetime.datetime, zone: datetime.tzinfo | None) -> float:
    """When the clock on the wall first shows this time, or jumps over it."""
    late = wall.replace(tzinfo=zone, fold=0).timestamp()
    if datetime.datetime.fromtimestamp(late, zone).replace(tzinfo=None, fold=0) == wall:
        return late
    # It is never shown. By the offset after the jump it lies before the jump, by the one before it after.
    early = math.floor(wall.replace(tzinfo=zone, fold=1).timestamp())
    high = math.ceil(late)
    while high - early > 1:
        middle = (early + high) // 2
        shown = datetime.datetime.fromtimestamp(middle, zone).replace(tzinfo=None, fold=0)
        early, high = (middle, high) if shown < wall else (early, middle)
    return float(high)


def check_schedule(cron: str) -> None:
    """Raises BadSchedule for what is no cron expression of five fields."""
    from croniter import croniter

    if len(cron.split()) != _FIELDS or not croniter.is_valid(cron):
        raise BadSchedule(
            f"schedule {cron!r} is no cron expression: use minute, hour, day of month, month, day of week, "
            f"for example {CRON!r}"
        )


def due(last: float, looked: float | None, now: float) -> float | None:
    """The time of the schedule that nothing came of yet: `last`, when it is later than the one that was `looked` at.

    However many times passed meanwhile, there is one. None: nothing is due; so it is when nobody ever looked (a new
    schedule begins with its next time), and when `looked` lies in the future because the clock was set back.
    """
    return last if looked is not None and looked <= now and last > looked else None
