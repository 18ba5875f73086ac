"""How much older than at first the frames of a stream are when they are read. Pure: time is an argument."""

from __future__ import annotations

from dataclasses import dataclass

SPAN_S = 30.0  # the least delay of this span and the one before counts as none: the clocks of camera and device drift


@dataclass(frozen=True, slots=True)
class Lag:
    """`least`: the smallest difference between a frame's time of reading and the camera's time in it, since `since`, and
    `before` that. `now_s`: how much later than that the newest frame came, in seconds."""

    since: float
    least: float
    before: float
    now_s: float = 0.0


def read(lag: Lag | None, now: float, media_s: float) -> Lag:
    """The lag after a frame with the camera's time `media_s` was read at `now`; None: it is the first."""
    delay = now - media_s
    if lag is None:
        return Lag(now, delay, delay)
    if now - lag.since > SPAN_S:
        lag = Lag(now, delay, lag.least)
    least = min(lag.least, delay)
    return Lag(lag.since, least, lag.before, delay - min(least, lag.before))
