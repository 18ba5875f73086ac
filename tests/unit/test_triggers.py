"""When to train, row by row: L4 (triggers), L5 (train after drift), L15 (never constantly)."""

from __future__ import annotations

import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.core.triggers import CRON, BadSchedule, Facts, Fire, TriggerRules, Wait, Wish, decide, due, last_due

RULES = TriggerRules(threshold=100, minimum_interval_s=600, samples_min=10)
NOW = 10_000.0
OPEN = Wait("a job of this model is open", passes=True)
SOON = Wait("the last job started too recently: 100 s of the minimum interval are left", passes=True)
MORE = "more than 100 are needed"


@pytest.mark.parametrize(
    ("facts", "wish", "expected"),
    [
        (Facts(101, 101), "", Fire("sample_threshold")),
        (Facts(100, 100), "", Wait(f"100 new labelled samples, {MORE}")),
        (Facts(0, 500), "", Wait(f"0 new labelled samples, {MORE}")),  # given back: no trigger
        (Facts(101, 101, 9_500.0), "", SOON),
        (Facts(101, 101, 9_400.0), "", Fire("sample_threshold")),  # exactly the interval
        (Facts(101, 101, 99_999.0), "", Fire("sample_threshold")),  # the clock was set back
        (Facts(101, 101, job_open=True), "", OPEN),
        (Facts(5, 5, 9_999.0), "operator", Fire("operator")),
        (Facts(0, 7), "operator", Fire("operator")),
        (Facts(0, 0), "operator", Wait("no labelled sample")),
        (Facts(5, 5, job_open=True), "operator", OPEN),
        (Facts(10, 10, due=9_000.0), "", Fire("schedule")),
        (Facts(9, 500, due=9_000.0), "", Wait("9 new labelled samples, schedule needs 10")),  # only new ones count
        (Facts(10, 10, 9_500.0, due=9_000.0), "", SOON),
        (Facts(10, 10, due=9_000.0, job_open=True), "", OPEN),
        (Facts(0, 0, due=9_000.0), "", Wait("no labelled sample")),
        (Facts(10, 10, drift=9_000.0), "", Fire("drift")),
        (Facts(10, 10, 9_000.0, drift=9_000.0), "", Wait(f"10 new labelled samples, {MORE}")),  # trained since
        (Facts(10, 10, 9_100.0, drift=9_200.0), "", Fire("drift")),
        (Facts(10, 10, 9_500.0, drift=9_600.0), "", SOON),
        (Facts(9, 9, drift=9_000.0), "", Wait("9 new labelled samples, drift needs 10")),
        (Facts(101, 101, due=9_000.0, drift=9_000.0), "", Fire("drift")),
        (Facts(101, 101, due=9_000.0), "", Fire("sample_threshold")),
        (Facts(10, 10), "agent", Fire("agent")),
        (Facts(9, 500), "agent", Wait("9 new labelled samples, agent needs 10")),
        (Facts(101, 101, 9_500.0), "agent", SOON),  # an agent does not go before the interval
        (Facts(101, 101, job_open=True), "agent", OPEN),
    ],
)
def test_l4_l5_l15_decides(facts: Facts, wish: Wish, expected: Fire | Wait) -> None:
    assert decide(facts, RULES, NOW, wish) == expected


@pytest.mark.parametrize(("threshold", "samples_min", "called"), [(100, 10, 10), (3, 10, 4), (0, 10, 1), (100, 1, 1)])
def test_a_schedule_never_needs_more_than_the_count(threshold: int, samples_min: int, called: int) -> None:
    assert TriggerRules(threshold, samples_min=samples_min).called == called


@given(
    st.integers(0, 300), st.integers(0, 300), st.none() | st.floats(0, NOW), st.booleans(), st.none() | st.floats(0, NOW),
    st.none() | st.floats(0, NOW), st.sampled_from(["", "agent"]),
)  # fmt: skip
def test_l15_nobody_but_an_operator_trains_within_the_interval_or_on_nothing_new(
    new: int, more: int, last: float | None, job_open: bool, due_at: float | None, drift: float | None, wish: Wish
) -> None:
    decided = decide(Facts(new, new + more, last, job_open, due_at, drift), RULES, NOW, wish)
    if isinstance(decided, Fire):
        assert not job_open
        assert new >= RULES.called
        assert last is None or NOW - last >= RULES.minimum_interval_s


BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str) -> float:
    return datetime.datetime.fromisoformat(f"{text}+00:00").timestamp()


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("2026-07-05T00:00:00", "2026-07-05T00:00:00"),  # 02:00 in Berlin is 00:00 in summer, to the second
        ("2026-07-04T23:59:59", "2026-06-28T00:00:00"),
        ("2026-07-08T12:00:00", "2026-07-05T00:00:00"),
        ("2026-03-29T00:59:59", "2026-03-22T01:00:00"),
        ("2026-03-29T01:00:00", "2026-03-29T01:00:00"),  # 02:00 does not exist: due as the clock jumps over it
        ("2026-10-25T00:00:00", "2026-10-25T00:00:00"),  # 02:00 comes twice: due at the first
        ("2026-10-25T01:00:00", "2026-10-25T00:00:00"),
        ("2026-10-25T01:30:00", "2026-10-25T00:00:00"),
        ("2026-10-25T03:00:00", "2026-10-25T00:00:00"),
    ],
)
def test_l4_sunday_two_in_the_night_by_the_clock_on_the_wall(now: str, expected: str) -> None:
    assert last_due(CRON, BERLIN, at(now)) == at(expected)


# (zone, day, cron) -> when it fires, by that zone's clock, of a trainer that looks every minute.
OVER_A_CHANGE = [
    ("Europe/Berlin", "2026-03-29", "30 2 * * *", ["03:00+0200"]),  # 02:30 does not exist
    ("Europe/Berlin", "2026-03-29", "0,30 2 * * *", ["03:00+0200"]),  # neither: one instant, one training
    ("Europe/Berlin", "2026-03-29", "15 1-3 * * *", ["01:15+0100", "03:00+0200", "03:15+0200"]),
    ("Europe/Berlin", "2026-10-25", "30 2 * * *", ["02:30+0200"]),  # comes twice
    ("Europe/Berlin", "2026-10-25", "0 3 * * *", ["03:00+0100"]),
    ("America/New_York", "2026-03-08", "30 2 * * *", ["03:00-0400"]),
    ("America/New_York", "2026-11-01", "30 1 * * *", ["01:30-0400"]),
    ("Australia/Lord_Howe", "2026-10-04", "15 2 * * *", ["02:30+1100"]),  # half an hour is left out
    ("Australia/Lord_Howe", "2026-04-05", "45 1 * * *", ["01:45+1100"]),
    ("America/Santiago", "2026-09-06", "10 0 * * *", ["01:00-0300"]),  # at midnight
]


@pytest.mark.parametrize(("zone", "day", "cron", "expected"), OVER_A_CHANGE)
def test_l4_a_schedule_fires_once_over_a_change_of_the_clock(
    zone: str, day: str, cron: str, expected: list[str]
) -> None:
    there = ZoneInfo(zone)
    looked = datetime.datetime.fromisoformat(day).replace(tzinfo=there).timestamp() - 1800
    found, start = [], looked
    for minute in range(8 * 60):
        now = start + 60.0 * minute
        last = last_due(cron, there, now)
        assert last <= now
        if due(last, looked, now) is not None:
            found.append(datetime.datetime.fromtimestamp(now, there).strftime("%H:%M%z"))
            looked = now
    assert found == expected


@pytest.mark.parametrize("cron", ["", "x", "0 2 * *", "0 2 * * 8", "@weekly", "0 2 * * 0 *", "0 0 30 2 *"])
def test_a_bad_schedule_is_named_with_an_example(cron: str) -> None:
    with pytest.raises(BadSchedule, match="0 2 \\* \\* sun") as caught:
        last_due(cron, datetime.UTC, NOW)
    assert repr(cron) in str(caught.value)


def test_what_was_missed_is_due_once() -> None:
    times, looked, found = [at(f"2026-07-{day:02}T09:00:00") for day in range(1, 31)], at("2026-06-01T00:00:00"), []
    for now in times[25:]:  # down for most of the month, which had four Sundays
        waiting = due(last_due(CRON, datetime.UTC, now), looked, now)
        if waiting is not None:
            found.append(waiting)
            looked = now
    assert found == [at("2026-07-26T02:00:00")]


@given(st.lists(st.floats(1.7e9, 1.8e9), min_size=2, max_size=40).map(sorted), st.sampled_from([BERLIN, datetime.UTC]))
def test_however_often_it_is_looked_a_time_is_due_once(times: list[float], zone: datetime.tzinfo) -> None:
    looked, found = times[0], []
    for now in times[1:]:
        waiting = due(last_due("*/7 * * * *", zone, now), looked, now)
        if waiting is not None:
            assert times[0] < waiting <= now
            found.append(waiting)
            looked = now
    assert found == sorted(set(found))


@pytest.mark.parametrize(
    ("last", "looked", "expected"), [(50.0, None, None), (50.0, 40.0, 50.0), (50.0, 50.0, None), (50.0, 101.0, None)]
)
def test_due(last: float, looked: float | None, expected: float | None) -> None:
    assert due(last, looked, 100.0) == expected
