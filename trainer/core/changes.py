"""Where a stream of numbers in 0..1 changed its mean, found by ADWIN; and how what repeats is kept from looking like one.

Bifet and Gavaldà, "Learning from time-changing data with adaptive windowing" (SIAM Data Mining 2007), by river.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The bound is far on the safe side: no false alarm in 100 windows of 20 streams each, for a delta of 0.002 or less.
DELTA = 0.002
GOLDEN = (math.sqrt(5) - 1) / 2

Stream = Sequence[tuple[float, float]]  # (time, value)


@dataclass(frozen=True, slots=True)
class Change:
    """The mean was `before` for `before_values` values, and `after` for the `after_values` from the time `at` on; `seen` is
    the time of the value that showed it."""

    at: float
    seen: float
    before: float
    after: float
    before_values: int
    after_values: int


def changes(stream: Stream, delta: float = DELTA) -> list[Change]:
    """Every change of the mean, in order; the same stream always gives the same ones.

    ADWIN says that there is one, and forgets old values bucket by bucket; where it was is the least-squares estimate
    (Bai, "Least squares estimation of a shift in linear processes", 1994).
    """
    from river import drift  # takes two seconds: only when it is wanted

    adwin: Any = drift.ADWIN  # untyped

    values = np.array([value for _, value in stream], dtype=np.float64)
    detector, start = adwin(delta=delta), 0
    cuts: list[tuple[int, int, int]] = []  # indices: where the stretch before begins, where it ends, what showed it
    for index, value in enumerate(values.tolist()):
        detector.update(value)
        if detector.drift_detected:
            cut = start + _split(values[start : index + 1])
            cuts.append((start, cut, index))
            detector, start = adwin(delta=delta), index + 1  # as river does: what it holds may still be some of the old
    ends = [*(cut for _, cut, _ in cuts[1:]), len(values)]
    return [
        Change(
            stream[cut][0], stream[shown][0], float(values[start:cut].mean()), float(values[cut:end].mean()), cut - start,
            end - cut,
        )
        for (start, cut, shown), end in zip(cuts, ends, strict=False)  # without a cut there is an end too many
    ]  # fmt: skip


def _split(values: NDArray[np.float64]) -> int:
    """The index at which two means fit the values best: with the largest sum of squares between them."""
    before = np.arange(1, len(values))
    sums = values.cumsum()[:-1]
    away = sums / before - (values.sum() - sums) / (len(values) - before)
    return int((before * (len(values) - before) * away**2).argmax()) + 1


def evenly(stream: Stream, cycle_s: float, until: float) -> list[tuple[float, float]]:
    """The stream (in order of time) with the values of each cycle spread evenly over it: day and night within a cycle are no
    change, another mean of the whole cycle is one. A cycle that is not over at `until` is left out.

    The order is that of the fractional parts of the golden ratio's multiples: any stretch of it holds values from
    everywhere in the cycle. The times stay in order: a value that moves takes the time of its new place.
    """
    mixed: list[tuple[float, float]] = []
    for end, group in groupby(stream, key=lambda each: cycle_end(each[0], cycle_s)):
        cycle = list(group)
        if end > until:
            break
        order = sorted(range(len(cycle)), key=lambda index: (index * GOLDEN) % 1.0)
        mixed += [(cycle[place][0], cycle[index][1]) for place, index in enumerate(order)]
    return mixed


def cycle_end(at: float, cycle_s: float) -> float:
    """The end of the cycle that `at` is in. Cycles begin at multiples of their length, whatever part of a stream is known:
    every look sees the same ones."""
    return (at // cycle_s + 1) * cycle_s
