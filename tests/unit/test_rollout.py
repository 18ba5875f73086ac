from __future__ import annotations

from dataclasses import replace

import pytest

from trainer.core.canary import Judgement, Verdict
from trainer.core.rollout import (
    OPEN,
    TABLE,
    Effect,
    Event,
    Observation,
    Outcome,
    Phase,
    Rollout,
    RolloutRules,
    begin,
    look_of,
    observe,
    step,
)

RULES = RolloutRules(watches=(100,), extend_max=1, install_s_max=30)
P, E, F = Phase, Event, Effect
BACK = (P.ABORTING, (F.AUDIT_BACK, F.RESTORE, F.ANNOUNCE))
HOLD = (P.HELD, (F.AUDIT_BACK, F.ANNOUNCE))
GO = (P.ROLLING, (F.AUDIT_BACK, F.DESIRE, F.ANNOUNCE))
PAUSED = (P.PAUSED, (F.AUDIT_BACK, F.ANNOUNCE))

# (phase, event) -> what a person who runs the fleet expects; every pair that is not here must change nothing.
EXPECTED: dict[tuple[Phase, Event], tuple[Phase, tuple[Effect, ...]]] = {
    (P.PENDING, E.START): (P.CANARY, (F.DESIRE, F.ANNOUNCE)),
    (P.PENDING, E.ABORT): (P.ABORTED, (F.GIVE_BACK, F.ANNOUNCE)),
    (P.CANARY, E.ROOM): (P.CANARY, (F.DESIRE,)),
    (P.CANARY, E.CANARY_RUNNING): (P.WATCHING, (F.AUDIT_MORE, F.ANNOUNCE)),
    (P.CANARY, E.DEVICE_FAILED): BACK,
    (P.CANARY, E.STALLED): HOLD,
    (P.CANARY, E.PAUSE): PAUSED,
    (P.CANARY, E.ABORT): BACK,
    (P.WATCHING, E.SAMPLED): (P.WATCHING, (F.AUDIT_BACK,)),
    (P.WATCHING, E.STEP_PASSED): (P.CANARY, (F.AUDIT_BACK, F.DESIRE, F.ANNOUNCE)),
    (P.WATCHING, E.BETTER_OR_SAME): GO,
    (P.WATCHING, E.WORSE): BACK,
    (P.WATCHING, E.DEVICE_FAILED): BACK,
    (P.WATCHING, E.TOO_LITTLE): (P.WATCHING, (F.AUDIT_MORE, F.ANNOUNCE)),
    (P.WATCHING, E.UNDECIDED): HOLD,
    (P.WATCHING, E.PAUSE): PAUSED,
    (P.WATCHING, E.ABORT): BACK,
    (P.WATCHING, E.PROMOTE): GO,
    (P.ROLLING, E.ROOM): (P.ROLLING, (F.DESIRE,)),
    (P.ROLLING, E.LAGGING): (P.ROLLING, (F.ANNOUNCE,)),
    (P.ROLLING, E.ALL_SETTLED): (P.DONE, (F.CONFIRM, F.ANNOUNCE)),
    (P.ROLLING, E.DEVICE_FAILED): BACK,
    (P.ROLLING, E.PAUSE): PAUSED,
    (P.ROLLING, E.ABORT): BACK,
    (P.HELD, E.PROMOTE): GO,
    (P.HELD, E.RESUME): (P.CANARY, (F.ANNOUNCE,)),
    (P.HELD, E.WORSE): BACK,
    (P.HELD, E.DEVICE_FAILED): BACK,
    (P.HELD, E.ABORT): BACK,
    (P.PAUSED, E.SAMPLED): (P.PAUSED, (F.AUDIT_BACK,)),
    (P.PAUSED, E.RESUME): (P.WATCHING, (F.AUDIT_MORE, F.ANNOUNCE)),  # where it was paused
    (P.PAUSED, E.WORSE): BACK,
    (P.PAUSED, E.DEVICE_FAILED): BACK,
    (P.PAUSED, E.ABORT): BACK,
    (P.ABORTING, E.ALL_SETTLED): (P.ABORTED, (F.GIVE_BACK, F.ANNOUNCE)),
    (P.DONE, E.ROOM): (P.DONE, (F.DESIRE,)),
    (P.DONE, E.JOINED): (P.DONE, (F.ANNOUNCE,)),
    (P.DONE, E.CAME_BACK): (P.DONE, (F.ANNOUNCE,)),
    (P.ABORTED, E.CAME_BACK): (P.ABORTED, (F.ANNOUNCE,)),
}
NAMES = ("d1", "d2", "d3")
ALL_RUN = dict.fromkeys(NAMES, Outcome.RUNNING)


