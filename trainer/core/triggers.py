"""When to train: enough new labelled samples, or an operator's wish, and never too often."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TriggerRules:
    """`threshold`: train when there are MORE new labelled samples; `minimum_interval_s` between two starts."""

    threshold: int = 100
    minimum_interval_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Fire:
    """Train now; `reason` is `sample_threshold` or `operator`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Do not train, and why."""

    reason: str


def decide(
    samples_new: int,
    samples_usable: int,
    rules: TriggerRules,
    *,
    last_started: float | None,
    job_open: bool,
    operator: bool,
    now: float,
) -> Fire | Wait:
    """Whether to train a model now.

    `samples_new`: labelled, sure enough, and never part of a job; `samples_usable`: those and the ones that a refused
    job gave back, which may train but do not call for training. An operator overrides threshold and interval, but
    neither a job that is open nor having nothing to train on. Times in seconds since the epoch.
    """
    if job_open:
        return Wait("a job of this model is open")
    if samples_usable <= 0:
        return Wait("no labelled sample")
    if operator:
        return Fire("operator")
    if samples_new <= rules.threshold:
        return Wait(f"{samples_new} new labelled samples, more than {rules.threshold} are needed")
    # A clock that was set back must not stop training for ever, so a last start in the future does not count.
    if last_started is not None and 0 <= now - last_started < rules.minimum_interval_s:
        left_s = rules.minimum_interval_s - (now - last_started)
        return Wait(f"the last job started too recently: {left_s:.0f} s of the minimum interval are left")
    return Fire("sample_threshold")
