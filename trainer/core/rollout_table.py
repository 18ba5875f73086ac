"""The table of a rollout: (phase, event) -> (phase, effects). What is not here changes nothing.

`trainer.core.rollout` says what turns observations into events, and how the state goes with them.
"""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Where a rollout stands."""

    PENDING = "pending"
    CANARY = "canary"  # the devices of a step are being given the release
    WATCHING = "watching"  # they run it, and are compared with the others
    ROLLING = "rolling"  # everybody is being given it
    DONE = "done"
    ABORTING = "aborting"  # everybody who was given it is being given the previous release
    ABORTED = "aborted"
    HELD = "held"  # waits for a person
    PAUSED = "paused"  # by a person: nobody else is given it, and no watch ends


class Event(StrEnum):
    """What happened to it."""

    START = "start"
    ROOM = "room"  # further devices may be on their way
    CANARY_RUNNING = "canary_running"  # every device of the step committed the release
    DEVICE_FAILED = "device_failed"  # too many devices reverted or could not install it
    STALLED = "stalled"  # devices of the step did not get there in time
    SAMPLED = "sampled"  # the planned audits are there
    STEP_PASSED = "step_passed"  # not worse, and a further step comes before everybody
    BETTER_OR_SAME = "better_or_same"
    WORSE = "worse"
    TOO_LITTLE = "too_little"  # evidence, and the watch may be extended
    UNDECIDED = "undecided"  # too little evidence, and no extension left
    LAGGING = "lagging"  # devices that were told do not get there in time: they are waited for no longer
    ALL_SETTLED = "all_settled"  # no reachable device is still on its way
    JOINED = "joined"  # devices that came after its end
    CAME_BACK = "came_back"  # who was away at the end got there too
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    PROMOTE = "promote"  # a person says: go on


class Effect(StrEnum):
    """What to do about it; all idempotent."""

    DESIRE = "desire"  # tell those whom `told` has gained
    RESTORE = "restore"  # previous release back to whoever was given this one
    AUDIT_MORE = "audit_more"  # canaries and the others have more answers checked, for as long as the watch needs it
    AUDIT_BACK = "audit_back"  # as before
    CONFIRM = "confirm"  # the samples that trained it are used up
    GIVE_BACK = "give_back"  # the samples that trained it may train again
    ANNOUNCE = "announce"


P, E, F = Phase, Event, Effect

_BACK = (P.ABORTING, (F.AUDIT_BACK, F.RESTORE, F.ANNOUNCE))
_HOLD = (P.HELD, (F.AUDIT_BACK, F.ANNOUNCE))
_GO = (P.ROLLING, (F.AUDIT_BACK, F.DESIRE, F.ANNOUNCE))
_PAUSE = (P.PAUSED, (F.AUDIT_BACK, F.ANNOUNCE))

# The phase None: the one in which it was paused. AUDIT_MORE is for a watch: `step` leaves it out of another phase.
TABLE: dict[tuple[Phase, Event], tuple[Phase | None, tuple[Effect, ...]]] = {
    (P.PENDING, E.START): (P.CANARY, (F.DESIRE, F.ANNOUNCE)),
    (P.PENDING, E.ABORT): (P.ABORTED, (F.GIVE_BACK, F.ANNOUNCE)),
    #
    (P.CANARY, E.ROOM): (P.CANARY, (F.DESIRE,)),
    (P.CANARY, E.CANARY_RUNNING): (P.WATCHING, (F.AUDIT_MORE, F.ANNOUNCE)),
    (P.CANARY, E.DEVICE_FAILED): _BACK,
    (P.CANARY, E.STALLED): _HOLD,
    (P.CANARY, E.PAUSE): _PAUSE,
    (P.CANARY, E.ABORT): _BACK,
    #
    (P.WATCHING, E.SAMPLED): (P.WATCHING, (F.AUDIT_BACK,)),
    (P.WATCHING, E.STEP_PASSED): (P.CANARY, (F.AUDIT_BACK, F.DESIRE, F.ANNOUNCE)),
    (P.WATCHING, E.BETTER_OR_SAME): _GO,
    (P.WATCHING, E.WORSE): _BACK,
    (P.WATCHING, E.DEVICE_FAILED): _BACK,
    (P.WATCHING, E.TOO_LITTLE): (P.WATCHING, (F.AUDIT_MORE, F.ANNOUNCE)),
    (P.WATCHING, E.UNDECIDED): _HOLD,
    (P.WATCHING, E.PAUSE): _PAUSE,
    (P.WATCHING, E.ABORT): _BACK,
    (P.WATCHING, E.PROMOTE): _GO,
    #
    (P.ROLLING, E.ROOM): (P.ROLLING, (F.DESIRE,)),
    (P.ROLLING, E.LAGGING): (P.ROLLING, (F.ANNOUNCE,)),
    (P.ROLLING, E.ALL_SETTLED): (P.DONE, (F.CONFIRM, F.ANNOUNCE)),
    (P.ROLLING, E.DEVICE_FAILED): _BACK,
    (P.ROLLING, E.PAUSE): _PAUSE,
    (P.ROLLING, E.ABORT): _BACK,
    #
    (P.HELD, E.PROMOTE): _GO,
    (P.HELD, E.RESUME): (P.CANARY, (F.ANNOUNCE,)),  # once more: time to install, and a watch of its own
    (P.HELD, E.WORSE): _BACK,
    (P.HELD, E.DEVICE_FAILED): _BACK,
    (P.HELD, E.ABORT): _BACK,
    #
    (P.PAUSED, E.RESUME): (None, (F.AUDIT_MORE, F.ANNOUNCE)),
    (P.PAUSED, E.SAMPLED): (P.PAUSED, (F.AUDIT_BACK,)),
    (P.PAUSED, E.WORSE): _BACK,
    (P.PAUSED, E.DEVICE_FAILED): _BACK,
    (P.PAUSED, E.ABORT): _BACK,
    #
    (P.ABORTING, E.ALL_SETTLED): (P.ABORTED, (F.GIVE_BACK, F.ANNOUNCE)),
    #
    (P.DONE, E.ROOM): (P.DONE, (F.DESIRE,)),
    (P.DONE, E.JOINED): (P.DONE, (F.ANNOUNCE,)),
    (P.DONE, E.CAME_BACK): (P.DONE, (F.ANNOUNCE,)),
    (P.ABORTED, E.CAME_BACK): (P.ABORTED, (F.ANNOUNCE,)),
}
