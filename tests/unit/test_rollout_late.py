"""Devices that do not get there, and rollouts that wait for a person: nothing waits for ever (L11-L13)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.test_rollout import GOOD, NAMES, RULES, observation, rollout
from trainer.core.rollout import Effect, Event, Observation, Outcome, Phase, Rollout, begin, join, observe, step

P, E, F = Phase, Event, Effect
HUNDRED = tuple(f"d{number:03}" for number in range(100))


def run(state: Rollout, fleet: dict[str, Outcome], rules: object = RULES, start: float = 0.0, end: float = 500.0) -> tuple[
    Rollout, list[tuple[Event, str]]
]:  # fmt: skip
    """What becomes of it when this is all that is ever seen."""
    found, now = [], start
    while now < end:
        each = observe(state, Observation(fleet, {}, GOOD), rules, now)  # type: ignore[arg-type]
        if each is not None:
            found.append(each)
            state, _ = step(state, *each, rules, now, fleet)  # type: ignore[arg-type]
        now += 1
    return state, found


def test_a_device_that_never_gets_there_does_not_keep_a_rollout_open() -> None:
    state = rollout(P.ROLLING)
    ended, found = run(state, {**dict.fromkeys(NAMES, Outcome.RUNNING), "d2": Outcome.ON_THE_WAY})
    assert ended.phase is P.DONE
    assert [event for event, _ in found] == [E.ALL_SETTLED]
    assert "1 did not get there within 30 s: d2" in ended.reason
    assert ended.left == ("d2",)
    later, more = run(ended, dict.fromkeys(NAMES, Outcome.RUNNING), start=500, end=510)
    assert [event for event, _ in more] == [E.CAME_BACK]
    assert later.left == ()


def test_a_device_that_never_gets_there_takes_no_place_of_the_others_and_is_named_once() -> None:
    rules = replace(RULES, disruption_max=1)
    state = rollout(P.ROLLING, rules, told={"d1": 0.0})
    state, found = run(state, {"d1": Outcome.ON_THE_WAY, "d2": Outcome.OFFLINE, "d3": Outcome.RUNNING}, rules)
    assert [event for event, _ in found] == [E.ROOM, E.ALL_SETTLED]
    state = rollout(P.ROLLING, replace(RULES, disruption_max=2), told={"d1": 0.0, "d2": 20.0})
    fleet = {"d1": Outcome.ON_THE_WAY, "d2": Outcome.ON_THE_WAY, "d3": Outcome.OFFLINE}
    state, found = run(state, fleet, replace(RULES, disruption_max=2), end=45.0)
    assert [event for event, _ in found] == [E.LAGGING]
    assert "d1" in state.reason
    assert (state.stalled, state.phase) == (("d1",), P.ROLLING)


def test_an_abort_does_not_wait_for_ever_either() -> None:
    state = rollout(P.ABORTING, told={"d1": 0.0, "d2": 0.0}, since=100.0, reason="worse")
    fleet = {"d1": Outcome.ON_THE_WAY, "d2": Outcome.RUNNING, "d3": Outcome.RUNNING}
    assert run(state, fleet, start=100.0, end=130.0)[1] == []
    ended, _ = run(state, fleet, start=100.0)
    assert (ended.phase, ended.left) == (P.ABORTED, ("d1",))
    assert ended.reason.endswith("; 1 did not get there within 30 s: d1; worse")


def test_failures_are_a_share_of_those_who_were_told() -> None:
    """Of ten thousand a thousand may not be spoiled before anybody stops it."""
    names = tuple(f"d{number}" for number in range(10_000))
    rules = replace(RULES, steps=(0.001, 1.0))
    fresh = begin("r", "m@1.1", names, rules, 0)
    told = dict.fromkeys(fresh.devices[:30], 0.0)
    state = replace(fresh, phase=P.ROLLING, stage=1, told=told)
    for failed, expected in ((3, None), (4, E.DEVICE_FAILED)):
        outcomes = {name: Outcome.FAILED if 10 <= index < 10 + failed else Outcome.ON_THE_WAY
                    for index, name in enumerate(told)}  # fmt: skip
        found = observe(state, Observation(outcomes, {}), replace(rules, disruption_max=20), 1)
        assert (found[0] if found else None) is expected
    early = replace(state, told=dict.fromkeys(fresh.devices[:12], 0.0))
    one = {**dict.fromkeys(early.told, Outcome.RUNNING), fresh.devices[11]: Outcome.FAILED}
    quiet = observe(early, Observation(one, {}), replace(rules, disruption_max=1), 1)
    assert quiet is None or quiet[0] is not E.DEVICE_FAILED  # one of twelve says nothing yet


@pytest.mark.parametrize("watch_from", [0.0, 5.0])
def test_a_held_rollout_is_resumed_with_a_watch_of_its_own(watch_from: float) -> None:
    held = rollout(P.HELD, watch_from=watch_from, watch_until=50.0, extended=1, judged={"audited": 12})
    state, effects = step(held, E.RESUME, "the clock is right again", RULES, 200)
    assert (state.phase, effects, state.result) == (P.CANARY, (F.ANNOUNCE,), "")
    canary = state.canary[0]
    assert observe(state, observation(**{canary: Outcome.ON_THE_WAY}), RULES, 229) is None  # time to install, again
    found = observe(state, observation(), RULES, 230)
    assert found is not None
    state, effects = step(state, *found, RULES, 230)
    assert (state.phase, state.watch_from, state.watch_until, state.extended) == (P.WATCHING, 230, 330, 0)
    assert F.AUDIT_MORE in effects
    assert state.judged == {}


def test_a_pause_sets_the_audits_back_and_a_resumed_watch_raises_them_again() -> None:
    paused, effects = step(rollout(P.WATCHING), E.PAUSE, "", RULES, 1)
    assert F.AUDIT_BACK in effects
    assert F.AUDIT_MORE in step(paused, E.RESUME, "", RULES, 2)[1]
    rolling, _ = step(rollout(P.ROLLING), E.PAUSE, "", RULES, 1)
    assert step(rolling, E.RESUME, "", RULES, 2)[1] == (F.ANNOUNCE,)
    by_an_older_version = replace(paused, raised={"d1": {"line": {}}})
    found = observe(by_an_older_version, observation(), RULES, 2)
    assert found is not None
    assert step(by_an_older_version, *found, RULES, 2)[1] == (F.AUDIT_BACK,)


@pytest.mark.parametrize(
    ("events", "result"),
    [
        ([E.BETTER_OR_SAME], "passed"),
        ([E.BETTER_OR_SAME, E.PAUSE], "passed"),  # paused while rolling: it has passed
        ([E.PROMOTE], "promoted"),
        ([E.PROMOTE, E.ALL_SETTLED], "promoted"),
        ([E.UNDECIDED], "held"),
        ([E.UNDECIDED, E.PROMOTE], "promoted"),
        ([E.UNDECIDED, E.RESUME], ""),
        ([E.BETTER_OR_SAME, E.ABORT], "aborting"),
        ([E.BETTER_OR_SAME, E.ABORT, E.ALL_SETTLED], "aborted"),
    ],
)
def test_what_became_of_the_canary_is_said_as_it_was(events: list[Event], result: str) -> None:
    state = rollout(P.WATCHING)
    for event in events:
        state, _ = step(state, event, "", RULES, 1, dict.fromkeys(NAMES, Outcome.RUNNING))
    assert state.result == result
    assert Rollout.from_dict(state.to_dict()) == state


def test_who_came_after_the_end_is_told_within_the_same_limit() -> None:
    rules = replace(RULES, disruption_max=1)
    done = rollout(P.DONE, rules)
    joined, effects = step(join(done, ["d8", "d9", "d1"]), E.JOINED, "2 new", rules, 5)
    assert (joined.devices[3:], joined.left, effects) == (("d8", "d9"), ("d8", "d9"), (F.ANNOUNCE,))
    state, found = run(joined, dict.fromkeys([*NAMES, "d8", "d9"], Outcome.RUNNING), rules, start=5, end=200)
    assert [event for event, _ in found].count(E.ROOM) >= 1
    assert (set(state.told), state.left) == ({*NAMES, "d8", "d9"}, ())


def test_a_device_that_was_removed_is_waited_for_no_more() -> None:
    state = rollout(P.ROLLING, told={"d1": 0.0, "d2": 0.0})
    ended, _ = run(state, {"d1": Outcome.RUNNING, "d2": Outcome.GONE, "d3": Outcome.GONE})
    assert (ended.phase, ended.left) == (P.DONE, ())
    assert "2 removed" in ended.reason
    away = rollout(P.DONE, left=("d2",))
    over, found = run(away, {"d1": Outcome.RUNNING, "d2": Outcome.GONE, "d3": Outcome.RUNNING})
    assert (over.left, [text for _, text in found]) == ((), ["back with the release: d2 gone; 0 are still away"])
