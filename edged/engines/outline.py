"""Masks of a segmentation head as polygons in the pixels of the original image."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

PIECES_MAX = 256  # of one mask, holes counted, the largest ones: what has more is noise
STAIRS_PX = 0.75  # how far a simplified outline may leave the edges of pixels, more where it has too many points
_MARGIN = 1  # prototype cells around a box that its edge is interpolated from

Polygon = NDArray[np.float32]  # (k, 2) x y; the last point joins the first

NOTHING: Polygon = np.empty((0, 2), np.float32)


def mask_polygon(prototypes: NDArray[np.float32], coefficients: NDArray[np.float32], box: NDArray[np.float32],
                 size: tuple[int, int]) -> Polygon:  # fmt: skip
    """The outline of one mask in model pixels; NOTHING for an empty mask.

    `prototypes` (masks, rows, columns) cover the input of `size` (height, width); the mask is where their sum, each
    weighted by its of `coefficients`, interpolated to the input's pixels, is positive, inside `box` x1 y1 x2 y2
    (YOLACT, Bolya et al. 2019, section 3.2).
    """
    _, rows, columns = prototypes.shape
    step_y, step_x = size[0] // rows, size[1] // columns
    # A pixel belongs to the box when its index lies in it; everything is worked out around the box alone.
    left, top = (max(int(np.ceil(side)), 0) for side in box[:2])
    right, bottom = (min(int(np.ceil(side)), limit) for side, limit in zip(box[2:], (size[1], size[0]), strict=True))
    if right <= left or bottom <= top:
        return NOTHING
    first_row, last_row = max(top // step_y - _MARGIN, 0), min(-(-bottom // step_y) + _MARGIN, rows)
    first_column, last_column = max(left // step_x - _MARGIN, 0), min(-(-right // step_x) + _MARGIN, columns)
    cells = prototypes[:, first_row:last_row, first_column:last_column]
    evidence = np.tensordot(coefficients, cells, axes=1)
    spread = cv2.resize(evidence, None, fx=step_x, fy=step_y, interpolation=cv2.INTER_LINEAR)
    corner_x, corner_y = first_column * step_x, first_row * step_y
    mask = spread[top - corner_y : bottom - corner_y, left - corner_x : right - corner_x] > 0
    polygon = trace(mask.astype(np.uint8))
    return polygon + np.array([left, top], np.float32) if len(polygon) else NOTHING


def trace(mask: NDArray[np.uint8]) -> Polygon:
    """One polygon along the edges of the pixels that are not 0, with its holes; NOTHING when all are 0.

    Filled by the even-odd rule it covers exactly the centres of these pixels. Pieces and holes hang on the first piece
    by bridges there and back, which have no area.
    """
    # OpenCV's contours join pixels' centres. At twice the size a pixel has a centre at either edge, 2n and 2n + 1, and
    # half of the next whole number is the edge itself.
    doubled = cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    pieces = [_corners((contour.reshape(-1, 2) + 1) // 2) for contour in contours]
    pieces = sorted(pieces, key=cv2.contourArea, reverse=True)[:PIECES_MAX]
    if not pieces:
        return NOTHING
    whole = [pieces[0]]
    for piece in pieces[1:]:
        whole += [pieces[0][:1], piece, piece[:1]]
    return np.concatenate(whole if len(whole) == 1 else [*whole, pieces[0][:1]]).astype(np.float32)


def simplified(polygon: Polygon, points_max: int) -> Polygon:
    """The polygon with at most `points_max` points: the stairs of pixels as slopes (Douglas & Peucker, "Algorithms for the
    reduction of the number of points", 1973), as coarse as it must be; NOTHING where that leaves no area."""
    tolerance, left = STAIRS_PX, len(polygon)
    while left >= 3:
        found = cv2.approxPolyDP(polygon.reshape(-1, 1, 2), tolerance, True).reshape(-1, 2).astype(np.float32)
        left, tolerance = len(found), 1.5 * tolerance
        if 3 <= left <= points_max and cv2.contourArea(found) > 0:
            return found
    return NOTHING


def _corners(points: NDArray[Any]) -> NDArray[Any]:
    """A closed path along pixels' edges without the points that lie on a straight line."""
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    arrived, leaves = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    turns: NDArray[np.bool_] = arrived[:, 0] * leaves[:, 1] != arrived[:, 1] * leaves[:, 0]
    return points[turns]
