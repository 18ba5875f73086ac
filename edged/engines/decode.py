"""A detection head's raw answer as boxes with labels: the plain head of YOLO v8 and 11, and the end-to-end one of 26."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edged.engines.base import EngineError

SCORE_FLOOR = 0.05  # weaker candidates say nothing about what was missed, and cost time in suppression
DETECTIONS_MAX = 300  # of one image
CANDIDATES_MAX = 4096  # of one image, before suppression: bounds the work that a wild model can cause


@dataclass(frozen=True, slots=True)
class Found:
    """What is left of one image's answer, best first: `boxes` (n, 4) x1 y1 x2 y2 in model pixels, `scores` (n,),
    `classes` (n,), and of every box its `coefficients` (n, masks), the share that each mask prototype has in its mask."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    coefficients: NDArray[np.float32]


def decode_plain(output: NDArray[np.float32], labels: int, iou: float, floor: float = SCORE_FLOOR) -> Found:
    """Read a plain head's answer (4 + labels + masks, anchors): x y w h in pixels, scores, mask coefficients.

    Greedy suppression within each class of what overlaps a better box by more than `iou`, down to the score `floor`.
    Raises EngineError when the answer holds NaN or infinity.
    """
    scores = output[4 : 4 + labels]
    best = scores.max(axis=0)  # max passes NaN on, so two sums see every number without a pass of their own
    _check_finite(best.sum() + output[:4].sum())
    candidates = np.flatnonzero(best > floor)
    if len(candidates) > CANDIDATES_MAX:
        candidates = candidates[np.argsort(-best[candidates], kind="stable")[:CANDIDATES_MAX]]
    classes = scores[:, candidates].argmax(axis=0)
    centres, half = output[:2, candidates], output[2:4, candidates] / 2
    boxes = np.concatenate((centres - half, centres + half)).T.astype(np.float32, copy=False)
    keep = _suppress(boxes, best[candidates], classes, iou)
    chosen = candidates[keep]
    return _found(boxes[keep], best[chosen], classes[keep], output[4 + labels :, chosen].T)


def _suppress(boxes: NDArray[Any], scores: Any, classes: Any, iou: float) -> NDArray[np.intp]:
    """Indices of the boxes that stay, best first, DETECTIONS_MAX at most."""
    if not len(boxes):
        return np.empty(0, np.intp)
    # The suppression keeps classes apart by shifting them along x; that only works without negative coordinates.
    corner = boxes - boxes.min()
    corner[:, 2:] -= corner[:, :2]
    places: Any = corner.astype(np.float64)
    keep = cv2.dnn.NMSBoxesBatched(places, scores, classes.astype(np.int32), 0.0, iou)
    return np.asarray(keep, np.intp)[:DETECTIONS_MAX]


def decode_end_to_end(output: NDArray[np.float32], labels: int, floor: float = SCORE_FLOOR) -> Found:
    """Read an end-to-end head's answer (boxes, 6 + masks): x1 y1 x2 y2 in pixels, score, class, mask coefficients.

    The head has suppressed already; rows that it did not need score 0. Raises EngineError when the answer holds NaN or
    infinity, or a class that has no label.
    """
    _check_finite(output[:, :6].sum())
    rows = output[output[:, 4] > floor]
    rows = rows[np.argsort(-rows[:, 4], kind="stable")[:DETECTIONS_MAX]]
    classes = rows[:, 5].astype(np.int64)
    if len(rows) and not 0 <= classes.min() <= classes.max() < labels:
        raise EngineError(f"the model answers with class {rows[:, 5].max():g}, it has {labels} labels")
    return _found(rows[:, :4], rows[:, 4], classes, rows[:, 6:])


def _check_finite(total: float) -> None:
    if not np.isfinite(total):
        raise EngineError("the model's output holds NaN or infinity: the file is damaged or the release is broken")


def _found(boxes: NDArray[Any], scores: NDArray[Any], classes: NDArray[Any], coefficients: NDArray[Any]) -> Found:
    return Found(
        boxes.astype(np.float32, copy=False),
        scores.astype(np.float32, copy=False),
        classes.astype(np.int64, copy=False),
        coefficients.astype(np.float32, copy=False),
    )
