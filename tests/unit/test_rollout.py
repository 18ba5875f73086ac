from __future__ import annotations

import math
from dataclasses import replace

import pytest

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
    Window,
    begin,
    judge,
    observe,
    step,
)

RULES = RolloutRules(watch_s=100, items_min=50, extend_max=1, install_s_max=30)
P, E, F = Phase, Event, Effect
BACK = (F.RESTORE, F.ANNOUNCE)

# (phase, event) -> what a person who runs the fleet expects; every pair that is not here must change nothing.
EXPECTED = {
    (P.PENDING, E.START): (P.CANARY, (F.DESIRE_CANARY, F.ANNOUNCE)),
    (P.PENDING, E.ABORT): (P.ABORTED, (F.GIVE_BACK, F.ANNOUNCE)),
    (P.CANARY, E.CANARY_RUNNING): (P.WATCHING, (F.ANNOUNCE,)),
    (P.CANARY, E.DEVICE_FAILED): (P.ABORTING, BACK),
    (P.CANARY, E.STALLED): (P.HELD, (F.ANNOUNCE,)),
    (P.CANARY, E.ABORT): (P.ABORTING, BACK),
    (P.WATCHING, E.BETTER_OR_SAME): (P.ROLLING, (F.DESIRE_ALL, F.ANNOUNCE)),
    (P.WATCHING, E.WORSE): (P.ABORTING, BACK),
    (P.WATCHING, E.DEVICE_FAILED): (P.ABORTING, BACK),
    (P.WATCHING, E.TOO_LITTLE): (P.WATCHING, (F.ANNOUNCE,)),
    (P.WATCHING, E.UNDECIDED): (P.HELD, (F.ANNOUNCE,)),
    (P.WATCHING, E.ABORT): (P.ABORTING, BACK),
    (P.WATCHING, E.PROMOTE): (P.ROLLING, (F.DESIRE_ALL, F.ANNOUNCE)),
    (P.ROLLING, E.ALL_SETTLED): (P.DONE, (F.CONFIRM, F.ANNOUNCE)),
    (P.ROLLING, E.DEVICE_FAILED): (P.ABORTING, BACK),
    (P.ROLLING, E.ABORT): (P.ABORTING, BACK),
    (P.HELD, E.PROMOTE): (P.ROLLING, (F.DESIRE_ALL, F.ANNOUNCE)),
    (P.HELD, E.DEVICE_FAILED): (P.ABORTING, BACK),
    (P.HELD, E.ABORT): (P.ABORTING, BACK),
    (P.ABORTING, E.ALL_SETTLED): (P.ABORTED, (F.GIVE_BACK, F.ANNOUNCE)),
}


def rollout(phase: Phase, **changes: object) -> Rollout:
    fresh = begin("r1", "digits@1.1", ["d1", "d2", "d3"], RULES, now=0)
    return replace(fresh, phase=phase, **changes)  # type: ignore[arg-type]


def observation(default: Outcome = Outcome.RUNNING, **outcomes: Outcome) -> Observation:
    everybody = {device: outcomes.get(device, default) for device in ("d1", "d2", "d3")}
    return Observation(everybody, dict.fromkeys(everybody, "golden set"), Window(), Window())


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", Event)
def test_every_row(phase: Phase, event: Event) -> None:
    before = rollout(phase)
    after, effects = step(before, event, "because", RULES, now=7)
    if (phase, event) not in EXPECTED:
        assert (after, effects) == (before, ())
        return
    assert (after.phase, effects) == EXPECTED[phase, event]
    assert after.reason == "because"


def test_every_open_phase_can_end_in_success_or_abort() -> None:
    for phase in OPEN - {P.ABORTING}:
        assert TABLE[phase, E.ABORT][0] in (P.ABORTING, P.ABORTED)


@pytest.mark.parametrize(("devices", "canaries"), [(1, 1), (3, 1), (10, 1), (11, 2), (47, 5), (100, 10), (70, 7)])
def test_canary_is_the_ceiling_of_ten_per_cent(devices: int, canaries: int) -> None:
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


@pytest.mark.parametrize(
    ("canary", "control", "may_extend", "event"),
    [
        (Window(100, 10), Window(100, 40), True, E.BETTER_OR_SAME),
        (Window(100, 42), Window(100, 40), True, E.BETTER_OR_SAME),  # within the margin of 0.02
        (Window(100, 43), Window(100, 40), True, E.WORSE),
        (Window(100, 0, errors=2), Window(100, 40), True, E.WORSE),
        (Window(49, 0), Window(100, 40), True, E.TOO_LITTLE),
        (Window(100, 0), Window(49, 40), True, E.TOO_LITTLE),
        (Window(100, 0), Window(0, 0), False, E.UNDECIDED),
        (Window(0, 0), Window(0, 0), False, E.UNDECIDED),
    ],
)
def test_judges_the_canary(canary: Window, control: Window, may_extend: bool, event: Event) -> None:
    assert judge(canary, control, may_extend, RULES)[0] is event


