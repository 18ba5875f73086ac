"""Which tier to ask, whether a question goes on, and how long to wait for it. Pure: the time is an argument.

Law of this file: a question ends. It makes at most HOPS_MAX hops, never to a device that has had it, and whoever passed it
on gives his own answer when the next tier is silent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from edged.wire.messages import HOPS_MAX

ALIVE_BEATS = 3  # heartbeats that may be missing before a responder counts as gone
RETURN_SHARE = 0.8  # of the time that is left, for the next tier; the rest is for the way back
RESPONDERS_MAX = 1024  # that a device remembers; beyond it, the one that was silent for longest is forgotten

Tier = tuple[str, str]  # tier and task


@dataclass(frozen=True, slots=True)
class Beat:
    """A responder's sign of life: the message's id, its device and boot, and when the next one is due (seconds)."""

    id: str
    device: str
    boot: str
    online: bool
    every_s: float


class Presence:
    """Who lives in which tier, as far as his heartbeats tell. Times are of the observer's own monotonic clock."""

    def __init__(self) -> None:
        self._heard: dict[tuple[str, str, str], tuple[Beat, float]] = {}  # (tier, task, responder), oldest beat first

    def heard(self, tier: str, task: str, responder: str, beat: Beat, now: float) -> bool:
        """Take in a sign of life. True when this responder has just come: it was not here, or it has restarted.

        The same message again says nothing new: a broker hands a retained one out at every connect, and after a crash
        of its own perhaps one of the past.
        """
        key = (tier, task, responder)
        known = self._heard.get(key)
        if known is not None and known[0].id == beat.id:
            return False
        came = beat.online and (known is None or not _alive(*known, now) or known[0].boot != beat.boot)
        self._heard.pop(key, None)
        self._heard[key] = (beat, now)
        if len(self._heard) > RESPONDERS_MAX:
            del self._heard[next(iter(self._heard))]
        return came

    def living(self, tier: str, task: str, now: float, but: Collection[str] = ()) -> bool:
        """Whether a responder of this tier lives on another device than these."""
        return any(
            key[:2] == (tier, task) and beat.device not in but and _alive(beat, at, now)
            for key, (beat, at) in self._heard.items()
        )


def _alive(beat: Beat, at: float, now: float) -> bool:
    return beat.online and now - at < ALIVE_BEATS * beat.every_s


@dataclass(frozen=True, slots=True)
class Choice:
    """The tier to ask, and whether anybody lives there."""

    tier: str
    living: bool


def choose(tiers: Sequence[str], living: Callable[[str], bool]) -> Choice:
    """The first of `tiers` (there is one at least) in which somebody lives; with nobody anywhere, the first: whoever
    comes there finds the question."""
    return next((Choice(tier, True) for tier in tiers if living(tier)), Choice(tiers[0], False))


@dataclass(frozen=True, slots=True)
class Stay:
    """The question goes no further: why."""

    reason: str


def onward(tiers: Sequence[str], hops: int, living: Callable[[str], bool]) -> str | Stay:
    """The tier that a responder passes a question on to after `hops` hops, or why it answers itself. `living` tells
    whether somebody who has not had the question lives in a tier: it never waits for nobody."""
    if hops >= HOPS_MAX:
        return Stay(f"the question has made {hops} hops, the most it may")
    choice = choose(tiers, living)
    if not choice.living:
        return Stay(f"nobody who has not had the question is in {' or '.join(tiers)}")
    return choice.tier


@dataclass(frozen=True, slots=True)
class Waits:
    """How long whoever passed a question on waits for the next tier, in seconds from now: until `speak` before he gives
    his own answer, until `forget` for a better one. `answer_within` is what he grants the next tier, when somebody waits
    at the origin."""

    speak: float
    forget: float
    answer_within: float | None


def waits(answer_within: float | None, wait: float) -> Waits:
    """Where somebody waits at the origin (`answer_within` seconds are left of his time), the own answer must still reach
    him. Where nobody does, or not any more, the next tier has the configured `wait`."""
    if answer_within is None or answer_within <= 0:
        return Waits(wait, 2 * wait, None)
    granted = RETURN_SHARE * answer_within
    speak = min(granted, wait)
    return Waits(speak, speak + wait, granted)
