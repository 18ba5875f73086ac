"""The breaker: its table row by row, no state without a way out, and who is kept waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.answers import OPEN_MAX, Answers
from edged.core.breaker import LATE_MAX, PROBE_S, TABLE, Breaker, Event, State, ask, late, verdict

CLOSED, OPEN, PROBING = State.CLOSED, State.OPEN, State.PROBING


def test_the_table_has_a_row_for_everything_and_a_verdict_closes_from_everywhere() -> None:
    assert TABLE.keys() == {(state, event) for state in State for event in Event}
    assert {TABLE[state, Event.VERDICT] for state in State} == {CLOSED}


@pytest.mark.parametrize(
    ("before", "now", "waits", "after"),
    [
        (Breaker(CLOSED, 4, 0.0), 1e6, True, Breaker(CLOSED, 4, 0.0)),
        (Breaker(OPEN, 5, 100.0), 100.0 + PROBE_S - 0.1, False, Breaker(OPEN, 5, 100.0)),
        (Breaker(OPEN, 5, 100.0), 100.0 + PROBE_S, True, Breaker(PROBING, 5, 100.0 + PROBE_S)),
        (Breaker(PROBING, 5, 100.0), 100.1, False, Breaker(PROBING, 5, 100.0)),  # one is enough
        (Breaker(PROBING, 5, 100.0), 100.0 + PROBE_S, True, Breaker(PROBING, 5, 100.0 + PROBE_S)),
    ],
)
def test_who_asks(before: Breaker, now: float, waits: bool, after: Breaker) -> None:
    assert ask(before, now) == (waits, after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Breaker(CLOSED, 0, 0.0), Breaker(CLOSED, 1, 0.0)),
        (Breaker(CLOSED, LATE_MAX - 1, 0.0), Breaker(OPEN, LATE_MAX, 500.0)),
        (Breaker(OPEN, LATE_MAX, 100.0), Breaker(OPEN, LATE_MAX + 1, 100.0)),
        (Breaker(PROBING, LATE_MAX, 100.0), Breaker(OPEN, LATE_MAX + 1, 500.0)),
    ],
)
def test_what_is_late(before: Breaker, after: Breaker) -> None:
    assert late(before, 500.0) == after


@given(st.lists(st.tuples(st.sampled_from(["ask", "late", "verdict"]), st.floats(0, 2 * PROBE_S)), max_size=60))
def test_no_state_is_dead(events: list[tuple[str, float]]) -> None:
    """From wherever it is: a verdict closes, and without one somebody is let through again before long."""
    breaker, now = Breaker(), 0.0
    for event, wait in events:
        now += wait
        if event == "ask":
            before = breaker
            waits, breaker = ask(breaker, now)
            assert waits or before.state is not CLOSED
        else:
            breaker = late(breaker, now) if event == "late" else verdict(breaker)
        assert verdict(breaker) == Breaker()
        assert (breaker.state is CLOSED) == (breaker.late < LATE_MAX)
    assert ask(breaker, now + PROBE_S + 1e-6)[0]  # beyond the rounding of the sum


def opened() -> Answers:
    answers = Answers(answer_by_s=5.0)
    for number in range(LATE_MAX):
        answers.asked(f"s{number}", 0.0)
    assert answers.tick(4.9) is None
    assert answers.tick(5.0) is OPEN
    return answers


def test_whoever_asks_is_not_kept_waiting_while_nobody_answers() -> None:
    answers = opened()
    assert [answers.may_wait(5.0 + wait) for wait in (0, 1, PROBE_S, PROBE_S + 1)] == [False, False, True, False]
    assert answers.state is PROBING
    assert answers.answered("s0") is CLOSED  # a late verdict is an answer too
    assert answers.may_wait(PROBE_S + 7)


def test_a_probe_that_nobody_answers_opens_it_again() -> None:
    answers = opened()
    assert answers.may_wait(100.0)
    answers.asked("probe", 100.0)
    assert answers.tick(104.9) is None
    assert answers.tick(105.0) is OPEN
    assert not answers.may_wait(106.0)


def test_an_answer_in_between_begins_the_count_anew() -> None:
    answers = Answers(answer_by_s=5.0)
    for number in range(4 * LATE_MAX):
        answers.asked(f"s{number}", number * 10.0)
        assert answers.tick(number * 10.0 + 6) is None
        if number % (LATE_MAX - 1) == 0:
            assert answers.answered("of long ago") is None
    assert answers.state is CLOSED


def test_what_was_answered_or_not_kept_is_never_late() -> None:
    answers = Answers(answer_by_s=5.0)
    for number in range(2 * LATE_MAX):
        answers.asked(f"s{number}", 0.0)
        answers.forget(f"s{number}") if number % 2 else answers.answered(f"s{number}")
    assert answers.tick(100.0) is None
    assert answers.state is CLOSED


def test_the_questions_that_are_watched_are_bounded() -> None:
    answers = Answers(answer_by_s=5.0)
    for number in range(2 * OPEN_MAX):
        answers.asked(f"s{number}", 0.0)
    assert len(answers._open) == OPEN_MAX
    assert answers.tick(6.0) is OPEN
    answers.asked("next", 7.0)
    assert len(answers._open) == 1


def test_a_breaker_is_a_value() -> None:
    assert replace(Breaker(), late=1) == late(Breaker(), 3.0)
