"""The change of some devices against that of others, with the device as the unit. Pure.

A difference in differences per device: each device's watch is compared with its own time before, and the change of the
canaries with the change of the others in the same hours. A device that is five points worse than its neighbours by nature
was so before; as far as its baseline is long enough to show it, it is taken out (best linear unbiased prediction of a random
device effect: Robinson 1991; a short baseline is believed only as far as it reaches). How much a device moves by itself from
one period to the next is measured on the controls, because the canaries are too few (Conley & Taber, "Inference with
difference in differences with a small number of policy changes", 2011), by the method of moments (DerSimonian & Laird 1986),
drawn towards a prior where few devices are there to measure it (Smyth 2004).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.core.sequential import Values

PRIOR_DEVICES = 4.0  # how many devices' word the prior of a spread counts as
PRIOR_WINDOWS = 4.0  # the same for the scatter of one device's windows

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Readings:
    """One measure of every device before and during the watch, with the variance of each; NaN where there is none.

    Shapes (..., devices). `weight`: what stands behind it (items, audits, hours), for people.
    """

    before: Values
    before_variance: Values
    now: Values
    now_variance: Values
    weight: Values

    def known(self) -> Mask:
        """The devices that say something in the watch."""
        return np.isfinite(self.now)


@dataclass(frozen=True, slots=True)
class Contrast:
    """The change of the canaries beyond that of the others, and its variance; shapes (...)."""

    change: Values
    variance: Values
    canary: Values  # the means, adjusted for what the devices were before
    control: Values


def of_shares(hits_before: Values, before: Values, hits_now: Values, now: Values, canary: Mask) -> Readings:
    """Readings of hits among items, all of shape (..., devices); no items, no reading.

    The variance takes each group's pooled share: a device's own would be zero where nothing happened, and its error would
    go together with its weight.
    """
    everybody = np.ones_like(canary)
    before_variance = _binomial(hits_before, before, everybody)
    now_variance = np.where(canary, _binomial(hits_now, now, canary), _binomial(hits_now, now, ~canary))
    return Readings(_ratio(hits_before, before), before_variance, _ratio(hits_now, now), now_variance, now)


def of_rates(hits_before: Values, before: Values, hits_now: Values, now: Values, canary: Mask) -> Readings:
    """Readings of events an hour (Poisson); all of shape (..., devices), `before` and `now` in hours."""

    def variance(hits: Values, hours: Values, group: Mask) -> Values:
        pooled = (_sum(hits, group) + 1) / (_sum(hours, group) + 1)
        return _ratio(np.broadcast_to(pooled[..., None], hours.shape), hours)

    everybody = np.ones_like(canary)
    now_variance = np.where(canary, variance(hits_now, now, canary), variance(hits_now, now, ~canary))
    before_variance = variance(hits_before, before, everybody)
    return Readings(_ratio(hits_before, before), before_variance, _ratio(hits_now, now), now_variance, now)


def of_values(before: Sequence[Sequence[float]], now: Sequence[Sequence[float]], prior: float, log: bool) -> Readings:
    """Readings of values, a list of windows for each device; `prior`: their scatter within a device, `log`: of factors."""
    means: list[tuple[float, float, float, float]] = []
    for earlier, later in zip(before, now, strict=True):
        means.append((*_mean(earlier, prior, log), *_mean(later, prior, log)))
    columns = np.array(means, np.float64).reshape(-1, 4).T
    count = np.array([len(values) for values in now], np.float64)
    return Readings(columns[0], columns[1], columns[2], columns[3], count)


def contrast(readings: Readings, canary: Mask, spread: float, drift: float) -> Contrast:
    """The change of the canaries beyond that of the others; `canary` (devices,), `spread` and `drift` as in Measure.

    Without any other device the canaries' own past is all that there is. Infinite variance where nothing can be said.
    """
    now, known = readings.now, readings.known()
    early = np.isfinite(readings.before) & known
    before, noise = np.where(early, readings.before, 0.0), np.where(early, readings.before_variance, 0.0)
    if canary.all():
        moved = np.where(early, now - before, 0.0)
        mean, variance = _pooled(moved, noise + readings.now_variance + drift**2, early)
        level, _ = _pooled(before, noise + drift**2, early)
        return Contrast(mean, variance, level + mean, level)
    centre, between = _between(before, noise, early, spread)
    if not early.any():  # a fleet without a past: how its devices differ is seen on the others now
        _, between = _between(
            np.where(known, now, 0.0), np.where(known, readings.now_variance, 1.0), known & ~canary, spread
        )
    trust = np.where(early, between[..., None] / np.where(early, between[..., None] + noise, 1.0), 0.0)
    adjusted = np.where(known, now - trust * (before - centre[..., None]), 0.0)
    uncertain = np.where(known, between[..., None] * (1 - trust) + readings.now_variance, 1.0)
    _, own = _between(adjusted, uncertain, known & ~canary, drift)
    one, one_variance = _pooled(adjusted, uncertain + own[..., None], known & canary)
    other, other_variance = _pooled(adjusted, uncertain + own[..., None], known & ~canary)
    return Contrast(one - other, one_variance + other_variance, one, other)


def _between(values: Values, variances: Values, there: Mask, prior: float) -> tuple[Values, Values]:
    """The mean, and the variance between devices beyond what their own variances explain, drawn towards the prior."""
    count = there.sum(-1)
    centre, _ = _pooled(values, variances + prior**2, there)
    centre = np.where(count > 0, centre, 0.0)
    beyond = np.where(there, (values - centre[..., None]) ** 2 - variances * _left(count)[..., None], 0.0).sum(-1)
    between = np.maximum(PRIOR_DEVICES * prior**2 + beyond, 0.0) / (PRIOR_DEVICES + np.maximum(count - 1, 0))
    return centre, between


def _left(count: Any) -> Any:
    """The share of the squares that is left when the mean is taken from the same values."""
    return 1 - 1 / np.maximum(count, 1)


def _pooled(values: Values, variances: Values, there: Mask) -> tuple[Values, Values]:
    """The mean weighted by certainty, and its variance; infinite without anybody."""
    weights = np.where(there, 1 / np.where(there, variances, 1.0), 0.0)
    total = weights.sum(-1)
    some = total > 0
    divisor = np.where(some, total, 1.0)
    return np.where(some, (weights * np.where(there, values, 0.0)).sum(-1) / divisor, np.nan), np.where(
        some, 1 / divisor, np.inf
    )


def _binomial(hits: Values, items: Values, group: Mask) -> Values:
    pooled = (_sum(hits, group) + 1) / (_sum(items, group) + 2)
    return _ratio(np.broadcast_to((pooled * (1 - pooled))[..., None], items.shape), items)


def _sum(values: Values, group: Mask) -> Values:
    total: Values = np.where(group, values, 0.0).sum(-1)
    return total


def _ratio(over: Values, under: Values) -> Values:
    made: Values = np.where(under > 0, over / np.where(under > 0, under, 1.0), np.nan)
    return made


def _mean(values: Sequence[float], prior: float, log: bool) -> tuple[float, float]:
    found = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not found:
        return math.nan, math.nan
    data = np.log(found) if log else np.array(found)
    scatter = (PRIOR_WINDOWS * prior**2 + float(((data - data.mean()) ** 2).sum())) / (PRIOR_WINDOWS + len(data) - 1)
    return float(data.mean()), scatter / len(data)
