"""The life of an update, as a table: (state, event) -> (state, effects).

The updater saves the new state, then runs its effects; every effect is idempotent, and after a restart the event
RESTARTED finds here which effects to run again. Time is not known here.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where the update of one slot stands."""

    IDLE = "idle"
    ACCEPTED = "accepted"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    PROVING = "proving"
    STAGED = "staged"
    SWITCHED = "switched"
    COMMITTED = "committed"
    REVERTING = "reverting"
    REVERTED = "reverted"
    FAILED = "failed"


class Event(StrEnum):
    """What happened to it."""

    DESIRED = "desired"  # desired state names another release than the one that is active or under way
    WITHDRAWN = "withdrawn"  # desired state names the active release again
    ADMITTED = "admitted"
    REFUSED = "refused"  # known to be bad, no room, no base: what says nothing against its bytes, or is known already
    DOWNLOADED = "downloaded"
    FETCH_FAILED = "fetch_failed"
    VERIFIED = "verified"
    VERIFY_FAILED = "verify_failed"
    PROVED = "proved"
    PROVE_FAILED = "prove_failed"
    FLIPPED = "flipped"
    FLIP_FAILED = "flip_failed"
    BASE_GONE = "base_gone"  # an adapter's base was replaced under it
    HEALTHY = "healthy"  # probation is over and nothing was wrong
    UNHEALTHY = "unhealthy"
    BACK = "back"  # the previous release serves again
    RESTARTED = "restarted"  # the daemon came up in this state
    LOOPED = "looped"  # the daemon came up in this state too often
    ROLLED_BACK = "rolled_back"  # a person says: the one before
    ALLOWED = "allowed"  # a person says: what failed here, or was put back, may be tried again


class Effect(StrEnum):
    """What to do about it; all idempotent."""

    ADMIT = "admit"
    DOWNLOAD = "download"
    VERIFY = "verify"
    PROVE = "prove"
    FLIP = "flip"
    WATCH = "watch"  # start (or go on with) probation
    COMMIT = "commit"  # the release is active for good; what is older than its predecessor may go
    FLIP_BACK = "flip_back"
    REMEMBER_BAD = "remember_bad"  # done together with the saving of the state: never one without the other
    DISCARD = "discard"  # the candidate's files
    REPORT = "report"


S, E, F = State, Event, Effect

# What a new desire does where nothing has been switched yet: whatever was under way is dropped, the new one begins.
_ANEW = (S.ACCEPTED, (F.ADMIT, F.REPORT))
_GIVEN_UP = (S.FAILED, (F.DISCARD, F.REPORT))
_BAD = (S.FAILED, (F.REMEMBER_BAD, F.DISCARD, F.REPORT))
_REVERT = (S.REVERTING, (F.REMEMBER_BAD, F.FLIP_BACK))
_BACK = (S.REVERTING, (F.FLIP_BACK, F.REPORT))  # nothing is known against the release

