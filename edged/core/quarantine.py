"""Who is blamed for a crash of the process: the item that was in hand, or the release that is on trial. Tables, no I/O.

An item that was in hand at one crash may have been there by chance: it is a suspect, and is in hand alone from then on, so
that a second crash has one culprit. A release that is committed has answered many items: what crashes it twice is to blame
itself. A release on trial (probation) that has answered nothing yet may be what crashes on every item: then the crashes
count against the release, which is put back, and its crashes are forgotten (`forgiven`). Once it has answered other items,
an item's first crash counts against the release and the second against the item. So one bad item never ends an update, and a
release that crashes on many items is put back after RESTARTS_MAX of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from edged.core.update import UNDER_WAY, State

CRASHES_MAX = 2  # with an item in hand; then it is quarantined


class Trial(StrEnum):
    """How the release stood that had the item in hand."""

    NONE = "none"  # it is committed
    UNPROVEN = "unproven"  # on probation and has answered nothing here, or a release was being put in its place
    ANSWERING = "answering"  # on probation, and has answered other items here


class Blame(StrEnum):
    """What a crash says of an item that was in hand."""

    SUSPECT = "suspect"
    QUARANTINED = "quarantined"


T, B = Trial, Blame

# (the release, whether it is a further crash of this item, whether the item was in hand alone) -> what the item is.
BLAME: dict[tuple[Trial, bool, bool], Blame] = {
    (T.NONE, False, False): B.SUSPECT,
    (T.NONE, False, True): B.SUSPECT,
    (T.NONE, True, False): B.SUSPECT,  # which of those that were in hand it was is not known: alone it would have been
    (T.NONE, True, True): B.QUARANTINED,
    (T.UNPROVEN, False, False): B.SUSPECT,
    (T.UNPROVEN, False, True): B.SUSPECT,
    (T.UNPROVEN, True, False): B.SUSPECT,
    (T.UNPROVEN, True, True): B.SUSPECT,  # the release crashes on whatever it gets, for all that is known
    (T.ANSWERING, False, False): B.SUSPECT,
    (T.ANSWERING, False, True): B.SUSPECT,
    (T.ANSWERING, True, False): B.SUSPECT,
    (T.ANSWERING, True, True): B.QUARANTINED,
}


@dataclass(frozen=True, slots=True)
class Crash:
    """One end of the process, or of an engine's process, with this item in hand: under which releases (base, adapter)."""

    release: str
    shas: tuple[str, ...]


def trial(own: Collection[State], others: Collection[State], answered: bool) -> Trial:
    """How a release stands. `own`: the states of the updates that it is the candidate of; `others`: of all the others;
    `answered`: it has answered an item here."""
    if any(state in {State.STAGED, State.REVERTING} for state in (*own, *others)):
        return Trial.UNPROVEN  # a model was being loaded in the same process: that may have ended it
    if State.SWITCHED in own:
        return Trial.ANSWERING if answered else Trial.UNPROVEN
    return Trial.NONE


def standing(crashes: Sequence[Crash], bad: Callable[[str], bool]) -> tuple[Crash, ...]:
    """The crashes that still count: those under a release that was found to be bad (`bad` knows its SHA-256) do not."""
    return tuple(crash for crash in crashes if not any(bad(sha) for sha in crash.shas))


def blame(how: Trial, earlier: int, alone: bool) -> Blame:
    """What an item is after a crash. `earlier`: its crashes before this one that still count."""
    return BLAME[how, earlier + 1 >= CRASHES_MAX, alone]


def counts_against(update: State, items: int, quarantined: bool) -> bool:
    """Whether a start after a crash counts against the update that was under way.

    `items`: how many were in hand at the crash (0: it was no crash, or not at an item); `quarantined`: one of them was found
    to be the culprit. Loading a candidate is as likely to end the process as an item is. In probation, and for a while
    after the commit, a crash counts unless its culprit is known. In every other state the candidate is not in this process.
    """
    if update is State.STAGED:
        return True
    if update in {State.SWITCHED, State.COMMITTED}:
        return not quarantined
    return update in UNDER_WAY and not items
