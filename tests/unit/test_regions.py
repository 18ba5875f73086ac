"""A region of the frame: which pixels the model sees, and answers in pixels of the frame."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edged import images, regions
from edged.config import WHOLE, Roi
from edged.engines.base import Detections
from edged.outgoing import boxes, moved

FRAME = np.arange(60 * 100 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 100, 3)


@pytest.mark.parametrize(
    ("roi", "corner", "size"),
    [
        (WHOLE, (0, 0), (60, 100)),
        ((0.25, 0.5, 0.75, 1.0), (25, 30), (30, 50)),
        ((0.1, 0.1, 0.2, 0.2), (10, 6), (6, 10)),
        ((0.333, 0.0, 0.666, 1.0), (33, 0), (60, 34)),  # pixels that are partly inside are inside
        ((0.0, 0.0, 1e-6, 1e-6), (0, 0), (1, 1)),
        ((0.999999, 0.999999, 1.0, 1.0), (99, 59), (1, 1)),
    ],
)
def test_the_part_that_the_model_sees(roi: Roi, corner: tuple[int, int], size: tuple[int, int]) -> None:
    part, at = regions.cut(FRAME, roi)
    assert (at, part.shape[:2]) == (corner, size)
    assert (part == FRAME[at[1] : at[1] + size[0], at[0] : at[0] + size[1]]).all()


def test_it_is_the_same_part_of_a_frame_of_another_resolution() -> None:
    roi = (0.25, 0.5, 0.75, 1.0)
    part, at = regions.cut(np.zeros((120, 200, 3), np.uint8), roi)
    assert (at, part.shape[:2]) == ((50, 60), (60, 100))


def test_answers_speak_of_the_frame() -> None:
    found = Detections(
        np.array([[1, 2, 3, 4]], np.float32), np.array([0.5], np.float32), np.array([0]),
        (np.array([[1, 2], [3, 2], [3, 4], [1, 4]], np.float32),),
    )  # fmt: skip
    shifted = regions.shifted(found, (25, 30))
    assert shifted.boxes.tolist() == [[26, 32, 28, 34]]
    assert shifted.outlines is not None
    assert shifted.outlines[0].tolist() == [[26, 32], [28, 32], [28, 34], [26, 34]]
    assert found.boxes.tolist() == [[1, 2, 3, 4]]
    # A verdict speaks of the part; whoever asked sent the frame.
    (told,) = moved(boxes(found, ["cat"]), (25, 30))
    assert told == boxes(shifted, ["cat"])[0]
    assert told.polygons == [[26, 32, 28, 32, 28, 34, 26, 34]]
    assert boxes(replace(found, outlines=None), ["cat"])[0].polygons is None


def test_what_is_kept_of_a_part_is_exactly_its_pixels() -> None:
    part, _ = regions.cut(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8), (0.25, 0.0, 0.8, 0.5))
    data = images.encode(part)
    assert (images.decode(data) == part).all()
    assert images.encode(part) == data
