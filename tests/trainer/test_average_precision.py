"""Average precision is pycocotools' on the same detections: boxes and masks, crowds, nothing, classes that are not there."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as reference_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from edged.engines.outline import trace
from tests.support.exports import covered
from trainer.average_precision import Shapes, average_precision, filled, mask_area, mask_overlaps, run_lengths

SIDE, CLASSES = 60, 3


def reference(found: Sequence[Shapes], truth: Sequence[Shapes], iou_type: str) -> tuple[float, float, list[float]]:
    """What pycocotools says: mAP50, mAP50-95 and AP50 of each class; NaN where it says -1."""

    def dataset(shapes: Sequence[Shapes]) -> Any:
        rows: list[dict[str, Any]] = []
        for image, each in enumerate(shapes):
            for index, (x1, y1, x2, y2) in enumerate(np.asarray(each.boxes, np.float64).tolist()):
                row = {
                    "id": len(rows) + 1,
                    "image_id": image,
                    "category_id": int(each.classes[index]),
                    "iscrowd": 0,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                }
                if each.scores is not None:
                    row["score"] = float(each.scores[index])
                if each.masks is not None:
                    row["segmentation"] = each.masks[index]
                    row["area"] = float(reference_masks.area(each.masks[index]))
                rows.append(row)
        coco = COCO()
        coco.dataset = {
            "images": [{"id": n, "height": SIDE, "width": SIDE} for n in range(len(shapes))],
            "categories": [{"id": n, "name": str(n)} for n in range(CLASSES)],
            "annotations": rows,
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        counted = COCOeval(dataset(truth), dataset(found), iou_type)
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    known = [-1.0 if value is None else value for value in counted.stats[:2]]
    classes = []
    for number in range(CLASSES):
        values = counted.eval["precision"][0, :, number, 0, -1]
        classes.append(float(values[values > -1].mean()) if (values > -1).any() else math.nan)
    overall, at_50 = (math.nan if value == -1 else float(value) for value in known)
    return at_50, overall, classes


def same(found: Sequence[Shapes], truth: Sequence[Shapes], iou_type: str) -> None:
    ours, theirs = average_precision(found, truth, CLASSES), reference(found, truth, iou_type)
    assert ours.map50 == pytest.approx(theirs[0], abs=1e-6, nan_ok=True)
    assert ours.map50_95 == pytest.approx(theirs[1], abs=1e-6, nan_ok=True)
    assert ours.per_class_ap50 == pytest.approx(theirs[2], abs=1e-6, nan_ok=True)


def world(seed: int, images: int, most: int, classes: Sequence[int], masks: bool) -> tuple[list[Shapes], list[Shapes]]:
    """Truths, and found boxes of which some are the truth moved a little, some of another class, some anywhere; scores are
    rounded, so that many are equal."""
    rng = np.random.default_rng(seed)
    found, truth = [], []
    for _ in range(images):
        count = int(rng.integers(0, most + 1))
        corner, size = rng.uniform(0, SIDE - 20, (count, 2)), rng.uniform(3, 20, (count, 2))
        boxes = np.hstack([corner, corner + size])
        names = rng.choice(classes, count)
        kept = rng.random(count) < 0.8
        moved = boxes[kept] + rng.normal(0, 1.5, (int(kept.sum()), 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        extra_at = rng.uniform(0, SIDE - 12, (int(rng.integers(0, most + 1)), 2))
        seen = np.vstack([moved, np.hstack([extra_at, extra_at + rng.uniform(3, 12, extra_at.shape)])]).clip(0, SIDE)
        wrong = np.where(rng.random(len(seen)) < 0.1, rng.integers(0, CLASSES, len(seen)), -1)
        guessed = np.concatenate([names[kept], rng.choice(classes, len(extra_at))])
        guessed = np.where(wrong >= 0, wrong, guessed).astype(np.int64)
        scores = np.round(rng.random(len(seen)), 1).astype(np.float32)
        truth.append(Shapes(boxes, names, None, blobs(boxes, rng) if masks else None))
        found.append(Shapes(seen, guessed, scores, blobs(seen, rng) if masks else None))
    return found, truth


def blobs(boxes: np.ndarray, rng: np.random.Generator) -> list[Any]:
    """For each box a mask that fills it as an ellipse, frayed at the edge; one in ten is empty."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    masks = []
    for x1, y1, x2, y2 in boxes:
        radius = ((x - (x1 + x2) / 2) / (x2 - x1)) ** 2 + ((y - (y1 + y2) / 2) / (y2 - y1)) ** 2
        inside = (radius <= 0.25) & (rng.random((SIDE, SIDE)) < 0.95) & (rng.random() > 0.1)
        masks.append(run_lengths(inside))
    return masks


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 6),
    most=st.integers(0, 12),
    classes=st.sampled_from([(0,), (2,), (0, 2), (0, 1, 2)]),
    masks=st.booleans(),
)
def test_any_set_scores_as_pycocotools_scores_it(
    seed: int, images: int, most: int, classes: tuple[int, ...], masks: bool
) -> None:
    found, truth = world(seed, images, most, classes, masks)
    same(found, truth, "segm" if masks else "bbox")


