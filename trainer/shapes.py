"""The shapes that a label is about: boxes, outlines in parts, whole images; coordinates are pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edged.engines.outline import simplified, trace
from edged.wire.messages import PARTS_MAX, POINTS_MAX
from trainer.average_precision import filled
from trainer.core.labels import AREA_PX_MIN, area, enclosing

Corners = tuple[float, float, float, float]
Parts = tuple[tuple[float, ...], ...]  # x1 y1 x2 y2 ... each


def shape(row: Mapping[str, Any]) -> tuple[str, Corners, Parts]:
    """What a row of a label says: its class, its box x1 y1 x2 y2, and its polygons, where it has some.

    Raises ValueError, KeyError or TypeError for what has no area or is no row.
    """
    polygons = tuple(_polygon(each) for each in row.get("polygons") or ())
    # A polygon says its box: where somebody moved it, the old corners are nobody's word.
    x1, y1, x2, y2 = enclosing(polygons) if polygons else (float(value) for value in row["box"])
    if not (np.isfinite([x1, y1, x2, y2]).all() and x2 > x1 and y2 > y1):
        raise ValueError(f"box {[x1, y1, x2, y2]} has no area; corners are x1 y1 x2 y2 in pixels")
    return str(row["label"]), (x1, y1, x2, y2), polygons


def _polygon(given: Sequence[Any]) -> tuple[float, ...]:
    points = tuple(float(value) for value in given)
    if len(points) < 6 or len(points) % 2 or not np.isfinite(points).all() or area(points) < AREA_PX_MIN:
        raise ValueError(f"polygon of {len(points)} numbers has no area; give x y of 3 points or more, in pixels")
    return points


def carried(polygons: Sequence[Sequence[float]]) -> list[list[float]]:
    """The parts of an outline as messages carry them: the PARTS_MAX largest, none with more than POINTS_MAX points."""
    largest = sorted(polygons, key=area, reverse=True)[:PARTS_MAX]
    kept = [each for each in polygons if each in largest][:PARTS_MAX]
    fits = (
        list(each) if len(each) <= 2 * POINTS_MAX
        else simplified(np.array(each, np.float32).reshape(-1, 2), POINTS_MAX).ravel().tolist()
        for each in kept
    )  # fmt: skip
    return [each for each in fits if each]


def whole(label: Any, data: bytes) -> dict[str, Any]:
    """The row of a label that is about the whole of an image file; raises ValueError for bytes that are none."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{len(data)} bytes do not decode as an image")
    return {"label": label, "box": [0, 0, image.shape[1], image.shape[0]]}


def outline(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> NDArray[np.float32]:
    """One outline (k, 2), filled by the even-odd rule, for an object in parts: around all pixels of an image of `size`
    (height, width) whose centres lie in one part at least. An only part stays as it is."""
    parts = [np.array(polygon, np.float32).reshape(-1, 2) for polygon in polygons]
    if len(parts) == 1:
        return parts[0]
    covered = np.zeros(size, np.uint8)
    for part in parts:
        covered |= filled(part, size)
    return trace(covered)
