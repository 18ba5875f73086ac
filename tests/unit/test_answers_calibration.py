"""How well an adapter's probabilities hold: cross-validated on answers whose truth is drawn from their probability."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.kinds.measures import Answered, cross_validate_answers


def drawn(count: int, honest: bool, seed: int = 0) -> list[Answered]:
    """Answers with a mean probability of 0.2 to 0.99 a token, right as often as that says (or half of the time)."""
    chance = np.random.default_rng(seed)
    p = chance.uniform(0.2, 0.99, count)
    right = chance.random(count) < (p if honest else 0.5)
    return [(math.log(each), bool(good)) for each, good in zip(p, right, strict=True)]


def test_probabilities_that_hold_have_a_small_error_and_say_more_than_the_mean() -> None:
    report = cross_validate_answers(drawn(2000, honest=True))
    assert (report.items, report.ece < 0.05) == (2000, True)
    share = report.right / report.items
    assert report.mean_p == pytest.approx(share, abs=0.02)
    assert report.brier < 0.9 * share * (1 - share)


def test_what_knows_nothing_is_brought_to_the_share_that_is_right() -> None:
    report = cross_validate_answers(drawn(2000, honest=False))
    assert report.ece < 0.06
    assert report.brier == pytest.approx(0.25, abs=0.01)


def test_the_same_answers_give_the_same_report_and_too_few_none() -> None:
    assert cross_validate_answers(drawn(100, honest=True)) == cross_validate_answers(drawn(100, honest=True))
    with pytest.raises(ValueError, match="99 answers cannot be cross-validated; at least 100"):
        cross_validate_answers(drawn(99, honest=True))
