"""Whether a release on probation is healthy: what it did with real items against what the release before it did with them.

Everything is a number of items, a share of them or milliseconds; time passes elsewhere. What a release crashes is judged in
`quarantine.py`, what a golden set can tell was judged before the switch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ITEMS_MIN = 20  # of the release and of its predecessor: fewer say nothing about shares and percentiles
# Reasons of the policy that say something of the release: they are what is escalated. That one is not calibrated is known
# before it is switched to: it is not held against that one, and nothing is held against its successor that it did itself.
DOUBTS = frozenset({"novel", "unsure", "lost_track", "weak"})
UNCALIBRATED = "uncalibrated"
LATENCY_SLACK_MS = (
    20.0  # so much slower is never held against a release: a busy machine does that to the smallest models
)


@dataclass(frozen=True, slots=True)
class Criteria:
    """What ends a probation. Shares are of items; `*_rise_max` is how much larger a share may be than before.

    `errors_max` engine errors are needed, and more than `error_share_max` of the items. `engine_ends_max`: how often the
    engine's own process may end without having been asked to.
    """

    errors_max: int = 3
    error_share_max: float = 0.01
    engine_ends_max: int = 1
    latency_factor_max: float = 3.0  # of the 95th percentile
    doubt_rise_max: float = 0.3
    empty_rise_max: float = 0.5

    def __post_init__(self) -> None:
        numbers = {"errors_max": 1, "error_share_max": 0, "engine_ends_max": 0, "latency_factor_max": 1,
                   "doubt_rise_max": 0, "empty_rise_max": 0}  # fmt: skip
        for name, least in numbers.items():
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= least):
                raise ValueError(f"{name} = {value!r}: must be a number of at least {least}")


@dataclass(frozen=True, slots=True)
class Signs:
    """What one release did in one slot, lately: items answered, of them doubtful (DOUBTS) and empty; engine errors, ends of
    the engine's process; the 95th percentile of the latency in milliseconds (of a language model: a token); items that were
    escalated because it is not calibrated."""

    items: int = 0
    doubtful: int = 0
    empty: int = 0
    errors: int = 0
    engine_ends: int = 0
    latency_ms_p95: float = 0.0
    uncalibrated: int = 0


def unhealthy(now: Signs, before: Signs | None, criteria: Criteria) -> str:
    """Why the release must go; empty when nothing speaks against it. `before`: of its predecessor, None: there is none."""
    if now.engine_ends > criteria.engine_ends_max:
        return f"its process ended {now.engine_ends} times during probation"
    if now.errors >= criteria.errors_max and now.errors > criteria.error_share_max * (now.items + now.errors):
        of = f" on {now.items + now.errors} items" if now.items else ""
        return f"{now.errors} engine errors during probation{of}"
    if before is None or now.items < ITEMS_MIN or before.items < ITEMS_MIN:
        return ""
    for what, here, there, most in (
        ("doubtful", now.doubtful, before.doubtful + before.uncalibrated, criteria.doubt_rise_max),
        ("empty", now.empty, before.empty, criteria.empty_rise_max),
    ):
        new, old = here / now.items, there / before.items
        if new > old + most:
            return f"{new:.0%} of its answers are {what}, {old:.0%} before it (at most {most:.0%} more)"
    most_ms = max(before.latency_ms_p95 * criteria.latency_factor_max, before.latency_ms_p95 + LATENCY_SLACK_MS)
    if not now.latency_ms_p95 <= most_ms:  # not `>`: NaN must not pass
        return (
            f"p95 latency {now.latency_ms_p95:.0f} ms, {before.latency_ms_p95:.0f} ms before it "
            f"(at most {criteria.latency_factor_max:g} times as much)"
        )
    return ""


def over(seconds: float, items: int, seconds_min: float, items_min: int, seconds_max: float) -> bool:
    """Whether a probation in which nothing was wrong has lasted long enough: its time and its items, or its utmost time."""
    return seconds >= seconds_min and (items >= items_min or seconds >= seconds_max)