def rollout(phase: Phase, rules: RolloutRules = RULES, names: tuple[str, ...] = NAMES, **changes: object) -> Rollout:
    """As it stands in this phase, everybody told who is told by then."""
    fresh = begin("r1", "digits@1.1", names, rules, now=0)
    wide = phase in (P.ROLLING, P.DONE)
    told = () if phase in (P.PENDING, P.ABORTED) else fresh.devices if wide else fresh.canary
    stage = len(rules.steps) - 1 if wide else 0
    more: dict[str, object] = {"watch_until": 1e9} if phase in (P.WATCHING, P.HELD) else {}
    paused = P.WATCHING if phase is P.PAUSED else None
    state = replace(fresh, phase=phase, stage=stage, told=dict.fromkeys(told, 0.0), paused_in=paused)
    return replace(state, **{**more, **changes})  # type: ignore[arg-type]


def observation(
    default: Outcome = Outcome.RUNNING, judged: Judgement | None = None, **outcomes: Outcome
) -> Observation:
    everybody = {device: outcomes.get(device, default) for device in NAMES}
    return Observation(everybody, dict.fromkeys(everybody, "golden set"), judged or Judgement())


def found_by(state: Rollout, seen: Observation, rules: RolloutRules = RULES, now: float = 1) -> Event | None:
    found = observe(state, seen, rules, now)
    return found[0] if found is not None else None


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", Event)
def test_every_row(phase: Phase, event: Event) -> None:
    before = rollout(phase)
    after, effects = step(before, event, "because", RULES, 7, ALL_RUN)
    if (phase, event) not in EXPECTED:
        assert (after, effects) == (before, ())
        return
    assert (after.phase, effects) == EXPECTED[phase, event]
    # Why it ended as it did stays, whoever comes later.
    says = F.ANNOUNCE in effects and event not in (Event.JOINED, Event.CAME_BACK)
    assert after.reason == ("because" if says else "")


def test_every_open_phase_can_end_in_success_or_abort() -> None:
    for phase in OPEN - {P.ABORTING}:
        assert TABLE[phase, E.ABORT][0] in (P.ABORTING, P.ABORTED)


@pytest.mark.parametrize(("devices", "canaries"), [(1, 1), (3, 1), (10, 1), (11, 2), (47, 5), (100, 10), (70, 7)])
def test_l11_canary_is_the_ceiling_of_ten_per_cent(devices: int, canaries: int) -> None:
    names = [f"d{number}" for number in range(devices)]
    first = begin("r1", "digits@1.1", names, RULES, now=0)
    assert len(first.canary) == canaries
    assert begin("r1", "digits@1.1", reversed(names), RULES, now=9).canary == first.canary


def test_canary_differs_between_rollouts() -> None:
    names = [f"d{number}" for number in range(50)]
    assert len({begin(f"r{n}", "digits@1.1", names, RULES, now=0).canary for n in range(5)}) > 1


def test_an_empty_fleet_is_refused() -> None:
    with pytest.raises(ValueError, match="no device runs this model"):
        begin("r1", "digits@1.1", [], RULES, now=0)


GOOD = Judgement(Verdict.FINE, "escalation rate the same")
BAD = Judgement(Verdict.WORSE, "audited agreement fell")
OPEN_QUESTION = Judgement(Verdict.UNSURE, "12 audited answers of canaries, 400 are needed", audited=12)


def test_l12_nothing_passes_before_the_watch_is_over_and_what_is_worse_goes_back_at_once() -> None:
    watching = rollout(P.WATCHING, watch_from=1.0, watch_until=100.0)
    assert found_by(watching, observation(judged=GOOD), now=99) is None
    assert found_by(watching, observation(judged=GOOD), now=100) is E.BETTER_OR_SAME
    assert found_by(watching, observation(judged=BAD), now=2) is E.WORSE


