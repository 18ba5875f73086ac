"""Live accuracy: the interval holds what it says over many draws, and what was not checked is not made up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import beta

from trainer.core.accuracy import Checked, Totals, exact, live_accuracy, wilson

RUNS = 1000


@dataclass(frozen=True)
class World:
    """How a stream is, and how it is checked. `empty_*`: a part of what is accepted, which is checked at its own share."""

    items: int = 2000
    escalated: float = 0.1
    right: float = 0.95
    right_escalated: float = 0.6
    audit_share: float = 0.05
    empty: float = 0.0
    empty_right: float = 0.95
    empty_share: float = 0.05
    answered: float = 1.0  # of what was to be checked
    sent: float = 1.0  # of the escalations; budgets hold the others back

    def accuracy(self) -> float:
        accepted = (1 - self.empty) * self.right + self.empty * self.empty_right
        return self.escalated * self.right_escalated + (1 - self.escalated) * accepted


def draw(world: World, rng: np.random.Generator) -> tuple[list[Checked], Totals, float]:
    """What was checked of a period, its counts, and the share of its answers that was right in truth."""
    escalated = int(rng.binomial(world.items, world.escalated))
    empty = int(rng.binomial(world.items - escalated, world.empty))
    parts = (
        (escalated, world.right_escalated, world.sent, 1.0, True),
        (empty, world.empty_right, world.empty_share, world.empty_share, False),
        (world.items - escalated - empty, world.right, world.audit_share, world.audit_share, False),
    )
    rows: list[Checked] = []
    good = 0
    for count, p, chance, inclusion, asked in parts:
        right = int(rng.binomial(count, p))
        good += right
        for number, outcome in ((right, True), (count - right, False)):
            rows += [Checked(outcome, inclusion, asked)] * int(rng.binomial(number, chance * world.answered))
    return rows, Totals(world.items - escalated, escalated), good / world.items


WORLDS = {
    "the default": World(audit_share=0.02, items=5000),
    "few audits": World(audit_share=0.02, items=2000, right=0.9),
    "a good release": World(audit_share=0.05, right=0.98),
    "a bad release": World(audit_share=0.05, right=0.7, right_escalated=0.3),
    "a canary": World(audit_share=0.4, items=600),
    "everything is checked but for lost verdicts": World(audit_share=1.0, answered=0.8, items=600),
    "empty answers are checked more": World(empty=0.3, empty_right=0.7, empty_share=0.2),
    "empty answers are checked less": World(audit_share=0.3, empty=0.3, empty_right=0.8, empty_share=0.05),
    "a budget thins the escalations": World(escalated=0.3, sent=0.3, audit_share=0.1),
    "a third of the verdicts is lost": World(escalated=0.3, answered=0.67, audit_share=0.2),
    "hardly anything is escalated": World(escalated=0.005, audit_share=0.1),
    "most is escalated": World(escalated=0.8, right_escalated=0.4, audit_share=0.2),
}


WORLDS |= {
    f"{share:.0%} of the accepted, of which {right:.0%} are right": World(audit_share=share, right=right)
    for share in (0.02, 0.1, 0.5)
    for right in (0.8, 0.9, 0.97)
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_true_value_is_inside_the_interval_in_93_to_97_percent_of_the_runs(name: str) -> None:
    """L5 and "What none of the known systems has", 3: of 1 000 periods, their own true accuracy."""
    rng, inside, errors = np.random.default_rng(7), 0, []
    for _ in range(RUNS):
        rows, totals, truth = draw(WORLDS[name], rng)
        found = live_accuracy(rows, totals)
        inside += found.low - 1e-9 <= truth <= found.high + 1e-9
        if found.value is not None:
            errors.append(found.value - truth)
    assert 0.93 <= inside / RUNS <= 0.97
    assert abs(np.mean(errors)) <= 4 * np.std(errors) / math.sqrt(len(errors)) + 1e-9, "it is biased"


@pytest.mark.parametrize("name", ["the default", "a canary", "empty answers are checked more", "most is escalated"])
def test_of_the_stream_the_interval_holds_what_its_answers_were_drawn_from(name: str) -> None:
    rng, inside = np.random.default_rng(8), 0
    for _ in range(RUNS):
        rows, totals, _ = draw(WORLDS[name], rng)
        found = live_accuracy(rows, totals, of_stream=True)
        inside += found.low <= WORLDS[name].accuracy() <= found.high
    assert 0.93 <= inside / RUNS <= 0.975


def test_the_simulation_would_see_a_wrong_weight() -> None:
    """With audits taken for everything that is sent, the escalated ones would count twentyfold."""
    rng, inside = np.random.default_rng(9), 0
    world = WORLDS["empty answers are checked more"]
    for _ in range(200):
        rows, totals, truth = draw(world, rng)
        found = live_accuracy([row._replace(inclusion=0.05) for row in rows], totals)
        inside += found.low <= truth <= found.high
    assert inside < 160


def rows(right: int, wrong: int, inclusion: float = 0.1, *, escalated: bool = False) -> list[Checked]:
    return [Checked(number < right, inclusion, escalated) for number in range(right + wrong)]


def test_strata_are_weighted_with_their_own_sizes() -> None:
    found = live_accuracy([*rows(9, 1), *rows(30, 70, 1.0, escalated=True)], Totals(900, 100))
    assert found.value == pytest.approx(0.9 * 0.9 + 0.1 * 0.3)
    assert (found.accepted.checked, found.escalated.checked) == (10, 100)
    assert (found.escalated.low, found.escalated.high) == (0.3, 0.3), "every escalation has its verdict"
    assert found.low < found.value < found.high


def test_what_nobody_checked_is_not_known() -> None:
    found = live_accuracy(rows(100, 0, 1.0, escalated=True), Totals(900, 100))
    assert (found.value, found.accepted.share) == (None, None)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(1.0)
    nothing = live_accuracy([], Totals(0, 0))
    assert (nothing.value, nothing.low, nothing.high) == (None, 0.0, 1.0)


def test_without_escalations_the_audits_speak_for_all() -> None:
    found = live_accuracy(rows(50, 0), Totals(500, 0))
    assert found.value == 1.0
    assert 0.9 < found.low < 1.0
    assert found.high == 1.0


def test_answers_that_are_alike_tell_less() -> None:
    checked, totals = rows(90, 10), Totals(100_000, 0)
    plain, alike = (live_accuracy(checked, totals, effect=effect) for effect in (1.0, 4.0))
    assert alike.value == plain.value
    assert alike.high - alike.low > 1.8 * (plain.high - plain.low)


def test_more_different_probabilities_than_classes_are_put_together() -> None:
    rng = np.random.default_rng(0)
    checked = [Checked(bool(rng.random() < 0.9), float(p), False) for p in rng.uniform(0.02, 0.5, size=400)]
    found = live_accuracy(checked, Totals(4000, 0))
    weights = np.array([1 / row.inclusion for row in checked])
    assert found.value == pytest.approx(float((weights * [row.right for row in checked]).sum() / weights.sum()))
    assert 0.02 < found.high - found.low < 0.15


@pytest.mark.parametrize("inclusion", [0.0, -0.1, 1.1, math.nan])
def test_an_impossible_probability_is_refused(inclusion: float) -> None:
    with pytest.raises(ValueError, match="inclusion probability"):
        live_accuracy([Checked(True, inclusion, False)], Totals(10, 0))


def test_more_verdicts_than_answers_are_all_of_them() -> None:
    """A window was lost: its counts are missing, its samples are not."""
    found = live_accuracy([*rows(50, 50, 1.0), *rows(30, 0, 1.0, escalated=True)], Totals(80, 20))
    assert (found.low, found.value, found.high) == (found.value, pytest.approx(0.8 * 0.5 + 0.2), found.value)


def test_the_intervals_are_those_of_the_books() -> None:
    assert wilson(0.9, 100, 0.95) == pytest.approx((0.8256343, 0.9447708), abs=1e-6)  # Newcombe 1998's method 3
    assert exact(0.0, 60, 0.95) == pytest.approx((0.0, 1 - 0.025 ** (1 / 60)))
    assert exact(0.9, 10, 0.9) == pytest.approx((beta.ppf(0.05, 9, 2), beta.ppf(0.95, 10, 1)))
    assert (wilson(1.0, 10, 0.95)[1], exact(1.0, 10, 0.95)[1]) == pytest.approx((1.0, 1.0))
