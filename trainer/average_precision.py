"""Average precision by the COCO rules, of boxes and of masks, and the masks' overlaps.

The rules: docs of the COCO detection challenge (Lin et al. 2014); counted by faster-coco-eval. A test holds every figure
against pycocotools.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rle = dict[str, Any]  # a mask as COCO run lengths: `size` [height, width] and `counts`
DETECTIONS_MAX = 100  # of one image and class, the best: COCO's own limit
ALL_AREAS = [0.0, 1e10]


class Shapes(NamedTuple):
    """What is on one image: boxes (n, 4) x1 y1 x2 y2, classes (n,), of masks the run lengths, of found ones the scores."""

    boxes: NDArray[Any]
    classes: NDArray[Any]
    scores: NDArray[Any] | None = None
    masks: Sequence[Rle] | None = None


class Precision(NamedTuple):
    """mAP50, mAP50-95 and AP50 of each class; NaN where the truth holds nothing."""

    map50: float
    map50_95: float
    per_class_ap50: list[float]


def average_precision(found: Sequence[Shapes], truth: Sequence[Shapes], n_classes: int) -> Precision:
    """AP of what was `found` on each image against the `truth`; by masks where both have them."""
    nothing = Precision(math.nan, math.nan, [math.nan] * n_classes)
    if not any(len(each.classes) for each in truth):
        return nothing
    from faster_coco_eval import COCO, COCOeval_faster

    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)  # it reports every step that it takes
    by_masks = all(each.masks is not None for each in (*found, *truth))
    images = [{"id": number} for number in range(len(truth))]
    if by_masks:
        sides = zip(truth, found, strict=True)
        sizes = [next((mask["size"] for mask in (*(a.masks or ()), *(b.masks or ()))), [1, 1]) for a, b in sides]
        images = [{"id": n, "height": h, "width": w} for n, (h, w) in enumerate(sizes)]
    common = {"images": images, "categories": [{"id": n, "name": str(n)} for n in range(n_classes)]}
    gt, dt = (COCO(common | {"annotations": _annotations(each, by_masks)}) for each in (truth, found))
    counted = COCOeval_faster(gt, dt, iouType="segm" if by_masks else "bbox", print_function=lambda *_: None)
    counted.params.maxDets = [DETECTIONS_MAX]
    counted.params.areaRng, counted.params.areaRngLbl = [ALL_AREAS], ["all"]
    counted.evaluate()
    counted.accumulate()
    precision = np.asarray(counted.eval["precision"])[..., 0, 0]  # (IoU thresholds, recalls, classes), -1: no truth
    return Precision(_mean(precision[0]), _mean(precision), [_mean(precision[0, :, n]) for n in range(n_classes)])


def _mean(precision: NDArray[Any]) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else math.nan


def _annotations(shapes: Sequence[Shapes], by_masks: bool) -> list[dict[str, Any]]:
    """COCO's rows; boxes as x y width height."""
    rows: list[dict[str, Any]] = []
    for image, each in enumerate(shapes):
        corners = np.asarray(each.boxes, np.float64).reshape(-1, 4)
        for index, (x1, y1, x2, y2) in enumerate(corners.tolist()):
            row: dict[str, Any] = {
                "id": len(rows) + 1, "image_id": image, "category_id": int(each.classes[index]), "iscrowd": 0,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
            }  # fmt: skip
            if each.scores is not None:
                row["score"] = float(each.scores[index])
            if by_masks:
                assert each.masks is not None
                row["segmentation"] = each.masks[index]
                row["area"] = mask_area(each.masks[index])
            rows.append(row)
    return rows


def filled(polygon: NDArray[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The pixels of an image of `size` (height, width) whose centres a polygon (k, 2) x y surrounds, by the even-odd rule: 1
    inside, 0 outside. An engine's outlines are made so that this gives back the mask."""
    height, width = size
    crossings = np.zeros((height, width + 1), np.int64)
    start = np.asarray(polygon, np.float64).reshape(-1, 2)
    end = np.roll(start, -1, axis=0)
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    # A row's centre y + 0.5 is crossed where low <= y + 0.5 < high.
    first = np.clip(np.ceil(low - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(high - 0.5), 0, height).astype(np.int64)
    count = np.maximum(last - first, 0)
    edge = np.repeat(np.arange(len(start)), count)
    rows = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    slope = (end[edge, 0] - start[edge, 0]) / (end[edge, 1] - start[edge, 1])
    places = start[edge, 0] + (rows + 0.5 - start[edge, 1]) * slope
    # Everything to the right of a crossing changes sides.
    np.add.at(crossings, (rows, np.clip(np.floor(places - 0.5) + 1, 0, width).astype(np.int64)), 1)
    return (np.cumsum(crossings, axis=1)[:, :width] % 2).astype(np.uint8)


def run_lengths(mask: NDArray[Any]) -> Rle:
    """A mask (height, width) of 0 and 1 as run lengths."""
    from faster_coco_eval.core import mask as coco

    return dict(coco.encode(np.asfortranarray(mask, np.uint8)))


def mask_area(mask: Rle) -> float:
    """Pixels in a mask."""
    from faster_coco_eval.core import mask as coco

    return float(coco.area(mask))


def mask_overlaps(first: Sequence[Rle], second: Sequence[Rle]) -> NDArray[np.float64]:
    """Intersection over union of masks: (n, m) in 0..1."""
    from faster_coco_eval.core import mask as coco

    if not first or not second:
        return np.zeros((len(first), len(second)))
    return np.asarray(coco.iou(list(first), list(second), [0] * len(second)), np.float64)