@pytest.mark.parametrize("masks", [False, True])
def test_a_crowd_counts_the_best_hundred(masks: bool) -> None:
    found, truth = world(7, 2, 260, (0, 1), masks)
    assert max(np.bincount(each.classes).max() for each in found) > 100, "else nothing is cut"
    same(found, truth, "segm" if masks else "bbox")


NOTHING = Shapes(np.empty((0, 4)), np.empty(0, np.int64), np.empty(0, np.float32))
TRUTH = Shapes(np.array([[5.0, 5, 25, 25], [30, 30, 50, 50]]), np.array([0, 2]))


@pytest.mark.parametrize(
    ("found", "truth", "expected"),
    [
        ([NOTHING], [TRUTH], 0.0),
        ([TRUTH._replace(scores=np.ones(2))], [TRUTH], 1.0),
        ([TRUTH._replace(scores=np.ones(2), classes=np.array([1, 1]))], [TRUTH], 0.0),  # no such class in the truth
        ([NOTHING, TRUTH._replace(scores=np.ones(2))], [TRUTH, TRUTH], 0.5),
        ([TRUTH._replace(scores=np.ones(2)), TRUTH._replace(scores=np.ones(2) / 2)], [TRUTH, NOTHING], 1.0),
    ],
)
def test_the_ends_of_the_scale(found: list[Shapes], truth: list[Shapes], expected: float) -> None:
    same(found, truth, "bbox")
    assert average_precision(found, truth, CLASSES).map50 == pytest.approx(expected, abs=0.01)


def test_without_truth_there_is_no_figure() -> None:
    assert all(math.isnan(each) for each in average_precision([TRUTH], [NOTHING], CLASSES)[:2])
    assert math.isnan(average_precision([], [], CLASSES).map50)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
def test_an_engines_outline_gives_back_its_mask(seed: int, density: float) -> None:
    """Pieces, holes and bridges: the outline that the segmentation engine makes covers exactly the pixels of the mask."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((19, 23), np.uint8)
    mask[2:17, 3:20] = rng.random((15, 17)) < density
    assert np.array_equal(filled(trace(mask), mask.shape), mask)


@pytest.mark.parametrize("seed", range(5))
def test_a_drawn_outline_covers_the_centres_inside_it(seed: int) -> None:
    polygon = np.random.default_rng(seed).uniform(-4, SIDE + 4, (9, 2))
    assert np.array_equal(filled(polygon, (SIDE, SIDE)).astype(bool), covered(polygon, SIDE))


def test_overlaps_of_masks() -> None:
    left = np.zeros((10, 10), np.uint8)
    left[:, :5] = 1
    upper = left.T.copy()
    masks = [run_lengths(each) for each in (left, upper)]
    np.testing.assert_allclose(mask_overlaps(masks, masks), [[1, 1 / 3], [1 / 3, 1]])
    assert mask_area(masks[0]) == 50
    assert mask_overlaps([], masks).shape == (0, 2)
    assert filled(np.empty((0, 2)), (4, 4)).sum() == 0
