"""Which tier is asked, who counts as alive, and that every question ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.core.tiers import (
    ALIVE_BEATS,
    HOPS_MAX,
    RESPONDERS_MAX,
    RETURN_SHARE,
    Beat,
    Choice,
    Presence,
    Stay,
    Waits,
    choose,
    onward,
    waits,
)

EVERY_S = 10.0


def beat(number: int, device: str = "big1", boot: str = "b1", online: bool = True) -> Beat:
    return Beat(f"m{number}", device, boot, online, EVERY_S)


class Observer:
    """A presence with one responder `big1.r` of tier big, task detect."""

    def __init__(self) -> None:
        self.presence = Presence()

    def hears(self, beat: Beat, at: float, responder: str = "big1.r") -> bool:
        return self.presence.heard("big", "detect", responder, beat, at)

    def living(self, at: float, *but: str) -> bool:
        return self.presence.living("big", "detect", at, but)


def test_a_responder_is_gone_after_three_missed_beats_and_back_with_the_next() -> None:
    observer = Observer()
    assert not observer.living(0)
    assert observer.hears(beat(1), 100)
    assert observer.living(100 + ALIVE_BEATS * EVERY_S - 0.1)
    assert not observer.living(100 + ALIVE_BEATS * EVERY_S)
    assert observer.hears(beat(2), 200)
    assert not observer.hears(beat(3), 210), "it was here all the time"
    assert observer.living(210 + ALIVE_BEATS * EVERY_S - 0.1)


def test_a_retained_message_that_comes_again_does_not_bring_the_dead_back() -> None:
    observer = Observer()
    observer.hears(beat(1), 100)
    assert not observer.hears(beat(1), 125), "the same message at a reconnect is no new sign of life"
    assert not observer.living(100 + ALIVE_BEATS * EVERY_S)
    assert not observer.hears(beat(1), 1000)
    assert not observer.living(1000)


def test_who_says_goodbye_is_gone_at_once() -> None:
    observer = Observer()
    observer.hears(beat(1), 100)
    assert not observer.hears(beat(2, online=False), 101)
    assert not observer.living(101)
    assert observer.hears(beat(3), 102)


def test_a_restart_that_nobody_saw_counts_as_coming() -> None:
    observer = Observer()
    observer.hears(beat(1), 100)
    assert observer.hears(beat(2, boot="b2"), 101)


def test_only_the_tier_the_task_and_other_devices_count() -> None:
    observer = Observer()
    observer.hears(beat(1), 100)
    assert not observer.presence.living("big", "classify", 100)
    assert not observer.presence.living("bigger", "detect", 100)
    assert not observer.living(100, "dev1", "big1")
    observer.hears(beat(2, device="big2"), 100, "big2.r")
    assert observer.living(100, "dev1", "big1")


def test_what_is_remembered_is_bounded_and_the_longest_silent_is_forgotten() -> None:
    observer = Observer()
    for number in range(RESPONDERS_MAX):
        observer.hears(beat(number, f"d{number}"), 100, f"d{number}.r")
    observer.hears(beat(RESPONDERS_MAX, "d0"), 101, "d0.r")
    assert observer.hears(beat(RESPONDERS_MAX + 1, "new"), 102, "new.r")
    assert not observer.hears(beat(RESPONDERS_MAX + 2, "d0"), 103, "d0.r"), "d0 is still known"
    assert observer.hears(beat(RESPONDERS_MAX + 3, "d1"), 103, "d1.r"), "d1 was forgotten"


@pytest.mark.parametrize(
    ("tiers", "living", "expected"),
    [
        (("line", "plant"), {"line", "plant"}, Choice("line", True)),
        (("line", "plant"), {"plant"}, Choice("plant", True)),
        (("line", "plant"), {"elsewhere"}, Choice("line", False)),
        (("line",), set(), Choice("line", False)),
    ],
)
def test_the_first_tier_that_lives_is_asked(tiers: tuple[str, ...], living: set[str], expected: Choice) -> None:
    assert choose(tiers, living.__contains__) == expected


@pytest.mark.parametrize(
    ("hops", "living", "expected"),
    [
        (0, {"top"}, "top"),
        (HOPS_MAX - 1, {"top"}, "top"),
        (0, {"spare"}, "spare"),
        (0, set(), Stay("nobody who has not had the question is in top or spare")),
        (HOPS_MAX, {"top"}, Stay(f"the question has made {HOPS_MAX} hops, the most it may")),
    ],
)
def test_a_question_goes_on_while_it_may_and_somebody_is_there(
    hops: int, living: set[str], expected: str | Stay
) -> None:
    assert onward(("top", "spare"), hops, living.__contains__) == expected


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (None, Waits(60, 120, None)),  # nobody waits at the origin
        (0.0, Waits(60, 120, None)),  # nor any longer
        (-3.0, Waits(60, 120, None)),
        (5.0, Waits(5 * RETURN_SHARE, 5 * RETURN_SHARE + 60, 5 * RETURN_SHARE)),
        (1000.0, Waits(60, 120, 1000 * RETURN_SHARE)),
    ],
)
def test_the_own_answer_comes_in_time_and_a_better_one_is_waited_for(left: float | None, expected: Waits) -> None:
    assert waits(left, 60) == expected


@given(left=st.floats(0.001, 1e6), wait=st.floats(0.001, 1e6), hops=st.integers(1, HOPS_MAX))
def test_each_hop_grants_less_than_it_has_and_keeps_time_for_the_way_back(left: float, wait: float, hops: int) -> None:
    for _ in range(hops):
        waiting = waits(left, wait)
        assert waiting.answer_within is not None
        assert 0 < waiting.speak <= waiting.answer_within < left
        assert waiting.speak <= waiting.forget
        left = waiting.answer_within


@st.composite
def plants(draw: st.DrawFn) -> tuple[dict[str, set[str]], dict[str, list[str]]]:
    """Who is in each tier, and which tiers each of them asks: any arrangement, loops and devices in two tiers included."""
    tiers = [f"t{n}" for n in range(draw(st.integers(1, 4)))]
    devices = [f"d{n}" for n in range(draw(st.integers(1, 5)))]
    members = {tier: draw(st.sets(st.sampled_from(devices))) for tier in tiers}
    asks = {device: draw(st.lists(st.sampled_from(tiers), min_size=1, max_size=3, unique=True)) for device in devices}
    return members, asks


@given(plants(), st.data())
def test_every_question_ends_whoever_asks_whom(
    plant: tuple[dict[str, set[str]], dict[str, list[str]]], data: st.DataObject
) -> None:
    members, asks = plant
    path, hops = ["origin"], 0
    tier: str | Stay = data.draw(st.sampled_from(sorted(members)))
    while isinstance(tier, str) and members[tier]:
        device = data.draw(st.sampled_from(sorted(members[tier])))  # the broker's choice, not ours
        if device in path:
            break  # it says so, and whoever sent it answers himself
        path.append(device)

        def living(wanted: str) -> bool:
            return bool(members[wanted] - set(path))

        tier = onward(asks[device], hops, living)
        hops += isinstance(tier, str)
        assert hops <= HOPS_MAX
    assert len(path) == len(set(path)) <= HOPS_MAX + 2
