from __future__ import annotations

import pytest

from trainer.core.triggers import Fire, TriggerRules, Wait, decide

RULES = TriggerRules(threshold=100, minimum_interval_s=600)


@pytest.mark.parametrize(
    ("new", "usable", "last", "job_open", "operator", "expected"),
    [
        (101, 101, None, False, False, Fire("sample_threshold")),
        (100, 100, None, False, False, Wait("100 new labelled samples, more than 100 are needed")),
        (
            0,
            500,
            None,
            False,
            False,
            Wait("0 new labelled samples, more than 100 are needed"),
        ),  # given back: no trigger
        (
            101,
            101,
            9_500.0,
            False,
            False,
            Wait("the last job started too recently: 100 s of the minimum interval are left"),
        ),
        (101, 101, 9_400.0, False, False, Fire("sample_threshold")),  # exactly the interval
        (101, 101, 99_999.0, False, False, Fire("sample_threshold")),  # the clock was set back
        (101, 101, None, True, False, Wait("a job of this model is open")),
        (5, 5, 9_999.0, False, True, Fire("operator")),
        (0, 7, None, False, True, Fire("operator")),
        (0, 0, None, False, True, Wait("no labelled sample")),
        (5, 5, None, True, True, Wait("a job of this model is open")),
    ],
)
def test_decides(
    new: int, usable: int, last: float | None, job_open: bool, operator: bool, expected: Fire | Wait
) -> None:
    decision = decide(new, usable, RULES, last_started=last, job_open=job_open, operator=operator, now=10_000.0)
    assert decision == expected
