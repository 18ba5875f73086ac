"""Masks as polygons: filled again, they are the masks that they came from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from edged.engines.outline import NOTHING, PIECES_MAX, mask_polygon, simplified, trace
from tests.support.exports import covered

SIZE = (32, 48)  # of a model's input: height, width


@settings(max_examples=300, deadline=None)
@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.integers(0, 1)))
def test_a_polygon_covers_exactly_its_pixels(mask: np.ndarray) -> None:
    side = max(mask.shape)
    whole = np.zeros((side, side), np.uint8)
    whole[: mask.shape[0], : mask.shape[1]] = mask
    np.testing.assert_array_equal(covered(trace(mask), side), whole)


def test_a_rectangle_needs_four_points() -> None:
    mask = np.zeros((9, 9), np.uint8)
    mask[2:5, 3:8] = 1
    assert sorted(map(tuple, trace(mask).tolist())) == [(3, 2), (3, 5), (8, 2), (8, 5)]


def test_of_too_many_pieces_the_largest_stay() -> None:
    mask = np.zeros((60, 60), np.uint8)
    mask[::3, ::3] = 1
    mask[38:52, 38:52] = 0
    mask[40:50, 40:50] = 1
    shown = covered(trace(mask), 60)
    assert shown[40:50, 40:50].all()
    assert shown.sum() == 100 + PIECES_MAX - 1


def test_nothing_has_no_outline() -> None:
    assert trace(np.zeros((4, 4), np.uint8)).shape == (0, 2)


def ramp() -> np.ndarray:
    """One prototype of 8 x 12 cells that is positive right of the input's column 24."""
    return np.tile(np.arange(12, dtype=np.float32) - 5.5, (1, 8, 1))


@pytest.mark.parametrize(
    ("box", "coefficient", "expected"),
    [
        ((0, 0, 48, 32), 1.0, (24, 0, 48, 32)),  # where it is positive
        ((0, 0, 48, 32), -2.0, (0, 0, 24, 32)),  # turned round
        ((20, 10, 40, 20), 1.0, (24, 10, 40, 20)),  # only inside the box
        ((30.2, 9.5, 40.2, 20.0), 1.0, (31, 10, 41, 20)),  # pixels whose index lies in the box
        ((-9, -9, 99, 99), 1.0, (24, 0, 48, 32)),  # a box larger than the input
        ((44, 28, 48, 32), 1.0, (44, 28, 48, 32)),  # in the last cell
    ],
)
def test_a_mask_is_where_the_weighted_prototypes_are_positive(
    box: tuple[float, ...], coefficient: float, expected: tuple[int, int, int, int]
) -> None:
    polygon = mask_polygon(ramp(), np.array([coefficient], np.float32), np.array(box, np.float32), SIZE)
    corners = (*polygon.min(axis=0).tolist(), *polygon.max(axis=0).tolist())
    assert corners == expected
    assert len(polygon) == 4


@pytest.mark.parametrize("box", [(0, 0, 20, 32), (5, 5, 5, 5), (60, 5, 70, 9), (9, 9, 4, 4)])
def test_an_empty_mask_has_no_outline(box: tuple[float, ...]) -> None:
    polygon = mask_polygon(ramp(), np.ones(1, np.float32), np.array(box, np.float32), SIZE)
    assert polygon is NOTHING


@pytest.mark.parametrize(
    ("radius", "points_max", "iou_min"), [(6, 64, 0.85), (40, 64, 0.97), (200, 64, 0.98), (200, 12, 0.9)]
)
def test_a_simplified_outline_has_few_points_and_nearly_the_same_pixels(
    radius: int, points_max: int, iou_min: float
) -> None:
    side = 2 * radius + 9
    y, x = np.mgrid[:side, :side] - radius - 4
    mask = (np.hypot(x, 1.6 * y) <= radius).astype(np.uint8)
    found = simplified(trace(mask), points_max)
    assert 3 <= len(found) <= points_max < len(trace(mask)) or len(trace(mask)) <= points_max
    again = covered(found, side)
    assert (again & mask).sum() / (again | mask).sum() >= iou_min


def test_what_has_no_area_has_no_simplified_outline() -> None:
    line = np.array([[0, 0], [5, 5], [9, 9]], np.float32)
    assert len(simplified(NOTHING, 64)) == len(simplified(line, 64)) == 0
