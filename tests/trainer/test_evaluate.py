"""Evaluation and calibration on an engine whose answers are known, so that every figure can be worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest

from edged.core.confidence import check_calibration, probability
from edged.engines.base import Detections, Image, ImageStats, Prepared
from edged.wire.manifest import Thresholds
from trainer.calibrate import ITEMS_MIN, Item, cross_validate, expected_calibration_error, fit
from trainer.core.evaluation import Evaluation
from trainer.evaluate import Labelled, calibration_items, evaluate, image_sha256, observe

T = Thresholds()
BOX, OTHER = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]


class Scripted:
    """Answers image number n (its first pixel) with the n-th of its answers."""

    labels = ("cat", "dog", "owl")

    def __init__(self, answers: list[Detections]) -> None:
        self.answers = answers

    def prepare(self, image: Image) -> Prepared:
        return Prepared(image, image, (1, 1, "uint8"), 1.0, (0.0, 0.0), ImageStats(0.5, 0.2, 0.1))

    def infer(self, batch: Sequence[Prepared]) -> list[Detections]:
        return [self.answers[int(item.image[0, 0, 0])] for item in batch]

    def close(self) -> None: ...


def found(*rows: tuple[list[float], float, int]) -> Detections:
    return Detections(
        np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        np.array([row[1] for row in rows], np.float32),
        np.array([row[2] for row in rows], np.int64),
    )


def labelled(number: int, *truth: tuple[list[float], int]) -> Labelled:
    image = np.full((4, 4, 3), number, dtype=np.uint8)
    return Labelled(
        image, np.array([t[0] for t in truth]).reshape(-1, 4), np.array([t[1] for t in truth], dtype=np.int64)
    )


def scripted() -> tuple[Scripted, list[Labelled]]:
    answers = [
        found((BOX, 0.9, 0), (OTHER, 0.8, 1)),  # all right
        found(
            (BOX, 0.7, 1), (OTHER, 0.1, 1)
        ),  # a dog called right; a weak box that is no answer, but is the missed one
        found((BOX, 0.6, 0)),  # an extra box on an empty image
        found(),
    ]
    truth = [
        labelled(0, (BOX, 0), (OTHER, 1)),
        labelled(1, (BOX, 1), (OTHER, 1)),
        labelled(2),
        labelled(3),
    ]
    return Scripted(answers), truth


def test_the_figures_of_a_known_engine() -> None:
    engine, items = scripted()
    result = evaluate(engine, items, T, "toy@1.0")
    assert result.counts == [(2, 0, 0), (1, 0, 1), (0, 1, 0), (0, 0, 0)]
    assert result.class_counts == [(1, 1, 0), (2, 0, 1), (0, 0, 0)]
    assert (result.n_images, result.n_boxes) == (4, 4)
    assert result.f1 == pytest.approx(6 / 8)
    assert result.frame_accuracy == 0.5
    assert result.class_f1 == {"cat": pytest.approx(2 / 3), "dog": pytest.approx(0.8), "owl": 1.0}
    # Every box of the truth is found above every mistake of its class, counting weak candidates: both AP50 are 1.
    assert result.map50 == pytest.approx(1.0)
    assert result.per_class_ap50[:2] == pytest.approx([1.0, 1.0])
    assert math.isnan(result.per_class_ap50[2])
    assert result.images == [image_sha256(item.image) for item in items]
    assert Evaluation.from_dict(json.loads(json.dumps(result.to_dict()))).counts == result.counts


def test_average_precision_falls_with_a_confident_mistake() -> None:
    engine = Scripted([found((OTHER, 0.9, 0), (BOX, 0.5, 0)), found(([0.0, 0.0, 10.0, 7.0], 0.9, 1))])
    result = evaluate(engine, [labelled(0, (BOX, 0)), labelled(1, (BOX, 1))], T)
    # Cat: the mistake comes first, so precision is 1/2 at every recall. Dog: IoU 0.7 is a hit at 0.5.
    assert result.per_class_ap50[:2] == pytest.approx([0.5, 1.0], abs=0.01)
    assert result.map50 == pytest.approx(0.75, abs=0.01)
    assert result.map50_95 < result.map50


def test_an_empty_set_has_no_figures() -> None:
    result = evaluate(Scripted([]), [], T)
    assert (result.n_images, result.n_boxes, result.frame_accuracy) == (0, 0, 0.0)
    assert math.isnan(result.map50)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["map50"] is None


def test_a_truth_of_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"class 7 in the truth, but toy@1\.0 has 3 labels"):
        evaluate(Scripted([found()]), [labelled(0, (BOX, 7))], T, "toy@1.0")


def test_calibration_items_know_which_frames_were_right() -> None:
    engine, items = scripted()
    observed = observe(engine, [item.image for item in items])
    rows = calibration_items(observed, items, T)
    assert [row.right for row in rows] == [True, False, False, True]
    assert [row.boxes_right.tolist() for row in rows] == [[True, True], [True, True], [False], []]
    assert len(rows[1].detections) == 2  # the weak candidates stay: they are evidence


def test_pixels_and_shape_make_the_identity() -> None:
    flat = np.zeros((2, 8, 3), np.uint8)
    assert image_sha256(flat) == image_sha256(flat.copy())
    assert len({image_sha256(flat), image_sha256(flat.reshape(8, 2, 3)), image_sha256(flat + 1)}) == 3


def world(count: int, seed: int, shift: float = 0.0) -> list[Item]:
    """Frames of two boxes, each right with the probability that its (too optimistic) score only hints at."""
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(count):
        hidden = rng.normal(1.0 - shift, 1.5, size=2)
        scores = np.clip(1 / (1 + np.exp(-(hidden * 0.6 + 1.5))), 0.3, 0.99)
        hits = rng.random(2) < 1 / (1 + np.exp(-2 * hidden))
        stats = ImageStats(*np.clip(rng.normal([0.5 + shift / 4, 0.2, 0.1], [0.05, 0.02, 0.01]), 0.01, None))
        items.append(Item(found((BOX, scores[0], 0), (OTHER, scores[1], 1)), stats, bool(hits.all()), hits))
    return items


def test_the_fitted_probability_holds_on_fresh_items() -> None:
    calibration = fit(world(600, 1), T)
    check_calibration(calibration)
    fresh = world(2000, 2)
    p = np.array([probability(item.detections, T, item.stats, calibration).p for item in fresh])
    right = np.array([item.right for item in fresh])
    raw = np.array([item.detections.scores.min() for item in fresh], dtype=np.float64)
    assert expected_calibration_error(p, right) < 0.05 < expected_calibration_error(raw, right)
    accepted = p >= 0.9
    assert accepted.sum() > 50
    assert (~right[accepted]).mean() < 0.12


def test_cross_validation_tells_a_signal_from_noise() -> None:
    items = world(400, 3)
    honest = cross_validate(items, T)
    order = np.random.default_rng(0).permutation(len(items))
    shuffled = [item._replace(right=items[other].right) for item, other in zip(items, order, strict=True)]
    assert honest.ece < 0.1
    assert honest.brier < cross_validate(shuffled, T).brier - 0.05
    assert (honest.items, honest.right) == (400, sum(item.right for item in items))


def test_too_few_items_stay_uncalibrated() -> None:
    few = world(ITEMS_MIN - 1, 4)
    calibration = fit(few, T)
    assert (calibration.method, calibration.items) == ("uncalibrated", ITEMS_MIN - 1)
    with pytest.raises(ValueError, match="at least 100"):
        cross_validate(few, T)


@pytest.mark.parametrize("right", [True, False])
def test_only_one_outcome_neither_crashes_nor_convinces(right: bool) -> None:
    items = [item._replace(right=right) for item in world(200, 5)]
    calibration = fit(items, T)
    p = np.array([probability(item.detections, T, item.stats, calibration).p for item in items])
    assert calibration.method == "logistic"
    assert (p.mean() > 0.97) == right
    assert 0 < p.min() <= p.max() < 1
    if right:  # nothing wrong was ever seen, and a weak box is doubted all the same
        weak = found((BOX, 0.26, 0), (OTHER, 0.26, 1), ([50.0, 50.0, 60.0, 60.0], 0.24, 2))
        assert probability(weak, T, items[0].stats, calibration).p < 0.9


def test_identical_inputs_still_make_a_reference() -> None:
    hits = [np.array([number % 10 > 0]) for number in range(120)]
    items = [Item(found((BOX, 0.9, 0)), ImageStats(0.5, 0.2, 0.1), bool(hit[0]), hit) for hit in hits]
    calibration = fit(items, T)
    check_calibration(calibration)
    same = probability(items[0].detections, T, ImageStats(0.5, 0.2, 0.1), calibration)
    assert not same.novel
    assert same.p == pytest.approx(0.9, abs=0.03)
    assert probability(items[0].detections, T, ImageStats(0.9, 0.2, 0.1), calibration).novel


def test_the_shifted_world_is_new_and_the_calibrated_one_is_not() -> None:
    calibration = fit(world(400, 6), T)
    novel = [
        np.mean([probability(each.detections, T, each.stats, calibration).novel for each in world(300, 7, shift)])
        for shift in (0.0, 3.0)
    ]
    assert novel[0] < 0.03
    assert novel[1] > 0.9