@pytest.mark.parametrize("phase", [P.HELD, P.PAUSED])
def test_l13_what_waits_for_a_person_goes_back_by_itself_when_it_is_surely_worse(phase: Phase) -> None:
    assert found_by(rollout(phase, watch_from=1.0), observation(judged=BAD)) is E.WORSE
    assert (
        found_by(rollout(phase, watch_from=1.0, watch_until=0.5), observation(judged=GOOD)) is None
    )  # and never passes


def test_l12_too_little_evidence_extends_then_holds_and_never_passes() -> None:
    now, state = 0.0, rollout(P.CANARY)
    events = []
    for _ in range(10):
        found = observe(state, observation(judged=OPEN_QUESTION), RULES, now)
        if found is not None:
            events.append(found[0])
            state, _ = step(state, *found, RULES, now, ALL_RUN)
        now += 50
    assert events == [E.CANARY_RUNNING, E.TOO_LITTLE, E.UNDECIDED]
    assert state.phase is P.HELD
    assert "inconclusive: promote or abort it by hand: 12 audited answers" in state.reason


def test_l12_the_planned_looks_are_numbered_and_there_is_none_between_them() -> None:
    watching = rollout(P.WATCHING, watch_from=1.0, watch_until=100.0)
    assert [look_of(watching, now) for now in (2, 99, 100)] == [None, None, 0]
    longer, _ = step(watching, E.TOO_LITTLE, "", RULES, 100)
    assert [look_of(longer, now) for now in (100, 199, 200)] == [None, None, 1]


def test_l12_more_is_audited_until_the_planned_sample_is_there() -> None:
    watching = rollout(P.WATCHING, watch_from=1.0, watch_until=100.0, raised={"d1": {"line": {}}})
    assert found_by(watching, observation(judged=OPEN_QUESTION)) is None
    enough = observation(judged=Judgement(audited=400))
    assert found_by(watching, enough) is E.SAMPLED
    assert found_by(replace(watching, raised={}), enough) is None  # it is said once


def test_l11_one_failed_canary_is_too_many_in_every_phase() -> None:
    for phase in (P.CANARY, P.WATCHING, P.ROLLING, P.HELD, P.PAUSED):
        state = rollout(phase)
        found = observe(state, observation(**{state.canary[0]: Outcome.FAILED}), RULES, now=1)
        assert found is not None
        assert found[0] is E.DEVICE_FAILED
        assert "golden set" in found[1]


@pytest.mark.parametrize(("failed", "event"), [(1, E.CANARY_RUNNING), (2, E.CANARY_RUNNING), (3, E.DEVICE_FAILED)])
def test_of_a_hundred_canaries_two_may_fail(failed: int, event: Event) -> None:
    """One broken device of a large fleet says nothing about the release."""
    state = rollout(P.CANARY, names=tuple(f"d{number}" for number in range(1000)))
    outcomes = {name: Outcome.FAILED if index < failed else Outcome.RUNNING for index, name in enumerate(state.canary)}
    found = observe(state, Observation(outcomes, {}), RULES, 1)
    assert found is not None
    assert found[0] is event


def test_a_failure_elsewhere_does_not_count_before_everybody_is_told() -> None:
    state = rollout(P.WATCHING)
    other = state.devices[-1]
    assert found_by(state, observation(**{other: Outcome.FAILED})) is None
    assert found_by(rollout(P.ROLLING), observation(**{other: Outcome.FAILED})) is E.DEVICE_FAILED


def test_a_canary_that_does_not_get_there_holds_the_rollout() -> None:
    state = rollout(P.CANARY)
    assert found_by(state, observation(Outcome.ON_THE_WAY), now=30) is None
    assert found_by(state, observation(Outcome.ON_THE_WAY), now=31) is E.STALLED


def test_rolling_waits_for_reachable_devices_only() -> None:
    state = rollout(P.ROLLING)
    assert found_by(state, observation(d1=Outcome.ON_THE_WAY)) is None
    found = observe(state, observation(d1=Outcome.OFFLINE), RULES, now=1)
    assert found is not None
    assert found[0] is E.ALL_SETTLED
    assert found[1].startswith("2/3 run the release, 1 offline")


