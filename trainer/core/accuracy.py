"""How right the answers of a release were on the live stream, from the few that were checked. Pure.

The answers fall into two strata, whose sizes the devices count before any limit: accepted ones, of which audits are a
Bernoulli sample with a known probability each, and escalated ones, of which all are asked about and some get no verdict.
Each stratum is estimated with what was checked in it, and the two are weighted with their sizes (docs/drift.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtri

CONFIDENCE = 0.95
CLASSES_MAX = 6  # of different inclusion probabilities: more are put together with their neighbours
SURE = 1 - 1e-9  # a share of at least this much is all of them

Floats = NDArray[np.float64]
Interval = Callable[[float, float, float], tuple[float, float]]  # (share, effective size, confidence) -> (low, high)


class Checked(NamedTuple):
    """One answer of which is known whether it was right, and with which probability it would have been checked."""

    right: bool
    inclusion: float
    escalated: bool


@dataclass(frozen=True, slots=True)
class Totals:
    """All answers of the period, checked or not; audits count as accepted."""

    accepted: int
    escalated: int

    @property
    def items(self) -> int:
        """Both together."""
        return self.accepted + self.escalated


@dataclass(frozen=True, slots=True)
class Stratum:
    """One part of the answers: how many there were (`items`), how many of them were checked, the share that was right
    and its bounds. Without a checked one the share is None and the bounds are 0 and 1."""

    items: int
    checked: int
    share: float | None
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The share of right answers with its interval; None where a stratum has answers and not one of them was checked."""

    value: float | None
    low: float
    high: float
    items: int
    accepted: Stratum
    escalated: Stratum
    confidence: float


def wilson(share: float, size: float, confidence: float) -> tuple[float, float]:
    """The score interval of a share seen in `size` trials, which need not be whole (Wilson 1927)."""
    z = float(ndtri((1 + confidence) / 2))
    centre, spread = share + z * z / (2 * size), share * (1 - share) / size + z * z / (4 * size * size)
    half, scale = z * math.sqrt(spread), 1 + z * z / size
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def exact(share: float, size: float, confidence: float) -> tuple[float, float]:
    """The interval of Clopper and Pearson (1934), which never covers less than it says; of a size that is not whole by the
    beta distribution (Korn and Graubard 1998)."""
    tail, hits = (1 - confidence) / 2, share * size
    low = float(betaincinv(hits, size - hits + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, size - hits, 1 - tail)) if hits < size else 1.0
    return low, high


def live_accuracy(
    checked: Sequence[Checked], totals: Totals, confidence: float = CONFIDENCE, *,
    of_stream: bool = False, interval: Interval = wilson, effect: float = 1.0,
) -> Accuracy:  # fmt: skip
    """The accuracy of the answers that `totals` counts.

    Hajek's estimator in each stratum, post-stratified: sum of right/inclusion over sum of 1/inclusion. What has no verdict
    is missing by chance within its stratum. Bounds: each class of equal inclusion has the interval of a share with its
    effective size (Kish 1965, with the finite population correction); they are combined by the distance of each bound
    from its estimate, squared and weighted (MOVER: Zou and Donner 2008; for strata Yan and Su 2010).

    `of_stream`: of the stream that the answers are a sample of, for comparing periods, instead of just these answers; then
    nothing is exempt from chance. `effect`: the design effect of answers that are alike because they come from one place
    and time; it divides the effective sizes. Raises ValueError for an inclusion that is no probability, or 0.
    """
    if any(not 0 < each.inclusion <= 1 for each in checked):
        bad = next(each.inclusion for each in checked if not 0 < each.inclusion <= 1)
        raise ValueError(f"inclusion probability {bad}: what was checked had a chance above 0, and at most 1")
    how = _How(confidence, of_stream, interval, effect)
    accepted = _accepted([each for each in checked if not each.escalated], totals.accepted, how)
    asked = [each.right for each in checked if each.escalated]
    escalated = _escalated(asked, totals.escalated, how)
    return _combined(accepted, escalated, totals, how)


class _How(NamedTuple):
    confidence: float
    of_stream: bool
    interval: Interval
    effect: float

    @property
    def z(self) -> float:
        return float(ndtri((1 + self.confidence) / 2))


def _accepted(checked: Sequence[Checked], items: int, how: _How) -> Stratum:
    if not checked:
        return Stratum(items, 0, None, 0.0, 1.0)
    inclusion = np.array([each.inclusion for each in checked])
    right = np.array([each.right for each in checked], dtype=np.float64)
    weight = 1 / inclusion
    # Where verdicts are missing, fewer were checked than the lot said: each with this share of its probability.
    answered = 0.0 if how.of_stream else min(1.0, float(weight.sum()) / items) if items else 1.0
    low = high = 0.0
    share = float((weight * right).sum() / weight.sum())
    for members in _classes(inclusion):
        mine, part = weight[members], float(weight[members].sum() / weight.sum())
        own = float((mine * right[members]).sum() / mine.sum())
        spread = float((mine**2 * (1 - inclusion[members] * answered)).sum())
        bounds = _bounds(own, float(mine.sum()) ** 2, spread, how)
        # How large the class is, is an estimate as well.
        size = (how.z * (own - share)) ** 2 * spread / float(weight.sum()) ** 2
        low += (part * (own - bounds[0])) ** 2 + size
        high += (part * (bounds[1] - own)) ** 2 + size
    return Stratum(items, len(checked), share, max(0.0, share - math.sqrt(low)), min(1.0, share + math.sqrt(high)))


def _escalated(right: Sequence[bool], items: int, how: _How) -> Stratum:
    if not right:
        return Stratum(items, 0, None, 0.0, 1.0)
    count, share = len(right), sum(right) / len(right)
    left = 1.0 if how.of_stream else 1 - min(1.0, count / items) if items else 0.0
    return Stratum(items, count, share, *_bounds(share, float(count) ** 2, count * left, how))


def _bounds(share: float, square: float, spread: float, how: _How) -> tuple[float, float]:
    """Of a share whose effective size is square / spread; nothing is uncertain where every one was checked."""
    if spread <= square * (1 - SURE):
        return share, share
    size = square / spread / how.effect
    return how.interval(share, size, how.confidence)


def _classes(inclusion: Floats) -> list[NDArray[np.intp]]:
    """The indices of each class of equal probability; of more than CLASSES_MAX, of neighbouring ones."""
    values = np.unique(np.round(inclusion, 9))
    groups = np.array_split(values, min(len(values), CLASSES_MAX))
    return [np.flatnonzero(np.isin(np.round(inclusion, 9), group)) for group in groups]


def _combined(accepted: Stratum, escalated: Stratum, totals: Totals, how: _How) -> Accuracy:
    if not totals.items:
        return Accuracy(None, 0.0, 1.0, 0, accepted, escalated, how.confidence)
    strata = [each for each in (accepted, escalated) if each.items]
    unknown = sum(each.items for each in strata if each.share is None) / totals.items
    value = low = high = 0.0
    for each in strata:
        if each.share is not None:
            part = each.items / totals.items
            value += part * each.share
            low += (part * (each.share - each.low)) ** 2
            high += (part * (each.high - each.share)) ** 2
    if how.of_stream and accepted.share is not None and escalated.share is not None:
        part = totals.accepted / totals.items
        away = accepted.share - escalated.share
        mix = how.z**2 * part * (1 - part) / totals.items * away**2 * how.effect
        low, high = low + mix, high + mix
    bounds = max(0.0, value - math.sqrt(low)), min(1.0, value + math.sqrt(high) + unknown)
    return Accuracy(None if unknown else value, *bounds, totals.items, accepted, escalated, how.confidence)
