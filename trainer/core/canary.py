"""The canary against the others, counted over devices: is the release worse, surely not worse, or is it too early to tell?

The changes and their errors are counted over devices, not items (`core.contrast`).

Two ways to call a release worse share one level: an always-valid sequence (`core.sequential`), looked at as often as one
likes, and a plain test at the planned looks, the end of the watch and of each extension. Nothing passes without evidence:
the change must be shown to be smaller than what `excluded` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from trainer.core.contrast import Contrast, Mask, Readings, contrast, of_rates, of_shares, of_values
from trainer.core.sequential import Values, log_evidence, quantile

SEQUENCE_SHARE = 0.1  # of a measure's level, for the sequence; the rest is for the planned looks
FIRST_LOOK_SHARE = 0.85  # of the planned looks' level, for the first; the extensions share the rest
PASS_LEVEL = 0.95  # of the bound that a change must stay below to pass


class Verdict(StrEnum):
    """What a look at the canary comes to."""

    WORSE = "worse"
    FINE = "fine"  # surely not worse by what is excluded
    UNSURE = "unsure"  # neither


@dataclass(frozen=True, slots=True)
class CanaryRules:
    """What is tolerated and how much must be seen. Shares are absolute (0.02: two points), factors relative.

    `audits_planned`: audited answers of canaries that the watch is to bring; nothing passes below. 0: agreement is not
    judged. `alpha`: the chance that a release as good as the old one is called worse, over all measures and looks.
    """

    items_min: int = 100  # on the canaries, and on the others
    audits_planned: int = 400
    accuracy_loss_max: float = 0.1  # of audited agreement: a pass excludes a loss as large as this
    escalation_margin: float = 0.02
    error_margin: float = 0.01
    latency_factor: float = 1.2  # of the 95th percentile
    memory_factor: float = 1.2
    temperature_margin: float = 5.0  # degrees
    alpha: float = 0.05


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that is compared; every number in its own unit, the logarithm of a factor for what is relative.

    `tolerated`: a change for the worse up to it is no reason to go back; `excluded`: a pass shows that it is smaller than
    this. `spread`, `drift`: prior standard deviations between devices, and of one device's own change.
    """

    name: str
    sign: int  # 1: more is worse
    tolerated: float
    excluded: float
    spread: float
    drift: float
    level: float  # its share of `alpha`
    required: bool = False  # nothing passes without it
    blocks: bool = True  # else it can only bring a canary back: it is too rare for anything to be excluded
    relative: bool = False


def measures(rules: CanaryRules) -> tuple[Measure, ...]:
    """What is compared under these rules; the levels add up to one."""
    escalation, error = rules.escalation_margin, rules.error_margin
    latency, memory = math.log(rules.latency_factor), math.log(rules.memory_factor)
    heat, audited = rules.temperature_margin, rules.audits_planned > 0
    return (
        Measure("audited agreement", -1, 0.0, rules.accuracy_loss_max, 0.05, 0.02, 0.65, required=audited),
        Measure("escalation rate", 1, escalation, escalation + 0.1, 0.05, 0.02, 0.15, required=True),
        Measure("error rate", 1, error, error + 0.05, 0.01, 0.005, 0.06, required=True),
        Measure("crashes an hour", 1, 0.05, 1.0, 0.05, 0.02, 0.05, blocks=False),
        Measure("p95 latency", 1, latency, latency + 0.4, 0.3, 0.1, 0.03, relative=True),
        Measure("memory", 1, memory, memory + 0.2, 0.3, 0.05, 0.03, relative=True),
        Measure("temperature", 1, heat, heat + 5.0, 5.0, 2.0, 0.03),
    )


@dataclass(frozen=True, slots=True)
class Finding:
    """One measure at one look. `change` for the worse is positive; `odds`: to one, that it is more than tolerated."""

    measure: str
    verdict: Verdict
    text: str
    change: float = math.nan
    error: float = math.nan  # standard error of `change`
    odds: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is no number is null."""
        numbers = {"change": self.change, "error": self.error, "odds": self.odds}
        shown = {name: float(f"{value:.4g}") if math.isfinite(value) else None for name, value in numbers.items()}
        return {"measure": self.measure, "verdict": self.verdict.value, "text": self.text, **shown}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the look comes to, why, and each measure's finding. `audited`: audited answers of canaries so far."""

    verdict: Verdict = Verdict.UNSURE
    reason: str = "nobody has looked yet"
    findings: tuple[Finding, ...] = ()
    audited: int = 0


