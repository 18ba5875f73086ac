"""What the benchmark `loop` makes of a report of the demo."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bench.loop import BENCHMARK, facts_of, keys_of

REPORT: dict[str, Any] = {
    "escalation_rate_before": 0.8, "escalation_rate_after": 0.2, "accuracy_before": 0.5, "accuracy_after": 0.88,
    "accuracy_teacher": 0.9, "accepted_error_before": 0.12, "accepted_error_after": 0.03,
    "checks": [{"name": "a", "passed": True, "text": "fine"}, {"name": "b", "passed": False, "text": "not fine"}],
}  # fmt: skip


def test_the_keys_follow_from_the_report() -> None:
    assert keys_of(REPORT) == pytest.approx(
        {"escalations_down": 0.75, "accuracy_regained": 0.95, "error_among_accepted": 0.12}
    )
    assert facts_of(REPORT)["failed_checks"] == ["not fine"]
    met = {key: target.met(keys_of(REPORT)[key]) for key, target in BENCHMARK.targets.items()}
    assert met == {"escalations_down": False, "accuracy_regained": True, "error_among_accepted": True}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"escalation_rate_after": None}, "escalations_down"),
        ({"escalation_rate_before": 0.0}, "escalations_down"),
        ({"accuracy_after": None}, "accuracy_regained"),
        ({"accuracy_teacher": 0.5}, "accuracy_regained"),
        ({"accepted_error_before": None, "accepted_error_after": None}, "error_among_accepted"),
    ],
)
def test_what_the_report_cannot_say_misses_the_target(change: dict[str, Any], key: str) -> None:
    found = keys_of(REPORT | change)[key]
    assert math.isnan(found)
    assert not BENCHMARK.targets[key].met(found)


def test_an_error_that_is_known_on_one_side_counts() -> None:
    assert keys_of(REPORT | {"accepted_error_before": None})["error_among_accepted"] == 0.03
