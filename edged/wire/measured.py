"""What a closed window measured, in bins that are the same on every device and in every version.

Law of this file: the bins are part of the protocol. Histograms of many windows, devices and releases are added up, so a
bound that changes would mix what cannot be compared: a new set of bins is a new field.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from edged.wire.parts import Finite, Part

CONFIDENCE_BINS = 10  # of equal width over 0..1; 1 itself is in the last
# Upper bounds in milliseconds: each 19 % above the one before, from 1 ms to 262 s; one more bin for what takes longer.
LATENCY_BOUNDS_MS = tuple(2 ** (step / 4) for step in range(73))
LATENCY_BINS = len(LATENCY_BOUNDS_MS) + 1
REASONS_MAX = 64  # different reasons in a window; a device sends fewer
REASON_CHARS_MAX = 64
COUNT_MAX = (1 << 31) - 1  # of anything in one window: what every database takes as a number

Count = Annotated[int, Field(ge=0, le=COUNT_MAX)]
ConfidenceHistogram = Annotated[list[Count], Field(max_length=CONFIDENCE_BINS)]
LatencyHistogram = Annotated[list[Count], Field(max_length=LATENCY_BINS)]  # without the zeros at its end
Reasons = Annotated[dict[Annotated[str, Field(max_length=REASON_CHARS_MAX)], Count], Field(max_length=REASONS_MAX)]


class Machine(Part):
    """How the device was in the window: the most memory that the daemon and its engines held, the hottest sensor, the least
    share of the time that its workers were allowed to work. None: it is not known."""

    memory_mib_max: Finite | None = None
    temperature_c_max: Finite | None = None
    pace_min: Finite | None = None


def confidence_bin(p: float) -> int:
    """The bin of a probability; NaN and what is below 0 are in the first, what is above 1 in the last."""
    return 0 if math.isnan(p) else min(CONFIDENCE_BINS - 1, max(0, int(p * CONFIDENCE_BINS)))


def confidence_histogram(values: Sequence[float]) -> list[int]:
    """How many of the probabilities fall into each bin."""
    counts = [0] * CONFIDENCE_BINS
    for value in values:
        counts[confidence_bin(value)] += 1
    return counts


def latency_bin(latency_ms: float) -> int:
    """The bin of a latency; NaN is in the last."""
    return LATENCY_BINS - 1 if math.isnan(latency_ms) else bisect_left(LATENCY_BOUNDS_MS, latency_ms)


def added(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The sum of two histograms of the same bins; the shorter one has zeros at its end."""
    if len(first) < len(second):
        first, second = second, first
    return [count + (second[index] if index < len(second) else 0) for index, count in enumerate(first)]


def latency_quantile(histogram: Sequence[int], share: float) -> float:
    """The latency in milliseconds that `share` (0..1) of what a histogram counted did not exceed; 0 without any.

    Within a bin the values are taken to be spread evenly on the logarithmic scale: off by at most the bin's 19 %.
    """
    left = share * sum(histogram)
    for index, count in enumerate(histogram):
        if count and left <= count:
            if index >= len(LATENCY_BOUNDS_MS):
                return LATENCY_BOUNDS_MS[-1]
            high = LATENCY_BOUNDS_MS[index]
            return float(high * 2 ** ((left / count - 1) / 4))
        left -= count
    return 0.0
