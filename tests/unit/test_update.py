"""The update table, row by row, and what must hold of it as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.core.update import TABLE, UNDER_WAY, Effect, Event, State, step

S, E, F = State, Event, Effect
# Written a second time, as a story, so that a slip in the table is seen: (state, event) -> state and effects.
ANEW = (S.ACCEPTED, {F.ADMIT, F.REPORT})
NOTHING_BEGUN = (S.IDLE, {F.DISCARD, F.REPORT})
BAD = (S.FAILED, {F.REMEMBER_BAD, F.DISCARD, F.REPORT})
GIVEN_UP = (S.FAILED, {F.DISCARD, F.REPORT})
BACK = (S.REVERTING, {F.REMEMBER_BAD, F.FLIP_BACK})
BY_HAND = (S.REVERTING, {F.FLIP_BACK, F.REPORT})
EXPECTED: dict[tuple[State, Event], tuple[State, set[Effect]]] = {
    # At rest, every new desire begins anew; a restart does nothing.
    **{(state, E.DESIRED): ANEW for state in (S.IDLE, S.COMMITTED, S.REVERTED, S.FAILED)},
    **{(state, E.RESTARTED): (state, set()) for state in (S.IDLE, S.COMMITTED, S.REVERTED, S.FAILED)},
    (S.FAILED, E.WITHDRAWN): (S.IDLE, {F.REPORT}),
    # Before the switch, another desire replaces what is under way, and a withdrawn one ends it.
    **{(state, E.DESIRED): ANEW for state in (S.ACCEPTED, S.DOWNLOADING, S.VERIFYING, S.PROVING)},
    **{(state, E.WITHDRAWN): NOTHING_BEGUN for state in (S.ACCEPTED, S.DOWNLOADING, S.VERIFYING, S.PROVING)},
    # The way of a good release.
    (S.ACCEPTED, E.ADMITTED): (S.DOWNLOADING, {F.DOWNLOAD, F.REPORT}),
    (S.DOWNLOADING, E.DOWNLOADED): (S.VERIFYING, {F.VERIFY, F.REPORT}),
    (S.VERIFYING, E.VERIFIED): (S.PROVING, {F.PROVE, F.REPORT}),
    (S.PROVING, E.PROVED): (S.STAGED, {F.FLIP}),
    (S.STAGED, E.FLIPPED): (S.SWITCHED, {F.WATCH, F.REPORT}),
    (S.SWITCHED, E.HEALTHY): (S.COMMITTED, {F.COMMIT, F.REPORT}),
    # The ways of a bad one. Only what speaks against its bytes is remembered.
    (S.ACCEPTED, E.REFUSED): GIVEN_UP,
    (S.DOWNLOADING, E.FETCH_FAILED): (S.FAILED, {F.REPORT}),
    (S.DOWNLOADING, E.VERIFY_FAILED): BAD,
    (S.VERIFYING, E.VERIFY_FAILED): BAD,
    (S.VERIFYING, E.REFUSED): (S.FAILED, {F.REPORT}),
    (S.PROVING, E.PROVE_FAILED): BAD,
    (S.STAGED, E.FLIP_FAILED): BAD,
    # Too little memory is not the release's fault, wherever it is found out.
    (S.PROVING, E.REFUSED): GIVEN_UP,
    (S.STAGED, E.REFUSED): GIVEN_UP,
    (S.SWITCHED, E.REFUSED): BY_HAND,
    # A person's word: back to the one before, from everywhere but the way back; and once more, after that or a failure.
    **{(state, E.ROLLED_BACK): BY_HAND for state in S if state is not S.REVERTING},
    **{(state, E.ALLOWED): (S.IDLE, {F.REPORT}) for state in (S.FAILED, S.REVERTED)},
    # An adapter whose base was replaced under it: nothing is wrong with it.
    (S.STAGED, E.BASE_GONE): (S.FAILED, {F.REPORT}),
    (S.SWITCHED, E.BASE_GONE): (S.FAILED, {F.REPORT}),
    (S.SWITCHED, E.UNHEALTHY): BACK,
    (S.SWITCHED, E.FLIP_FAILED): BACK,
    (S.SWITCHED, E.DESIRED): (S.SWITCHED, set()),
    (S.SWITCHED, E.FLIPPED): (S.SWITCHED, set()),
    (S.REVERTING, E.BACK): (S.REVERTED, {F.DISCARD, F.REPORT}),
    # A restart does again what was being done; too many of them speak against the candidate, except while fetching.
    (S.ACCEPTED, E.RESTARTED): (S.ACCEPTED, {F.ADMIT}),
    (S.DOWNLOADING, E.RESTARTED): (S.DOWNLOADING, {F.DOWNLOAD}),
    (S.VERIFYING, E.RESTARTED): (S.VERIFYING, {F.VERIFY}),
    (S.PROVING, E.RESTARTED): (S.PROVING, {F.PROVE}),
    (S.STAGED, E.RESTARTED): (S.STAGED, {F.FLIP}),
    (S.SWITCHED, E.RESTARTED): (S.SWITCHED, {F.FLIP, F.WATCH}),
    (S.REVERTING, E.RESTARTED): (S.REVERTING, {F.FLIP_BACK}),
    (S.ACCEPTED, E.LOOPED): BAD,
    (S.DOWNLOADING, E.LOOPED): GIVEN_UP,
    (S.VERIFYING, E.LOOPED): BAD,
    (S.PROVING, E.LOOPED): BAD,
    (S.STAGED, E.LOOPED): BAD,
    (S.SWITCHED, E.LOOPED): BACK,
    (S.COMMITTED, E.LOOPED): BACK,
    (S.REVERTING, E.LOOPED): (S.REVERTING, {F.FLIP_BACK}),
}
ANSWERS = {  # the events with which an effect can end
    F.ADMIT: {E.ADMITTED, E.REFUSED},
    F.DOWNLOAD: {E.DOWNLOADED, E.FETCH_FAILED, E.VERIFY_FAILED},
    F.VERIFY: {E.VERIFIED, E.VERIFY_FAILED, E.REFUSED},
    F.PROVE: {E.PROVED, E.PROVE_FAILED, E.REFUSED},
    F.FLIP: {E.FLIPPED, E.FLIP_FAILED, E.REFUSED},
    F.WATCH: {E.HEALTHY, E.UNHEALTHY},
    F.FLIP_BACK: {E.BACK},
}


@pytest.mark.parametrize(("state", "event"), EXPECTED, ids=lambda value: value.value)
def test_row(state: State, event: Event) -> None:
    target, effects = step(state, event)
    assert (target, set(effects)) == EXPECTED[state, event]


def test_there_is_no_row_that_nobody_thought_of() -> None:
    assert TABLE.keys() == EXPECTED.keys()


def test_the_documented_table_is_this_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "updates.md").read_text()
    shown = [line for line in text[text.index("## The table") :].splitlines() if line.startswith("| `")]
    assert shown == [f"| `{s}` | `{e}` | `{t}` | {', '.join(f) or '-'} |" for (s, e), (t, f) in TABLE.items()]
    assert {state for state in State if f"`{state}`" in text[: text.index("## What never")]} == set(State)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_an_event_that_means_nothing_changes_nothing(state: State, event: Event) -> None:
    if (state, event) not in TABLE:
        assert step(state, event) == (state, ())


def test_every_state_can_be_reached() -> None:
    reached, before = {S.IDLE}, set()
    while reached != before:
        before = set(reached)
        reached |= {target for (state, _), (target, _) in TABLE.items() if state in reached}
    assert reached == set(State)


@pytest.mark.parametrize("state", UNDER_WAY)
def test_work_under_way_is_taken_up_again_after_a_restart_and_not_for_ever(state: State) -> None:
    same, effects = TABLE[state, E.RESTARTED]
    assert same is state
    assert effects
    after, _ = TABLE[state, E.LOOPED]
    assert after not in UNDER_WAY or after is S.REVERTING


@pytest.mark.parametrize("state", UNDER_WAY)
def test_every_way_an_act_can_end_leads_on(state: State) -> None:
    _, effects = TABLE[state, E.RESTARTED]  # what is being done in this state
    answers = set().union(*(ANSWERS.get(effect, set()) for effect in effects))
    assert answers
    for event in answers:
        assert (state, event) in TABLE, f"{event} in {state} would be ignored: the update would hang"


def test_the_candidate_is_live_only_after_it_was_verified_and_proved() -> None:
    """Every path to the flip goes through the events that show that the release is good."""
    for needed in (E.ADMITTED, E.DOWNLOADED, E.VERIFIED, E.PROVED):
        reached, before = {S.IDLE}, set()
        while reached != before:
            before = set(reached)
            reached |= {t for (state, event), (t, _) in TABLE.items() if state in reached and event is not needed}
        assert not {S.STAGED, S.SWITCHED, S.COMMITTED} & reached, f"a release could be live without {needed}"


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_no_sequence_of_events_leaves_a_dead_end_or_a_device_without_a_good_model(events: list[Event]) -> None:
    state, on_trial = S.IDLE, False
    for event in events:
        state, effects = step(state, event)
        on_trial = (on_trial or F.FLIP in effects) and not {F.COMMIT, F.FLIP_BACK} & set(effects) and state in UNDER_WAY
        if event in {E.ROLLED_BACK, E.REFUSED, E.WITHDRAWN, E.ALLOWED}:
            assert F.REMEMBER_BAD not in effects, "nothing is known against its bytes"
        if F.DISCARD in effects or F.REMEMBER_BAD in effects:
            assert F.COMMIT not in effects
        # Whoever is on trial is live, or about to be; everywhere else the committed release serves.
        assert on_trial == (state in {S.STAGED, S.SWITCHED})
    # From here the world behaves: whatever is asked succeeds. A new desire must then come through.
    for _ in range(20):
        if state is S.COMMITTED:
            break
        good = {
            S.ACCEPTED: E.ADMITTED, S.DOWNLOADING: E.DOWNLOADED, S.VERIFYING: E.VERIFIED, S.PROVING: E.PROVED,
            S.STAGED: E.FLIPPED, S.SWITCHED: E.HEALTHY, S.REVERTING: E.BACK,
        }.get(state, E.DESIRED)  # fmt: skip
        state, _ = step(state, good)
    assert state is S.COMMITTED


def test_a_commit_is_always_preceded_by_a_flip() -> None:
    """In whatever order things happen: every way through the table."""
    reached, ways, commits = {(S.IDLE, False)}, [(S.IDLE, False)], 0
    for state, flipped in ways:
        for event in Event:
            after, effects = step(state, event)
            if F.COMMIT in effects:
                assert flipped, f"{state} commits at {event}"
                commits += 1
            flips = flipped or (event is E.FLIPPED and state is S.STAGED)
            way = (after, flips and F.COMMIT not in effects)
            if way not in reached:
                reached.add(way)
                ways.append(way)
    assert commits