TABLE: dict[tuple[State, Event], tuple[State, tuple[Effect, ...]]] = {
    (S.IDLE, E.DESIRED): _ANEW,
    (S.IDLE, E.RESTARTED): (S.IDLE, ()),
    (S.IDLE, E.ROLLED_BACK): _BACK,
    (S.COMMITTED, E.DESIRED): _ANEW,
    (S.COMMITTED, E.RESTARTED): (S.COMMITTED, ()),
    (S.COMMITTED, E.LOOPED): _REVERT,  # it crashes before it has served for a while: its probation was too short
    (S.COMMITTED, E.ROLLED_BACK): _BACK,
    (S.REVERTED, E.DESIRED): _ANEW,
    (S.REVERTED, E.RESTARTED): (S.REVERTED, ()),
    (S.REVERTED, E.ROLLED_BACK): _BACK,
    (S.REVERTED, E.ALLOWED): (S.IDLE, (F.REPORT,)),
    (S.FAILED, E.DESIRED): _ANEW,
    (S.FAILED, E.WITHDRAWN): (S.IDLE, (F.REPORT,)),
    (S.FAILED, E.RESTARTED): (S.FAILED, ()),
    (S.FAILED, E.ROLLED_BACK): _BACK,
    (S.FAILED, E.ALLOWED): (S.IDLE, (F.REPORT,)),
    #
    (S.ACCEPTED, E.ADMITTED): (S.DOWNLOADING, (F.DOWNLOAD, F.REPORT)),
    (S.ACCEPTED, E.REFUSED): _GIVEN_UP,
    (S.ACCEPTED, E.DESIRED): _ANEW,
    (S.ACCEPTED, E.WITHDRAWN): (S.IDLE, (F.DISCARD, F.REPORT)),
    (S.ACCEPTED, E.ROLLED_BACK): _BACK,
    (S.ACCEPTED, E.RESTARTED): (S.ACCEPTED, (F.ADMIT,)),
    (S.ACCEPTED, E.LOOPED): _BAD,
    #
    (S.DOWNLOADING, E.DOWNLOADED): (S.VERIFYING, (F.VERIFY, F.REPORT)),
    (S.DOWNLOADING, E.FETCH_FAILED): (S.FAILED, (F.REPORT,)),  # the parts stay: a later try resumes
    (S.DOWNLOADING, E.VERIFY_FAILED): _BAD,  # what arrived is not what was promised
    (S.DOWNLOADING, E.DESIRED): _ANEW,
    (S.DOWNLOADING, E.WITHDRAWN): (S.IDLE, (F.DISCARD, F.REPORT)),
    (S.DOWNLOADING, E.ROLLED_BACK): _BACK,
    (S.DOWNLOADING, E.RESTARTED): (S.DOWNLOADING, (F.DOWNLOAD,)),
    (S.DOWNLOADING, E.LOOPED): _GIVEN_UP,
    #
    (S.VERIFYING, E.VERIFIED): (S.PROVING, (F.PROVE, F.REPORT)),
    (S.VERIFYING, E.VERIFY_FAILED): _BAD,
    (S.VERIFYING, E.REFUSED): (S.FAILED, (F.REPORT,)),  # an adapter whose base is not here: nothing is wrong with it
    (S.VERIFYING, E.DESIRED): _ANEW,
    (S.VERIFYING, E.WITHDRAWN): (S.IDLE, (F.DISCARD, F.REPORT)),
    (S.VERIFYING, E.ROLLED_BACK): _BACK,
    (S.VERIFYING, E.RESTARTED): (S.VERIFYING, (F.VERIFY,)),
    (S.VERIFYING, E.LOOPED): _BAD,
    #
    (S.PROVING, E.PROVED): (S.STAGED, (F.FLIP,)),
    (S.PROVING, E.PROVE_FAILED): _BAD,
    (S.PROVING, E.REFUSED): _GIVEN_UP,  # too little memory to find out
    (S.PROVING, E.DESIRED): _ANEW,
    (S.PROVING, E.WITHDRAWN): (S.IDLE, (F.DISCARD, F.REPORT)),
    (S.PROVING, E.ROLLED_BACK): _BACK,
    (S.PROVING, E.RESTARTED): (S.PROVING, (F.PROVE,)),
    (S.PROVING, E.LOOPED): _BAD,
    #
    (S.STAGED, E.FLIPPED): (S.SWITCHED, (F.WATCH, F.REPORT)),
    (S.STAGED, E.FLIP_FAILED): _BAD,
    (S.STAGED, E.REFUSED): _GIVEN_UP,  # it does not fit after all
    (S.STAGED, E.ROLLED_BACK): _BACK,  # a flip under way ends first: one worker does both
    (S.STAGED, E.BASE_GONE): (S.FAILED, (F.REPORT,)),
    (S.STAGED, E.RESTARTED): (S.STAGED, (F.FLIP,)),
    (S.STAGED, E.LOOPED): _BAD,
    #
    (S.SWITCHED, E.HEALTHY): (S.COMMITTED, (F.COMMIT, F.REPORT)),
    (S.SWITCHED, E.UNHEALTHY): _REVERT,
    # A new desire waits until probation has ended: desired state is looked at again then.
    (S.SWITCHED, E.DESIRED): (S.SWITCHED, ()),
    (S.SWITCHED, E.RESTARTED): (S.SWITCHED, (F.FLIP, F.WATCH)),
    (S.SWITCHED, E.FLIPPED): (S.SWITCHED, ()),  # loaded again after a restart
    (S.SWITCHED, E.FLIP_FAILED): _REVERT,
    (S.SWITCHED, E.REFUSED): _BACK,  # started with less memory, it does not fit any more
    (S.SWITCHED, E.ROLLED_BACK): _BACK,
    (S.SWITCHED, E.BASE_GONE): (S.FAILED, (F.REPORT,)),  # it left with its base
    (S.SWITCHED, E.LOOPED): _REVERT,
    #
    (S.REVERTING, E.BACK): (S.REVERTED, (F.DISCARD, F.REPORT)),
    (S.REVERTING, E.RESTARTED): (S.REVERTING, (F.FLIP_BACK,)),
    (S.REVERTING, E.LOOPED): (S.REVERTING, (F.FLIP_BACK,)),  # there is nothing else that serves: keep trying
}

# States in which a candidate is being worked on, so that a restart in them counts against it.
UNDER_WAY = frozenset({S.ACCEPTED, S.DOWNLOADING, S.VERIFYING, S.PROVING, S.STAGED, S.SWITCHED, S.REVERTING})
RESTARTS_MAX = 3
# A release that was committed is still on trial until it has served this long in one go: crashes before that are its own.
SETTLED_S = 600.0
# States in which the candidate takes the place of the active release: the way back from them is that one.
SWITCHING = frozenset({State.STAGED, State.SWITCHED})


def step(state: State, event: Event) -> tuple[State, tuple[Effect, ...]]:
    """The next state and its effects. An event that means nothing in a state changes nothing (a late worker's answer
    after the update was superseded)."""
    return TABLE.get((state, event), (state, ()))
