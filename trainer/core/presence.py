"""Whether a device is there: it said so, nobody has said otherwise, and something was heard of it lately. Pure.

A broker that dies with its devices, or is started again with what it had kept, sends no will message for those that are
gone. So a birth counts only as long as signs of life follow it. They are dated by their receipt, for a device's clock may
be wrong; a date that lies far ahead was given when the trainer's own clock was, and does not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lately:
    """The dates of a last sign of life (seconds since the epoch) that are not too old, or too far ahead to be true."""

    since: float
    until: float

    def holds(self, seen_at: float) -> bool:
        """Whether a sign of life of then still counts."""
        return self.since <= seen_at <= self.until


ALWAYS = Lately(-math.inf, math.inf)  # for who does not ask whether a device is there


def lately(now: float, silent_s_max: float) -> Lately:
    """What counts at `now` when a device may be silent for `silent_s_max`."""
    return Lately(now - silent_s_max, now + silent_s_max)


def present(online: bool, seen_at: float, heard: Lately) -> bool:
    """Whether a device is there. `online`: its last word was a birth, and no will message came since."""
    return online and heard.holds(seen_at)
