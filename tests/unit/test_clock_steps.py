"""A clock that is set: what waits keeps the time that it had left, whoever set the clock and whenever."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.clock_steps import KEEP_S, ClockSteps
from edged.store import OutboxMessage, Store
from tests.support.clocks import SetClock

DAY_S = 86400.0
START = 1_800_000_000.0


def message(name: str, expires: float | None) -> OutboxMessage:
    return OutboxMessage(name, f"t/{name}", 1, False, expires, b"{}", "ack", None, None)


def left(store: Store, clock: SetClock) -> dict[str, float | None]:
    rows = store.due(clock.now(), 100)
    return {row.message.id: None if row.message.expires is None else row.message.expires - clock.now() for row in rows}


@pytest.mark.parametrize("by_s", [3600.0, -3600.0, 20 * 365 * DAY_S, -300.0])
def test_a_message_keeps_the_time_it_had_left_when_the_clock_is_set(tmp_path: Path, by_s: float) -> None:
    clock, store = SetClock(START), Store(tmp_path)
    steps = ClockSteps(clock, store)
    store.enqueue_many([message("minute", START + 60), message("for ever", None)], clock.now())
    clock.passes(20)
    steps.tick()
    clock.wall += by_s
    steps.tick()
    assert store.drop_expired(clock.now()) == 0
    assert left(store, clock) == {"minute": pytest.approx(40), "for ever": None}
    clock.passes(41)
    steps.tick()
    assert store.drop_expired(clock.now()) == 1
    store.flush_counters()
    assert store.counters()["clock_steps"] == 1
    store.close()


@pytest.mark.parametrize("by_s", [3600.0, -3600.0, -400 * DAY_S])
def test_a_message_that_comes_between_the_step_and_the_look_keeps_its_time_too(tmp_path: Path, by_s: float) -> None:
    clock, store = SetClock(START), Store(tmp_path)
    steps = ClockSteps(clock, store)
    store.enqueue(message("before", START + 60), clock.now())
    clock.passes(10)
    steps.tick()
    clock.wall += by_s
    store.enqueue(message("between", clock.now() + 60), clock.now())
    clock.passes(0.5)
    steps.tick()
    assert left(store, clock) == {"before": pytest.approx(49.5), "between": pytest.approx(59.5)}
    assert steps.wall() == clock.now()
    store.close()


def test_what_waits_for_a_retry_does_not_wait_for_the_clock_to_come_back(tmp_path: Path) -> None:
    clock, store = SetClock(START), Store(tmp_path)
    steps = ClockSteps(clock, store)
    store.enqueue(message("m", None), clock.now())
    store.sent("m", clock.now(), clock.now() + 30)
    clock.wall -= 2 * DAY_S
    steps.tick()
    assert [row.message.id for row in store.due(clock.now(), 10)] == ["m"]
    store.close()


def test_a_start_with_another_clock_is_a_step_and_a_short_stop_is_none(tmp_path: Path) -> None:
    clock, store = SetClock(START), Store(tmp_path)
    steps = ClockSteps(clock, store)
    store.enqueue(message("day", START + DAY_S), clock.now())
    clock.passes(KEEP_S + 1)
    steps.tick()
    had = left(store, clock)["day"]
    store.close()
    clock.passes(10)  # a restart
    store = Store(tmp_path)
    ClockSteps(clock, store).tick()
    assert "clock_steps" not in store.counters()
    store.close()
    clock.wall -= 300 * DAY_S  # a battery is empty: the device starts in the past, and is set right after a while
    store = Store(tmp_path)
    steps = ClockSteps(clock, store)
    steps.tick()
    clock.passes(30)
    clock.wall += 300 * DAY_S
    steps.tick()
    assert store.counters()["clock_steps"] == 2
    assert had is not None
    assert left(store, clock)["day"] == pytest.approx(had - 40, abs=KEEP_S + 15)
    store.close()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 30), st.sampled_from([0.0, 0.0, 7200.0, -7200.0, 1e8, -1e8])), max_size=12))
def test_only_time_that_passes_is_taken_off(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[float, float]]
) -> None:
    clock, store = SetClock(START), Store(tmp_path_factory.mktemp("steps"))
    steps = ClockSteps(clock, store)
    store.enqueue(message("m", START + 1000), clock.now())
    for seconds, by_s in turns:
        clock.passes(seconds)
        clock.wall += by_s
        steps.tick()
    assert left(store, clock)["m"] == pytest.approx(1000 - sum(seconds for seconds, _ in turns), abs=0.01)
    store.close()
