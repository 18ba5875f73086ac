"""Which predicted boxes are right: one-to-one matching, shared by calibration, evaluation, the gate and the scorer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IOU_MIN = 0.5  # a box is found when it overlaps a box of the truth, of the same class, by at least this much


@dataclass(frozen=True, slots=True)
class Matched:
    """Counts of one image: true positives, false positives (extra or wrong boxes), false negatives (missed boxes)."""

    tp: int
    fp: int
    fn: int

    @property
    def right(self) -> bool:
        """Whether the whole answer is right: nothing missed, nothing extra, no wrong class."""
        return self.fp == 0 and self.fn == 0


def iou_matrix(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """Intersection over union of boxes (n, 4) and (m, 4), x1 y1 x2 y2: (n, m) in 0..1; without area 0."""
    a, b = np.asarray(first, np.float64).reshape(-1, 4), np.asarray(second, np.float64).reshape(-1, 4)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.clip(high - low, 0, None).prod(axis=2)
    area_a, area_b = (np.clip(box[:, 2:] - box[:, :2], 0, None).prod(axis=1) for box in (a, b))
    union = area_a[:, None] + area_b[None] - inter
    return np.asarray(np.divide(inter, union, out=np.zeros_like(inter), where=union > 0))


def pair(
    boxes: NDArray[Any],
    classes: NDArray[Any],
    scores: NDArray[Any],
    true_boxes: NDArray[Any],
    true_classes: NDArray[Any],
    iou: float = IOU_MIN,
) -> NDArray[np.int64]:
    """For every predicted box the index of the true box it found, or -1: (n,).

    Greedy: the best scored prediction takes the free true box of its class that it overlaps most, by at least `iou`.
    """
    return assign(iou_matrix(boxes, true_boxes), classes, scores, true_classes, iou)


def assign(
    overlap: NDArray[np.float64],
    classes: NDArray[Any],
    scores: NDArray[Any],
    true_classes: NDArray[Any],
    iou: float = IOU_MIN,
) -> NDArray[np.int64]:
    """`pair` for overlaps (n, m) of whatever is compared, boxes or masks."""
    overlap = np.where(np.asarray(classes).reshape(-1, 1) == np.asarray(true_classes).reshape(1, -1), overlap, -1.0)
    found = np.full(len(overlap), -1, dtype=np.int64)
    if not overlap.size:
        return found
    for row in np.argsort(-np.asarray(scores, np.float64), kind="stable"):
        column = int(overlap[row].argmax())
        if overlap[row, column] >= iou:
            found[row] = column
            overlap[:, column] = -1.0
    return found


def match(
    boxes: NDArray[Any],
    classes: NDArray[Any],
    scores: NDArray[Any],
    true_boxes: NDArray[Any],
    true_classes: NDArray[Any],
    iou: float = IOU_MIN,
) -> Matched:
    """Counts of one image; arguments as in `pair`."""
    tp = int((pair(boxes, classes, scores, true_boxes, true_classes, iou) >= 0).sum())
    return Matched(tp, len(scores) - tp, len(true_classes) - tp)


def f1(tp: int, fp: int, fn: int) -> float:
    """Harmonic mean of precision and recall from summed counts; 1 when nothing was to find and nothing found."""
    total = 2 * tp + fp + fn
    return 2 * tp / total if total else 1.0


def frame_right(
    boxes: NDArray[Any],
    classes: NDArray[Any],
    scores: NDArray[Any],
    true_boxes: NDArray[Any],
    true_classes: NDArray[Any],
    iou: float = IOU_MIN,
) -> bool:
    """Whether the answer on one frame is wholly right; arguments as in `pair`."""
    return match(boxes, classes, scores, true_boxes, true_classes, iou).right