@dataclass(frozen=True, slots=True)
class Tally:
    """What one device did in a period: sums, and one value a closed window of what is no sum."""

    items: int = 0
    escalated: int = 0
    errors: int = 0
    audited: int = 0  # accepted answers with a verdict
    agreed: float = (
        0.0  # of those, answers that the verdict says are right; weighted, where some were likelier to be checked
    )
    hours: float = 0.0
    crashes: int | None = None  # None: the device does not say
    latency_ms: Sequence[float] = ()
    memory_mib: Sequence[float] = ()
    temperature_c: Sequence[float] = ()
    effective: float | None = None  # size of `audited` that its weights leave (Kish 1965); None: all of it


@dataclass(frozen=True, slots=True)
class Fleet:
    """Everything that is compared: the watch and the time before it, device by device."""

    canary: Mapping[str, Tally] = field(default_factory=dict)
    control: Mapping[str, Tally] = field(default_factory=dict)
    before: Mapping[str, Tally] = field(default_factory=dict)


# From contrasts to a judgement.


def look_levels(measure: Measure, rules: CanaryRules, watches: int, extensions: int) -> tuple[float, float, float]:
    """(of the sequence, of the first planned look, of each later one): together at most the measure's part of `alpha`."""
    level = rules.alpha * measure.level / max(watches, 1)
    planned = level * (1 - SEQUENCE_SHARE)
    if extensions <= 0:
        return level * SEQUENCE_SHARE, planned, 0.0
    return level * SEQUENCE_SHARE, planned * FIRST_LOOK_SHARE, planned * (1 - FIRST_LOOK_SHARE) / extensions


def worse(change: Any, variance: Any, measure: Measure, sequence: float, planned: float | None) -> Mask:
    """Whether a change for the worse is surely more than tolerated; `sequence`, `planned`: levels, None between looks."""
    beyond = np.asarray(change) - measure.tolerated
    found: Mask = log_evidence(beyond, variance, measure.excluded - measure.tolerated) >= -math.log(sequence)
    if planned:
        with np.errstate(invalid="ignore"):
            found = found | (beyond > quantile(1 - planned) * np.sqrt(variance))
    return found


def fine(change: Any, variance: Any, measure: Measure) -> Mask:
    """Whether a change as large as what is excluded is surely not there; NaN never is."""
    with np.errstate(invalid="ignore"):
        bound: Mask = np.asarray(change) + quantile(PASS_LEVEL) * np.sqrt(variance) < measure.excluded
    return bound


def judge(fleet: Fleet, rules: CanaryRules, *, look: int | None, watches: int = 1, extensions: int = 0) -> Judgement:
    """Compare the canaries with the others. `look`: the number of this planned look, from 0; None between them, when a
    release may be called worse and never fine. `watches`: how many of them a rollout has, which share the level."""
    audited = sum(tally.audited for tally in fleet.canary.values())
    short = _too_little(fleet, rules, audited)
    findings = []
    for measure, readings, canary in _readings(fleet, rules):
        sequence, first, later = look_levels(measure, rules, watches, extensions)
        planned = None if look is None else (first if look == 0 else later)
        findings.append(_find(measure, readings, canary, sequence, planned))
    bad = [each for each in findings if each.verdict is Verdict.WORSE]
    if bad:
        return Judgement(Verdict.WORSE, "; ".join(each.text for each in bad), tuple(findings), audited)
    if look is None:
        return Judgement(Verdict.UNSURE, short or "being watched", tuple(findings), audited)
    open_ = [each.text for each in findings if each.verdict is Verdict.UNSURE]
    if short or open_:
        return Judgement(Verdict.UNSURE, "; ".join(filter(None, [short, *open_])), tuple(findings), audited)
    return Judgement(Verdict.FINE, "; ".join(each.text for each in findings), tuple(findings), audited)


def _too_little(fleet: Fleet, rules: CanaryRules, audited: int) -> str:
    """What is missing to judge at all; without other devices the time before is what is compared with."""
    canary = sum(tally.items for tally in fleet.canary.values())
    against, whom = (fleet.control, "control") if fleet.control else (fleet.before, "earlier")
    others = sum(tally.items for tally in against.values())
    if canary < rules.items_min or others < rules.items_min:
        return f"{canary} canary and {others} {whom} items, {rules.items_min} of each are needed"
    if audited < rules.audits_planned:
        return f"{audited} audited answers of canaries, {rules.audits_planned} are needed"
    return ""


