"""When nobody answers, nobody is kept waiting: a circuit breaker as a table. Pure: time is an argument.

Only waiting stops. Questions are kept and sent all the same (`label_by`), so every verdict shows that somebody is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

LATE_MAX = 5  # questions in a row without an answer in time: nobody is there
PROBE_S = 30.0  # while nobody is there, one who asks is kept waiting this often, to find out


class State(StrEnum):
    """`closed`: whoever asks waits. `open`: nobody waits. `probing`: one waits for all."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class Event(StrEnum):
    """What can happen. An `ask` is somebody who would wait for the answer; `due`: a probe is allowed again."""

    ASK = "ask"
    ASK_DUE = "ask_due"
    LATE = "late"
    LATE_TOO_OFTEN = "late_too_often"
    VERDICT = "verdict"


# Every state has a row for every event, and a verdict closes from everywhere.
TABLE: Mapping[tuple[State, Event], State] = {
    (State.CLOSED, Event.ASK): State.CLOSED,
    (State.CLOSED, Event.ASK_DUE): State.CLOSED,
    (State.CLOSED, Event.LATE): State.CLOSED,
    (State.CLOSED, Event.LATE_TOO_OFTEN): State.OPEN,
    (State.CLOSED, Event.VERDICT): State.CLOSED,
    (State.OPEN, Event.ASK): State.OPEN,
    (State.OPEN, Event.ASK_DUE): State.PROBING,
    (State.OPEN, Event.LATE): State.OPEN,
    (State.OPEN, Event.LATE_TOO_OFTEN): State.OPEN,
    (State.OPEN, Event.VERDICT): State.CLOSED,
    (State.PROBING, Event.ASK): State.PROBING,
    (State.PROBING, Event.ASK_DUE): State.PROBING,  # nothing was heard of the probe: another one
    (State.PROBING, Event.LATE): State.OPEN,
    (State.PROBING, Event.LATE_TOO_OFTEN): State.OPEN,
    (State.PROBING, Event.VERDICT): State.CLOSED,
}


@dataclass(frozen=True, slots=True)
class Breaker:
    """`late`: questions in a row without an answer in time; `since`: when it opened or let the last probe through."""

    state: State = State.CLOSED
    late: int = 0
    since: float = 0.0  # seconds of a monotonic clock


def ask(breaker: Breaker, now: float) -> tuple[bool, Breaker]:
    """Whether whoever asks now shall wait for the answer, and the breaker after it."""
    due = now - breaker.since >= PROBE_S
    state = TABLE[breaker.state, Event.ASK_DUE if due else Event.ASK]
    if state is State.CLOSED:
        return True, breaker
    waits = due and state is State.PROBING
    return waits, replace(breaker, state=state, since=now) if waits else breaker


def late(breaker: Breaker, now: float) -> Breaker:
    """A question has no answer in time."""
    number = breaker.late + 1
    state = TABLE[breaker.state, Event.LATE_TOO_OFTEN if number >= LATE_MAX else Event.LATE]
    opened = state is State.OPEN and breaker.state is not State.OPEN
    return Breaker(state, number, now if opened else breaker.since)


def verdict(breaker: Breaker) -> Breaker:
    """Somebody answered."""
    return Breaker(TABLE[breaker.state, Event.VERDICT])