def test_l13_who_is_away_is_told_when_he_comes_back_and_it_is_said() -> None:
    rolling = rollout(P.ROLLING, told={"d1": 0.0, "d2": 0.0})
    away = observation(d3=Outcome.OFFLINE)
    assert found_by(rolling, away) is E.ALL_SETTLED
    done, _ = step(rolling, E.ALL_SETTLED, "2/3", RULES, 5, away.outcomes)
    assert (done.phase, done.left) == (P.DONE, ("d3",))
    assert found_by(done, away) is None
    assert found_by(done, observation()) is E.ROOM  # back, and still with the release before
    told, effects = step(done, E.ROOM, "", RULES, 6, ALL_RUN)
    assert (set(told.told), effects) == (set(NAMES), (F.DESIRE,))
    assert found_by(told, observation(d3=Outcome.ON_THE_WAY)) is None
    found = observe(told, observation(), RULES, 7)
    assert found is not None
    assert found == (E.CAME_BACK, "back with the release: d3 running; 0 are still away")
    last, _ = step(told, *found, RULES, 7, ALL_RUN)
    assert (last.left, found_by(last, observation())) == ((), None)


def test_l13_an_abort_is_for_everybody_who_was_told_and_says_who_is_still_away() -> None:
    state = rollout(P.ABORTING, told={"d1": 0.0, "d2": 0.0}, reason="worse")
    away = observation(d2=Outcome.OFFLINE, d3=Outcome.ON_THE_WAY)
    found = observe(state, away, RULES, 5)
    assert found is not None
    assert found[1] == "1/2 are back on the previous release, 1 offline, 0 failed, 0 pinned; worse"
    ended, _ = step(state, *found, RULES, 5, away.outcomes)
    assert (ended.phase, ended.left) == (P.ABORTED, ("d2",))
    assert (observe(ended, observation(), RULES, 9) or ["", ""])[1].startswith("back with the previous release: d2")


def test_the_stored_form_is_read_back() -> None:
    state = rollout(P.PAUSED, watch_until=3.5, reason="x", raised={"d1": {"p": {"before": None, "added": {}}}})
    assert Rollout.from_dict(state.to_dict()) == state


@pytest.mark.parametrize(("phase", "told"), [("watching", ["b"]), ("rolling", ["a", "b", "c"]), ("pending", [])])
def test_a_rollout_of_the_version_before_goes_on(phase: str, told: list[str]) -> None:
    stored = {
        "id": "r", "release": "m@1.1", "devices": ["a", "b", "c"], "canary": ["b"], "phase": phase, "since": 5.0,
        "watch_from": 1.0, "watch_until": 9.0, "extended": 1, "reason": "",
    }  # fmt: skip
    state = Rollout.from_dict(stored)
    assert (state.canary, sorted(state.told), state.watch_until) == (("b",), told, 9.0)
    assert set(state.devices) == {"a", "b", "c"}


def test_a_canary_is_a_device_that_is_there() -> None:
    devices = [f"d{number}" for number in range(30)]
    for online in (["d7"], ["d7", "d8", "d9"], devices):
        canary = begin("r", "m@1.1", devices, RolloutRules(), 0.0, online).canary
        assert len(canary) == 3
        assert set(online[:3]) <= set(canary) or set(canary) <= set(online)
    assert set(begin("r", "m@1.1", devices, RolloutRules(), 0.0, ["d7"]).canary) > {"d7"}


def test_a_pinned_device_is_passed_by() -> None:
    waiting = rollout(P.CANARY, cohorts=(2, 3), told=dict.fromkeys(NAMES, 0.0))
    pinned = waiting.canary[1]
    assert found_by(waiting, observation(**{pinned: Outcome.PINNED})) is E.CANARY_RUNNING
    found = observe(rollout(P.ROLLING), observation(d3=Outcome.PINNED), RULES, 1)
    assert found is not None
    assert found[0] is E.ALL_SETTLED
    assert "2/3 run the release" in found[1]
    assert "1 pinned" in found[1]


def test_a_canary_of_pinned_devices_shows_nothing_and_waits_for_a_person() -> None:
    state = rollout(P.CANARY)
    found = observe(state, observation(**{state.canary[0]: Outcome.PINNED}), RULES, 1)
    assert found is not None
    assert found[0] is E.STALLED
    assert f"pinned to another release: {state.canary[0]}" in found[1]


# Steps, pauses, and how many may be on their way.

THREE = RolloutRules(steps=(0.1, 0.5, 1.0), watches=(100, 50), install_s_max=30)
FORTY_SEVEN = tuple(f"d{number}" for number in range(47))


