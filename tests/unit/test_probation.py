"""What ends a probation, case by case, and what must not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.config import ANSWERS_MAX
from edged.core.probation import ITEMS_MIN, Criteria, Signs, over, unhealthy
from edged.tallies import RELEASES_MAX, Tallies

GOOD = Signs(items=100, doubtful=10, empty=5, latency_ms_p95=40.0)
NONE = Signs()
UNFITTED = replace(GOOD, doubtful=0, uncalibrated=100)  # it escalates everything

CASES: dict[str, tuple[Signs, Signs | None, str]] = {
    "nothing has happened yet": (NONE, None, ""),
    "as before": (GOOD, GOOD, ""),
    "better": (replace(GOOD, doubtful=0, latency_ms_p95=1.0), GOOD, ""),
    # Errors need no predecessor.
    "two errors": (replace(NONE, errors=2), None, ""),
    "three errors and no answer": (replace(NONE, errors=3), None, "3 engine errors during probation"),
    "three errors among many answers": (replace(GOOD, items=500, errors=3), GOOD, ""),
    "three errors among a hundred": (replace(GOOD, errors=3), GOOD, "3 engine errors during probation on 103 items"),
    "its process ended once": (replace(GOOD, engine_ends=1), GOOD, ""),
    "and again": (replace(GOOD, engine_ends=2), None, "its process ended 2 times during probation"),
    # Shares against the predecessor's.
    "doubts 40 % instead of 10 %": (replace(GOOD, doubtful=40), GOOD, ""),
    "doubts 41 %": (replace(GOOD, doubtful=41), GOOD, "41% of its answers are doubtful, 10% before it"),
    "calibrated, after one that was not": (replace(GOOD, doubtful=100), UNFITTED, ""),
    "not calibrated, after one that was": (UNFITTED, GOOD, ""),
    "finds nothing in 55 %": (replace(GOOD, empty=55), GOOD, ""),
    "finds nothing in 56 %": (replace(GOOD, empty=56), GOOD, "56% of its answers are empty, 5% before it"),
    "finds nothing, as before": (replace(GOOD, empty=100), replace(GOOD, empty=100), ""),
    "without a predecessor nothing is compared": (replace(GOOD, empty=100, doubtful=100), None, ""),
    "too few items": (replace(GOOD, items=ITEMS_MIN - 1, empty=ITEMS_MIN - 1), GOOD, ""),
    "a predecessor with too few": (replace(GOOD, empty=100), replace(GOOD, items=ITEMS_MIN - 1), ""),
    # Latency.
    "three times as slow": (replace(GOOD, latency_ms_p95=120.0), GOOD, ""),
    "slower": (replace(GOOD, latency_ms_p95=121.0), GOOD, "p95 latency 121 ms, 40 ms before it (at most 3 times"),
    "ten times as slow, by milliseconds": (replace(GOOD, latency_ms_p95=20.0), replace(GOOD, latency_ms_p95=2.0), ""),
    "no number": (replace(GOOD, latency_ms_p95=math.nan), GOOD, "p95 latency nan ms"),
}


@pytest.mark.parametrize("case", CASES)
def test_health(case: str) -> None:
    now, before, reason = CASES[case]
    found = unhealthy(now, before, Criteria())
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_a_slot_may_be_stricter() -> None:
    strict = Criteria(errors_max=1, error_share_max=0.0, engine_ends_max=0, latency_factor_max=1.5, empty_rise_max=0.0)
    assert unhealthy(replace(GOOD, errors=1), GOOD, strict)
    assert unhealthy(replace(GOOD, engine_ends=1), GOOD, strict)
    assert unhealthy(replace(GOOD, latency_ms_p95=61.0), GOOD, strict)
    assert unhealthy(replace(GOOD, empty=6), GOOD, strict)
    assert not unhealthy(GOOD, GOOD, strict)
    with pytest.raises(ValueError, match=r"latency_factor_max = 0\.5: must be a number of at least 1"):
        Criteria(latency_factor_max=0.5)


@pytest.mark.parametrize(
    ("seconds", "items", "ended"),
    [(59, 1000, False), (60, 9, False), (60, 10, True), (3599, 9, False), (3600, 0, True)],
)
def test_a_probation_lasts_its_time_and_its_items_but_not_for_ever(seconds: float, items: int, ended: bool) -> None:
    assert over(seconds, items, 60.0, 10, 3600.0) is ended


counts = st.integers(0, 200)


@given(counts, counts, counts, st.floats(0, 1e6))
def test_who_does_as_his_predecessor_did_is_never_sent_away(items: int, doubtful: int, empty: int, ms: float) -> None:
    signs = Signs(items, min(items, doubtful), min(items, empty), 0, 0, ms)
    assert not unhealthy(signs, signs, Criteria())


def test_what_is_tallied_is_the_release_that_answered() -> None:
    tallies = Tallies()
    for number in range(100):
        tallies.answer(
            "eye", "a@1", reason="unsure" if number % 10 == 0 else "uncalibrated", empty=False, latency_ms=float(number)
        )
    tallies.error("eye")
    tallies.begin("eye", "a@2")
    assert tallies.signs("eye", "a@2") == Signs()
    tallies.answer("eye", "a@2", reason="confident", empty=True, latency_ms=7.0)
    tallies.error("eye")
    tallies.error("eye", ended=True)
    assert tallies.signs("eye", "a@2") == Signs(1, 0, 1, 1, 1, 7.0)
    assert tallies.before("eye", "a@2") == Signs(100, 10, 0, 0, 0, 94.0, uncalibrated=90)
    assert tallies.before("ear", "a@2") is None


def test_nothing_grows_for_ever() -> None:
    tallies = Tallies()
    for release in range(RELEASES_MAX + 3):
        for _ in range(ANSWERS_MAX + 5):
            tallies.answer("eye", f"a@{release}", reason="confident", empty=False, latency_ms=1.0)
    assert tallies.signs("eye", "a@0") == Signs()
    assert tallies.signs("eye", f"a@{RELEASES_MAX + 2}").items == ANSWERS_MAX
