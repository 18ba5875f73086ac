"""Objects followed from frame to frame: one that is gone though it cannot have left, or was there for one frame only, hints
at a miss or at a false box. Pure; only for streams whose frames come in order and whose objects overlap themselves.

Boxes of one class are joined greedily by overlap, the best scored first (E. Bochinski, V. Eiselein, T. Sikora, "High-speed
tracking-by-detection without using image information", 2017). An object too fast for that ends as one track and begins as
another: where a box of its class is new, none is missed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from edged.core.matching import iou_matrix, pair
from edged.engines.base import Detections

JOIN_IOU = 0.3  # an object overlaps itself by this much from one frame to the next
FRAMES_MIN = 3  # an object seen this often in a row is one
SCORE_MIN = 0.5  # and so sure on average
EDGE_SHARE = 0.02  # of the frame's sides: an object this close to the border may have left

Sign = Literal["lost", "lost_weak", "flicker"]


@dataclass(frozen=True, slots=True)
class Track:
    """One object: its class, its last box x1 y1 x2 y2 in pixels, in how many frames in a row, its mean score."""

    label: int
    box: tuple[float, float, float, float]
    frames: int
    score: float
    first: bool = False  # it was there in the first frame: nobody knows for how long


@dataclass(frozen=True, slots=True)
class Lost:
    """An object that should be in this frame. `lost_weak`: a weak candidate sits where it was; `lost`: nothing does;
    `flicker`: it was there in the frame before, and neither before nor after that."""

    sign: Sign
    track: Track


def follow(
    tracks: tuple[Track, ...] | None, found: Detections, threshold: float, size: tuple[int, int]
) -> tuple[tuple[Track, ...], tuple[Lost, ...]]:
    """The tracks after this frame, and what should have been in it. `tracks` is None before the first frame; `threshold`
    the score from which on boxes are answered; `size` the frame's (height, width) in pixels."""
    answered = found.above(threshold)
    before = tracks or ()
    known = [_track(answered, n, first=tracks is None) for n in range(len(answered))]
    which = pair(
        np.array([track.box for track in before]).reshape(-1, 4), np.array([track.label for track in before]),
        np.array([track.score for track in before]), answered.boxes, answered.classes, JOIN_IOU,
    )  # fmt: skip
    for track, column in zip(before, which.tolist(), strict=True):
        if column >= 0:
            score = (track.score * track.frames + known[column].score) / (track.frames + 1)
            known[column] = replace(known[column], frames=track.frames + 1, score=score, first=track.first)
    new = {track.label for track in known if track.frames == 1}
    gone = [
        track for track, column in zip(before, which.tolist(), strict=True) if column < 0 and track.label not in new
    ]
    signs = [(_sign(track, found, threshold, size), track) for track in gone]
    return tuple(known), tuple(Lost(sign, track) for sign, track in signs if sign)


def _track(found: Detections, n: int, first: bool) -> Track:
    x1, y1, x2, y2 = found.boxes[n].tolist()
    return Track(int(found.classes[n]), (x1, y1, x2, y2), 1, float(found.scores[n]), first)


def _sign(track: Track, found: Detections, threshold: float, size: tuple[int, int]) -> Sign | None:
    """What the end of a track says; None when the object may have left, or was never sure."""
    height, width = size
    x1, y1, x2, y2 = track.box
    inside = (
        x1 > EDGE_SHARE * width and y1 > EDGE_SHARE * height
        and x2 < (1 - EDGE_SHARE) * width and y2 < (1 - EDGE_SHARE) * height
    )  # fmt: skip
    if not inside:
        return None
    if track.frames == 1 and not track.first:
        return "flicker"
    if track.frames < FRAMES_MIN or track.score < SCORE_MIN:
        return None
    weak = (found.scores < threshold) & (found.classes == track.label)
    overlap = iou_matrix(found.boxes[weak], np.array([track.box]))
    return "lost_weak" if (overlap >= JOIN_IOU).any() else "lost"
