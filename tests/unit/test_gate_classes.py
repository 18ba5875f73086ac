"""Each class alone: what it surely lost refuses, what chance explains does not, and no class is left out in silence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.test_gate import CANDIDATE, CURRENT, IMAGES, RULES, evaluation, failed, verdict
from trainer.core.evaluation import Evaluation


def test_a_rare_class_is_not_judged_alone_and_is_named() -> None:
    forgot = replace(CANDIDATE, base=evaluation("b", 1.0, missing_class=2))
    checks = {check.name: check for check in verdict(forgot, rules=replace(RULES, class_boxes_min=IMAGES + 1)).checks}
    assert not any(name.startswith("class ") for name in checks)
    assert not checks["classes (base)"].passed, "not one class could be judged"
    assert "too rare to judge: 'zero' (120), 'one' (120), 'two' (120)" in checks["classes (base)"].reason


def one_class(hits: list[bool], others: float = 0.9) -> Evaluation:
    """A target holdout whose class "two" has only as many boxes as `hits`, one an image, found or not."""
    whole = evaluation("t", others, seed=2)
    rows = [row for row in whole.class_rows if row[1] != 2] + [
        (n, 2, int(h), 0, int(not h)) for n, h in enumerate(hits)
    ]
    table = np.zeros((IMAGES, 3, 3), dtype=int)
    for n, c, *counts in rows:
        table[n, c] = counts
    return replace(
        whole,
        class_rows=rows,
        counts=[tuple(row) for row in table.sum(axis=1).tolist()],
        class_counts=[tuple(row) for row in table.sum(axis=0).tolist()],
    )


@pytest.mark.parametrize(
    ("before", "after", "passes"),
    [
        ("++++++++++", "+++++++++-", True),  # one box of ten is noise
        ("++++++++++", "++++++++--", True),
        ("++++++++++", "+++++-----", False),
        ("+++++", "-----", False),  # forgotten
        ("++++++++--", "--++++++++", True),  # others than before, and as many
        ("+" * 60, "+" * 50 + "-" * 10, True),  # a drop of 0.09
        ("+" * 60, "+" * 45 + "-" * 15, False),
        ("++++", "----", True),  # too rare: named, not judged
    ],
)
def test_a_class_is_refused_for_what_it_surely_lost(before: str, after: str, passes: bool) -> None:
    current = replace(CURRENT, target=one_class([each == "+" for each in before], 0.6))
    result = verdict(replace(CANDIDATE, target=one_class([each == "+" for each in after])), current)
    assert failed(result) == (set() if passes else {"class two (target)"}), result.reasons
    named = next(check.reason for check in result.checks if check.name == "classes (target)")
    assert ("too rare to judge: 'two' (4)" in named) == (len(before) == 4)