def test_l11_steps_widen_each_with_its_own_watch() -> None:
    now, state, sizes, watched = 0.0, begin("r1", "m@1.1", FORTY_SEVEN, THREE, 0), [], []
    runs = dict.fromkeys(FORTY_SEVEN, Outcome.RUNNING)
    for _ in range(400):
        found = observe(state, Observation(runs, {}, GOOD), THREE, now)
        if found is not None:
            before = state
            state, _ = step(state, *found, THREE, now, runs)
            if F.DESIRE in TABLE[before.phase, found[0]][1]:
                sizes.append(len(state.told))
            if state.phase is P.WATCHING:
                watched.append(state.watch_until - state.watch_from)
        now += 1
    assert (sizes, watched, state.phase) == ([5, 24, 47], [100, 50], P.DONE)


def test_a_promoted_rollout_goes_to_everybody_at_once() -> None:
    watching = rollout(P.WATCHING, THREE, FORTY_SEVEN)
    after, _ = step(watching, E.PROMOTE, "by hand", THREE, 1, dict.fromkeys(FORTY_SEVEN, Outcome.RUNNING))
    assert (after.phase, len(after.told)) == (P.ROLLING, 47)


@pytest.mark.parametrize(
    ("steps", "watches", "said"),
    [
        ((1.0,), (), "growing shares"),
        ((0.5, 0.1, 1.0), (1, 1), "growing shares"),
        ((0.1, 0.9), (1,), "with 1 as the last"),
        ((0.0, 1.0), (1,), "growing shares"),
        ((0.1, 0.5, 1.0), (1,), "1 watches for 3 steps"),
        ((0.1, 1.0), (0,), "needs its seconds"),
    ],
)
def test_steps_that_make_no_sense_are_refused(steps: tuple[float, ...], watches: tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RolloutRules(steps=steps, watches=watches)


def test_a_pause_stops_the_clock_of_the_watch() -> None:
    watching = rollout(P.WATCHING, since=10.0, watch_from=10.0, watch_until=110.0)
    paused, _ = step(watching, E.PAUSE, "lunch", RULES, 30)
    assert paused.phase is P.PAUSED
    assert found_by(paused, observation(judged=GOOD), now=500) is None
    resumed, _ = step(paused, E.RESUME, "", RULES, 1000)
    assert (resumed.phase, resumed.watch_until, resumed.paused_in) == (P.WATCHING, 1080.0, None)


def test_nobody_else_is_told_while_it_is_paused() -> None:
    rules = replace(RULES, disruption_max=1)
    rolling = rollout(P.ROLLING, rules, told={"d1": 0.0})
    assert found_by(rolling, observation(), rules) is E.ROOM
    paused, _ = step(rolling, E.PAUSE, "", rules, 1)
    assert found_by(paused, observation(), rules) is None
    resumed, _ = step(paused, E.RESUME, "", rules, 2)
    assert found_by(resumed, observation(), rules) is E.ROOM


def test_at_most_so_many_are_on_their_way_at_once() -> None:
    """A fleet of forty-seven, of whom one goes away on his way: never more than three, and all get there."""
    rules = replace(RULES, disruption_max=3)
    state = begin("r1", "m@1.1", FORTY_SEVEN, rules, 0)
    arrives: dict[str, float] = {}
    lost, now, most = "", 0.0, 0
    while state.phase is not P.DONE and now < 10_000:
        for name in state.told:
            arrives.setdefault(name, now + 5)
        if state.phase is P.ROLLING and not lost:
            lost = next(iter(set(state.told) - set(state.canary)), "")
            arrives[lost] = 1e9
        fleet = {
            name: (Outcome.OFFLINE if name == lost else Outcome.ON_THE_WAY)
            if now < arrives.get(name, 0)
            else Outcome.RUNNING
            for name in FORTY_SEVEN
        }
        most = max(
            most, sum(now < at and (name != lost or now - state.told[name] < 30) for name, at in arrives.items())
        )
        found = observe(state, Observation(fleet, {}, GOOD), rules, now)
        if found is not None:
            state, _ = step(state, *found, rules, now, fleet)
        now += 1
    assert state.phase is P.DONE
    assert (most, state.left, len(state.told)) == (3, (lost,), 47)
