"""Objects through the frames of a stream: which ends of a track hint at a miss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.core.tracks import FRAMES_MIN, Track, follow
from edged.engines.base import Detections

SIZE = (100, 200)  # height, width
ROW = tuple[float, float, float, int]  # x of its left side, its top, score, class; 20 x 20 pixels
THRESHOLD = 0.25


def found(*rows: ROW) -> Detections:
    boxes = np.array([[x, y, x + 20, y + 20] for x, y, _, _ in rows], np.float32).reshape(-1, 4)
    return Detections(
        boxes, np.array([row[2] for row in rows], np.float32), np.array([row[3] for row in rows], np.int64)
    )


def signs(*frames: list[ROW]) -> list[list[str]]:
    """The signs of each frame in turn."""
    tracks: tuple[Track, ...] | None = None
    out = []
    for rows in frames:
        tracks, lost = follow(tracks, found(*rows), THRESHOLD, SIZE)
        out.append([one.sign for one in lost])
    return out


def still(x: float = 90, y: float = 40, score: float = 0.9, label: int = 0) -> list[ROW]:
    return [(x, y, score, label)]


STEPS = [still(x) for x in (60, 70, 80)]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([*STEPS, []], ["lost"]),
        ([*STEPS, still(score=0.1)], ["lost_weak"]),
        ([*STEPS, [(150, 10, 0.1, 0)]], ["lost"]),  # a weak candidate elsewhere says nothing
        ([*STEPS, still(score=0.1, label=1)], ["lost"]),  # nor one of another class
        ([*STEPS, still(label=1)], ["lost"]),  # the class flipped: one of the two is wrong
        ([*STEPS, still(90)], []),
        ([*STEPS, still(130)], []),  # too fast to overlap itself: what is new may be the same object
        ([*STEPS[:2], []], []),  # too short to be sure that it was one
        ([still(score=0.3), still(score=0.4), still(score=0.3), []], []),  # never sure
        ([still(score=0.3), still(score=0.9), still(score=0.9), []], ["lost"]),  # sure on average
        ([*[still(x) for x in (150, 160, 177)], []], []),  # it left to the right
        ([*[still(y=y) for y in (20, 10, 1)], []], []),  # and to the top
        ([[], still(), []], ["flicker"]),
        ([still(), []], []),  # the first frame: it may have been there for long
        ([[], still(x=0), []], []),  # a short look over the border
        ([[], still(), still(), []], []),
        ([*STEPS, [], []], []),  # said once
        ([[*still(90), *still(100, score=0.8)]] * 3 + [still(90)], ["lost"]),  # its neighbour is no weak candidate
        ([[*still(20), *still(90)], [*still(20), *still(90)], [*still(20), *still(90)], still(90)], ["lost"]),
    ],
)
def test_the_last_frame_says(frames: list[list[ROW]], expected: list[str]) -> None:
    said = signs(*frames)
    assert said[-1] == expected
    if frames != [*STEPS, [], []]:
        assert not any(said[:-1])


def test_what_is_lost_is_named() -> None:
    tracks: tuple[Track, ...] | None = None
    for rows in STEPS:
        tracks, _ = follow(tracks, found(*rows), THRESHOLD, SIZE)
    assert tracks is not None
    (track,) = tracks
    assert (track.label, track.frames, track.box) == (0, FRAMES_MIN, (80, 40, 100, 60))
    assert track.score == pytest.approx(0.9)
    after, (lost,) = follow(tracks, found(), THRESHOLD, SIZE)
    assert (lost.track, after) == (track, ())


rows = st.lists(
    st.tuples(st.floats(-30, 230), st.floats(-30, 130), st.floats(0, 1, width=32), st.integers(0, 2)), max_size=6
)


@given(st.lists(rows, max_size=8))
def test_every_box_is_one_track_and_nothing_is_lost_that_was_not_there(frames: list[list[ROW]]) -> None:
    tracks: tuple[Track, ...] | None = None
    for one in frames:
        before = tracks or ()
        tracks, lost = follow(tracks, found(*one), THRESHOLD, SIZE)
        assert len(tracks) == len(found(*one).above(THRESHOLD))
        assert all(gone.track in before for gone in lost)
        assert sum(track.frames > 1 for track in tracks) + len(lost) <= len(before)


@given(rows.filter(bool))
def test_a_scene_that_stands_still_gives_no_sign(one: list[ROW]) -> None:
    assert not any(signs(one, one, one, one))