def test_what_is_no_number_never_passes() -> None:
    broken = replace(Window(100), escalated=math.nan)  # type: ignore[arg-type]
    assert judge(broken, Window(100, 40), True, RULES)[0] is E.WORSE


def test_nothing_passes_before_the_watch_is_over() -> None:
    seen = replace(observation(), canary=Window(1000, 0), control=Window(1000, 900))
    watching = rollout(P.WATCHING, watch_until=100.0)
    assert observe(watching, seen, RULES, now=99) is None
    assert (observe(watching, seen, RULES, now=100) or [None])[0] is E.BETTER_OR_SAME


def test_too_little_evidence_extends_then_holds() -> None:
    now, state = 0.0, rollout(P.CANARY)
    events = []
    for _ in range(10):
        found = observe(state, observation(), RULES, now)
        if found is not None:
            events.append(found[0])
            state, _ = step(state, *found, RULES, now)
        now += 50
    assert events == [E.CANARY_RUNNING, E.TOO_LITTLE, E.UNDECIDED]
    assert state.phase is P.HELD
    assert "promote or abort" in state.reason


def test_one_failed_canary_is_too_many_in_every_phase() -> None:
    for phase in (P.CANARY, P.WATCHING, P.ROLLING, P.HELD):
        state = rollout(phase, watch_until=1e9)
        found = observe(state, observation(**{state.canary[0]: Outcome.FAILED}), RULES, now=1)
        assert found is not None
        assert found[0] is E.DEVICE_FAILED
        assert "golden set" in found[1]


def test_a_failure_elsewhere_does_not_count_before_everybody_is_told() -> None:
    state = rollout(P.WATCHING, watch_until=100.0)
    other = next(device for device in state.devices if device not in state.canary)
    assert observe(state, observation(**{other: Outcome.FAILED}), RULES, now=1) is None
    rolling = replace(state, phase=P.ROLLING)
    assert (observe(rolling, observation(**{other: Outcome.FAILED}), RULES, now=1) or [None])[0] is E.DEVICE_FAILED


def test_a_canary_that_does_not_get_there_holds_the_rollout() -> None:
    state = rollout(P.CANARY)
    assert observe(state, observation(Outcome.ON_THE_WAY), RULES, now=30) is None
    assert (observe(state, observation(Outcome.ON_THE_WAY), RULES, now=31) or [None])[0] is E.STALLED


def test_rolling_waits_for_reachable_devices_only() -> None:
    state = rollout(P.ROLLING)
    assert observe(state, observation(d1=Outcome.ON_THE_WAY), RULES, now=1) is None
    found = observe(state, observation(d1=Outcome.OFFLINE), RULES, now=1)
    assert found is not None
    assert found[0] is E.ALL_SETTLED
    assert found[1].startswith("2/3 run the release, 1 offline")


def test_the_stored_form_is_read_back() -> None:
    state = rollout(P.WATCHING, watch_until=3.5, reason="x")
    assert Rollout.from_dict(state.to_dict()) == state


def test_a_canary_is_a_device_that_is_there() -> None:
    devices = [f"d{number}" for number in range(30)]
    for online in (["d7"], ["d7", "d8", "d9"], devices):
        canary = begin("r", "m@1.1", devices, RolloutRules(), 0.0, online).canary
        assert len(canary) == 3
        assert set(online[:3]) <= set(canary) or set(canary) <= set(online)
    assert set(begin("r", "m@1.1", devices, RolloutRules(), 0.0, ["d7"]).canary) > {"d7"}


def test_a_pinned_device_is_passed_by() -> None:
    waiting = rollout(P.CANARY, canary=("d1", "d2"))
    found = observe(waiting, observation(d2=Outcome.PINNED), RULES, 1)
    assert found is not None
    assert found[0] is E.CANARY_RUNNING
    found = observe(rollout(P.ROLLING), observation(d3=Outcome.PINNED), RULES, 1)
    assert found is not None
    assert found[0] is E.ALL_SETTLED
    assert "2/3 run the release" in found[1]
    assert "1 pinned" in found[1]


def test_a_canary_of_pinned_devices_shows_nothing_and_waits_for_a_person() -> None:
    found = observe(rollout(P.CANARY, canary=("d1",)), observation(d1=Outcome.PINNED), RULES, 1)
    assert found is not None
    assert found[0] is E.STALLED
    assert "pinned to another release: d1" in found[1]