def _readings(fleet: Fleet, rules: CanaryRules) -> list[tuple[Measure, Readings, Mask]]:
    names = [*sorted(fleet.canary), *sorted(fleet.control)]
    canary = np.array([name in fleet.canary for name in names], np.bool_)
    now = [fleet.canary.get(name) or fleet.control[name] for name in names]
    before = [fleet.before.get(name, Tally()) for name in names]

    def column(tallies: Sequence[Tally], key: str) -> Values:
        return np.array([getattr(tally, key) for tally in tallies], np.float64)

    def shares(hits: str, items: str) -> Readings:
        return of_shares(column(before, hits), column(before, items), column(now, hits), column(now, items), canary)

    def rates() -> Readings:
        def hours(tallies: Sequence[Tally]) -> Values:
            return np.array([0.0 if tally.crashes is None else tally.hours for tally in tallies])

        def count(tallies: Sequence[Tally]) -> Values:
            return np.array([float(tally.crashes or 0) for tally in tallies])

        return of_rates(count(before), hours(before), count(now), hours(now), canary)

    def values(key: str, measure: Measure) -> Readings:
        earlier, later = ([getattr(tally, key) for tally in tallies] for tallies in (before, now))
        return of_values(earlier, later, measure.drift, measure.relative)

    agreement, escalation, error, crashes, latency, memory, heat = measures(rules)

    def audited() -> Readings:
        def size(tallies: Sequence[Tally]) -> Values:
            return np.array(
                [each.audited if each.effective is None else each.effective for each in tallies], np.float64
            )

        def right(tallies: Sequence[Tally]) -> Values:
            return column(tallies, "agreed") / np.maximum(column(tallies, "audited"), 1) * size(tallies)

        return of_shares(right(before), size(before), right(now), size(now), canary)

    audits = [(agreement, audited(), canary)] if rules.audits_planned > 0 else []
    return [
        *audits,
        (escalation, shares("escalated", "items"), canary),
        (error, shares("errors", "items"), canary),
        (crashes, rates(), canary),
        (latency, values("latency_ms", latency), canary),
        (memory, values("memory_mib", memory), canary),
        (heat, values("temperature_c", heat), canary),
    ]


def _find(measure: Measure, readings: Readings, canary: Mask, sequence: float, planned: float | None) -> Finding:
    known = readings.known()
    if not known[canary].any():
        silent = not measure.required and (not known.any() or not measure.blocks)
        text = f"{measure.name}: no canary reports it"
        return Finding(measure.name, Verdict.FINE if silent else Verdict.UNSURE, text)
    found = contrast(readings, canary, measure.spread, measure.drift)
    change, variance = measure.sign * float(found.change), float(found.variance)
    if not math.isfinite(variance):
        return Finding(measure.name, Verdict.UNSURE, f"{measure.name}: nothing to compare it with")
    error = math.sqrt(variance)
    beyond = float(log_evidence(change - measure.tolerated, variance, measure.excluded - measure.tolerated))
    odds = math.exp(min(beyond, 300.0))
    verdict = Verdict.UNSURE
    if worse(change, variance, measure, sequence, planned).all():
        verdict = Verdict.WORSE
    elif not measure.blocks or (fine(change, variance, measure).all() and _could_fall(measure, found)):
        verdict = Verdict.FINE
    text = _words(measure, found, error, canary, readings.weight)
    if verdict is Verdict.UNSURE:
        limit = _shown(measure, measure.excluded, signed=True)
        text += f", which does not exclude a change for the worse of {limit}"
    return Finding(measure.name, verdict, text, change, error, odds)


def _could_fall(measure: Measure, found: Contrast) -> bool:
    """Whether a loss as large as what is excluded could show at all: where nobody's answers are ever right, as texts in
    other words than the teacher's are, it could not, and a pass would mean nothing."""
    levels = (float(found.canary), float(found.control))
    return measure.sign > 0 or any(level > measure.excluded for level in levels)


def _words(measure: Measure, found: Contrast, error: float, canary: Mask, weight: Values) -> str:
    one, other = (_shown(measure, float(each)) for each in (found.canary, found.control))
    ours, others = int(canary.sum()), int((~canary).sum())
    against = f"on {others} other{'s' * (others != 1)}" if others else "before"
    behind = int(weight[canary].sum())
    whom = f"{ours} canaries" if ours != 1 else "1 canary"
    change = _shown(measure, float(found.change), signed=True)
    around = f"{math.expm1(error):.0%}" if measure.relative else f"{error:.3f}"
    return f"{measure.name} {one} on {whom} ({behind}) against {other} {against}: {change} ± {around}"


def _shown(measure: Measure, value: float, *, signed: bool = False) -> str:
    if measure.relative:
        return f"{math.expm1(value):+.0%}" if signed else f"{math.exp(value):.4g}"
    rounded = round(value, 3) + 0.0  # no minus before a zero
    return f"{rounded:+.3f}" if signed else f"{rounded:.3f}"
