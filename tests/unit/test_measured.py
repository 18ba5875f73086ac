"""Histograms of windows: what no window alone can say follows from their sums."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from edged.metrics import Window
from edged.wire import messages
from edged.wire.measured import (
    CONFIDENCE_BINS,
    LATENCY_BINS,
    LATENCY_BOUNDS_MS,
    added,
    confidence_bin,
    confidence_histogram,
    latency_bin,
    latency_quantile,
)

ENVELOPE = {"id": "m1", "ts": 0.0, "boot": "b", "seq": 1}


def test_the_bins_never_change() -> None:
    """Sums over devices of different versions need the same bins: these numbers are in the field."""
    assert (CONFIDENCE_BINS, LATENCY_BINS) == (10, 74)
    assert LATENCY_BOUNDS_MS[:5] == pytest.approx((1.0, 1.18921, 1.41421, 1.68179, 2.0), abs=1e-5)
    assert LATENCY_BOUNDS_MS[-1] == 262144.0


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.0, 0), (0.0999, 0), (0.1, 1), (0.95, 9), (1.0, 9), (math.nan, 0), (-0.5, 0), (2.0, 9)],
)
def test_every_probability_has_a_bin(p: float, expected: int) -> None:
    assert confidence_bin(p) == expected
    assert confidence_histogram([p])[expected] == 1


@pytest.mark.parametrize(
    ("latency_ms", "expected"),
    [(0.0, 0), (1.0, 0), (1.1, 1), (2.0, 4), (2.01, 5), (262144.0, 72), (1e9, 73), (math.inf, 73), (math.nan, 73)],
)
def test_every_latency_has_a_bin(latency_ms: float, expected: int) -> None:
    assert latency_bin(latency_ms) == expected


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_the_quantile_of_many_windows_follows_from_the_sum_of_their_histograms(share: float) -> None:
    """The mean of the windows' own p95 is another number: half of the windows here are slow."""
    rng = np.random.default_rng(0)
    values, total = [], [0]
    for scale in (10.0, 100.0) * 4:
        window = Window(0.0)
        for latency in rng.lognormal(math.log(scale), 0.4, size=500):
            window.answer("line", "toy@1.0", "accept", "confident", 0.9, latency)
            values.append(latency)
        total = added(total, window.close(1.0)[0]["latency_histogram"])
    assert sum(total) == len(values)
    assert latency_quantile(total, share) == pytest.approx(float(np.quantile(values, share)), rel=0.06)


@pytest.mark.parametrize(("histogram", "expected"), [([], 0.0), ([0, 0], 0.0), ([5], 1.0), ([0] * 73 + [2], 262144.0)])
def test_quantiles_at_the_ends(histogram: list[int], expected: float) -> None:
    assert latency_quantile(histogram, 1.0) == expected


def test_a_window_stays_small_whatever_happened_in_it() -> None:
    """One packet, not a page: a device that is never out of ideas for reasons cannot fill the broker."""
    window = Window(0.0)
    for number in range(20_000):
        latency, reason = 1.001 ** (number % 12_000), f"reason-{number}"
        window.answer("line", "toy@1.0", "escalate", reason, number % 10 / 10, latency, suppressed=reason)
    (row,) = window.close(1.0)
    message = messages.Metrics(**ENVELOPE, **row, machine={"memory_mib_max": 93.4, "temperature_c_max": 61.0})
    assert sum(message.reasons.values()) == sum(message.suppressed.values()) == 20_000
    assert len(messages.encode(message)) < 4096


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("confidence_histogram", [1] * 11), ("confidence_histogram", [-1]), ("latency_histogram", [0] * 75),
        ("reasons", {f"r{number}": 1 for number in range(65)}), ("machine", {"temperature_c_max": math.inf}),
    ],
)  # fmt: skip
def test_what_no_window_can_hold_is_refused(field: str, value: object) -> None:
    topic = "edged/v1/plant/cam-07/up/metrics"
    body = {**ENVELOPE, "start": 0, "end": 60, "pipeline": "line", "release": "toy@1.0", field: value}
    with pytest.raises(messages.InvalidPayload, match=field):
        messages.decode(topic, json.dumps(body).encode())
