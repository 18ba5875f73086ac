"""How long to wait before a lost stream is opened again. Pure: time and chance are arguments."""

from __future__ import annotations

RECONNECT_S_MIN = 1.0  # at most, after the first failure
RECONNECT_S_MAX = 30.0  # and after many: a camera that comes back is used within this
STEADY_S = 30.0  # a stream that flowed for so long counts as sound: its next failure is a first one


def failures_after(failures: int, flowed_s: float) -> int:
    """How many failures in a row there are, now that a stream has failed which flowed for `flowed_s` seconds."""
    return 1 if flowed_s >= STEADY_S else failures + 1


def reconnect_s(failures: int, draw: float) -> float:
    """Seconds to wait after so many `failures` in a row (1 or more): twice as long each time, and `draw`, an even chance
    from 0 to 1, takes up to half of it off, so that all cameras of a site are not asked at the same moment."""
    longest = min(RECONNECT_S_MAX, RECONNECT_S_MIN * 2.0 ** min(failures - 1, 32))
    return longest * (1.0 - draw / 2)
