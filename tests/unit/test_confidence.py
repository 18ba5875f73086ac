"""The calibrated confidence: its laws over any evidence, and matching, on which its truth rests."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.core.confidence import (
    FEATURES,
    LENIENCE,
    NOTHING,
    NOVELTY_MAX,
    SIGNS,
    Confidence,
    accept_threshold,
    answer_probability,
    box_probabilities,
    check_calibration,
    features,
    novelty,
    probability,
    stats_vector,
)
from edged.core.matching import f1, frame_right, iou_matrix, match, pair
from edged.engines.base import Detections, ImageStats
from edged.wire.manifest import BoxCalibration, Calibration, Novelty, RiskTable, Scaling, Thresholds

T = Thresholds(score=0.25)
STATS = ImageStats(0.5, 0.2, 0.1)
KNOWN = Novelty(centres=[stats_vector(STATS).tolist()], inverse_covariance=(np.eye(5) * 100).tolist(), limit=3.0)
FITTED = Calibration(
    method="logistic",
    features=list(FEATURES),
    mean=[1.0] * len(FEATURES),
    scale=[0.7] * len(FEATURES),
    weights=[0.8 * SIGNS[name] if SIGNS[name] else -0.3 for name in FEATURES],
    bias=0.5,
    items=500,
    novelty=KNOWN,
)


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    table = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


units = st.floats(0, 1, width=32)
sides = st.floats(1, 60, width=32)
corners = st.floats(0, 100, width=32)
box_rows = st.tuples(corners, corners, sides, sides, units, st.integers(0, 3)).map(
    lambda row: (row[0], row[1], row[0] + row[2], row[1] + row[3], row[4], row[5])
)
answers = st.lists(box_rows, max_size=8).map(lambda rows: detections(*rows))
inputs = st.builds(ImageStats, units, units, st.floats(0, 4, width=32), units, units)
signed = st.floats(0, 5)
calibrations = st.one_of(
    st.just(Calibration()),
    st.just(Calibration(novelty=KNOWN)),
    st.builds(
        lambda sizes, bias: FITTED.model_copy(
            update={"weights": [s * (SIGNS[n] or 1) for s, n in zip(sizes, FEATURES, strict=True)], "bias": bias}
        ),
        st.lists(signed, min_size=len(FEATURES), max_size=len(FEATURES)),
        st.floats(-20, 20),
    ),
)


@given(answers, inputs, calibrations)
def test_the_probability_is_a_probability(found: Detections, stats: ImageStats, calibration: Calibration) -> None:
    confidence = probability(found, T, stats, calibration)
    assert 0 <= confidence.p <= 1
    assert 0 <= confidence.novelty <= NOVELTY_MAX
    assert confidence.calibrated == (calibration.method == "logistic")


@given(answers, inputs, calibrations, st.lists(units, min_size=8, max_size=8))
def test_surer_boxes_never_lower_the_probability(
    found: Detections, stats: ImageStats, calibration: Calibration, raises: list[float]
) -> None:
    before = probability(found, T, stats, calibration).p
    kept = found.scores >= T.score
    room = 1 - found.scores
    surer = np.where(kept, found.scores + room * np.array(raises[: len(found)], np.float32), found.scores)
    after = probability(replace(found, scores=surer.astype(np.float32)), T, stats, calibration).p
    assert after >= before - 1e-9


@given(
    answers.filter(lambda each: len(each) > 0),
    calibrations,
    st.sampled_from(["score", "box", "brightness", "contrast", "sharpness", "low", "high"]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_nan_evidence_is_no_confidence(found: Detections, calibration: Calibration, where: str, bad: float) -> None:
    stats = STATS
    if where == "score":
        found.scores[0] = bad
    elif where == "box":
        found.boxes[0, 2] = bad
    else:
        stats = replace(stats, **{where: bad})
    confidence = probability(found, T, stats, calibration)
    assert (confidence.p, confidence.novel) == (0.0, True)
    assert math.isfinite(confidence.novelty)


def test_the_features_of_one_frame() -> None:
    found = detections(
        (0, 0, 10, 10, 0.9, 1),
        (5, 0, 15, 10, 0.5, 2),  # overlaps the first by a third
        (0, 0, 10, 10, 0.2, 3),  # another class on an answered box: a rival
        (5, 0, 15, 10, 0.15, 2),  # the same class on an answered box: says nothing
        (50, 50, 60, 60, 0.1, 1),  # where nothing was answered: perhaps missed
    )
    found = features(found, T, STATS, FITTED)  # type: ignore[assignment]
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    expected = {
        "min_logit": 0.0,
        "mean_logit": logit(0.9) / 2,
        "log_product": math.log(0.45),
        "kept": math.log(3),
        "empty": 0.0,
        "missed_logit": logit(0.1),
        "missed_count": math.log(2),
        "rival_logit": logit(0.2),
        "overlap": 1 / 3,
        "novelty": 0.0,
    }
    assert list(found) == list(FEATURES)  # type: ignore[call-overload]
    assert found == pytest.approx(expected, abs=1e-5)


def test_doubt_lowers_the_probability() -> None:
    sure = detections((0, 0, 10, 10, 0.9, 1), (30, 0, 40, 10, 0.9, 2))
    p = probability(sure, T, STATS, FITTED).p
    for doubt in [(60, 60, 70, 70, 0.2, 1), (0, 0, 10, 10, 0.2, 3)]:
        more = detections(
            *[(*box, s, c) for box, s, c in zip(sure.boxes, sure.scores, sure.classes, strict=True)], doubt
        )
        assert probability(more, T, STATS, FITTED).p < p
        # Without a fit only a missed object counts.
    missed = detections((0, 0, 10, 10, 0.9, 1), (30, 0, 40, 10, 0.2, 2))
    assert probability(missed, T, STATS, Calibration()).p == pytest.approx(0.9 * 0.8, abs=1e-3)


def test_an_empty_answer_without_doubt_is_trusted_by_the_heuristic() -> None:
    confidence = probability(detections(), T, STATS, Calibration())
    assert confidence.p == pytest.approx(0.99)
    assert not confidence.calibrated


def test_new_inputs_are_novel_and_pull_the_probability_down() -> None:
    found = detections((0, 0, 10, 10, 0.95, 1))
    flat = FITTED.model_copy(update={"weights": [0.0] * len(FEATURES), "bias": 4.0})
    near, far, farther = (replace(STATS, low=step) for step in (0.29, 0.31, 0.6))
    results = [probability(found, T, each, flat) for each in (STATS, near, far, farther)]
    assert [each.novel for each in results] == [False, False, True, True]
    assert results[0].p == results[1].p > results[2].p > results[3].p
    assert results[3].p == pytest.approx(results[0].p * 3 / 6)
    assert novelty(farther, flat) == pytest.approx(6)


def test_the_nearest_centre_counts() -> None:
    other = stats_vector(replace(STATS, low=0.4)).tolist()
    two = FITTED.model_copy(update={"novelty": KNOWN.model_copy(update={"centres": [*KNOWN.centres, other]})})
    assert novelty(replace(STATS, low=0.38), two) == pytest.approx(0.2)


bad_numbers = st.sampled_from([math.nan, math.inf, -math.inf])
scalings = st.builds(Scaling, temperature=st.floats(0.02, 50), bias=st.floats(-20, 20))
box_calibrations = st.none() | st.builds(
    BoxCalibration, pooled=scalings, classes=st.dictionaries(st.integers(0, 3), scalings)
)


@given(answers, box_calibrations, st.lists(units, min_size=8, max_size=8))
def test_a_boxs_probability_never_falls_when_its_score_rises(
    found: Detections, scaling: BoxCalibration | None, raises: list[float]
) -> None:
    calibration = Calibration(boxes=scaling)
    before = box_probabilities(found, calibration)
    surer = found.scores + (1 - found.scores) * np.array(raises[: len(found)], np.float32)
    after = box_probabilities(replace(found, scores=surer.astype(np.float32)), calibration)
    assert before.shape == (len(found),)
    assert ((before >= 0) & (after <= 1)).all()
    assert (after >= before - 1e-9).all()


@given(answers.filter(lambda each: len(each) > 0), box_calibrations, st.booleans(), bad_numbers)
def test_a_box_of_nan_is_right_with_probability_0(
    found: Detections, scaling: BoxCalibration | None, in_score: bool, bad: float
) -> None:
    others = box_probabilities(found, Calibration(boxes=scaling))[1:]
    if in_score:
        found.scores[0] = bad
    else:
        found.boxes[0, 3] = bad
    p = box_probabilities(found, Calibration(boxes=scaling))
    assert p[0] == 0.0
    assert (p[1:] == others).all()


def test_a_class_has_its_own_scaling_or_shares_the_pools() -> None:
    boxes = BoxCalibration(pooled=Scaling(temperature=2), classes={1: Scaling(temperature=1, bias=-1)})
    found = detections((0, 0, 9, 9, 0.9, 0), (0, 0, 9, 9, 0.9, 1), (0, 0, 9, 9, 0.5, 2))
    logit = math.log(9)
    expected = [1 / (1 + math.exp(-logit / 2)), 1 / (1 + math.exp(-(logit - 1))), 0.5]
    assert box_probabilities(found, Calibration(boxes=boxes)) == pytest.approx(expected, abs=1e-6)
    assert box_probabilities(found, Calibration()) == pytest.approx([0.9, 0.9, 0.5])


@pytest.mark.parametrize(
    ("logprob", "p"), [(0.0, 1.0), (-1.0, math.exp(-1)), (3.0, 1.0), (-math.inf, 0.0), (math.nan, 0.0)]
)
def test_a_generated_answers_probability_without_a_fit(logprob: float, p: float) -> None:
    assert answer_probability(logprob, Calibration()) == Confidence(p, 0.0, False, False)


@given(st.floats(-50, 1), st.floats(0, 10), scalings)
def test_a_generated_answers_fitted_probability(logprob: float, more: float, scaling: Scaling) -> None:
    calibration = Calibration(method="scaled", answers=scaling)
    low, high = (answer_probability(value, calibration) for value in (logprob, logprob + more))
    assert low.calibrated
    assert 0 <= low.p <= high.p <= 1
    assert answer_probability(math.nan, calibration).p == 0
    even = 1 / (1 + math.exp(-scaling.bias))  # of a score of 0.5, whatever the temperature
    assert answer_probability(math.log(0.5), calibration).p == pytest.approx(even)


def tables(thresholds: list[float], bounds: list[float]) -> Calibration:
    return FITTED.model_copy(update={"risk": RiskTable(thresholds=thresholds, bounds=bounds)})


risky = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8, unique_by=lambda row: row[0]).map(
    lambda rows: tables(*map(list, zip(*sorted(rows), strict=True)))
)


@given(risky | st.just(FITTED) | st.just(Calibration()), st.floats(0, 1), st.floats(0, 1))
def test_more_risk_never_asks_for_more(calibration: Calibration, first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert accept_threshold(calibration, high) <= accept_threshold(calibration, low)


@given(risky, st.floats(0, 1))
def test_a_threshold_keeps_its_bound(calibration: Calibration, target: float) -> None:
    assert calibration.risk is not None
    bounds = dict(zip(calibration.risk.thresholds, calibration.risk.bounds, strict=True))
    chosen = accept_threshold(calibration, target)
    allowed = [each for each, bound in bounds.items() if bound <= target and each >= 1 - LENIENCE * target - 1e-9]
    assert chosen == min(allowed, default=NOTHING)


@pytest.mark.parametrize(
    ("calibration", "target", "threshold"),
    [
        (tables([0.7, 0.8, 0.9], [0.2, 0.1, 0.05]), 0.15, 0.8),
        (tables([0.7, 0.8, 0.9], [0.2, 0.1, 0.05]), 0.1, 0.8),  # as much as the target is not more
        (tables([0.7, 0.8, 0.9], [0.2, 0.1, 0.05]), 0.04, NOTHING),
        (tables([0.6, 0.7, 0.8], [0.01, 0.01, 0.01]), 0.15, 0.7),  # all together are safe, but 0.6 alone is not
        (tables([0.8, 0.9], [0.1, 0.3]), 0.2, 0.8),  # bounds rise again where few items are left
        (FITTED, 0.1, 0.9),  # a release without a table: Chow's rule
        (Calibration(), 0.9, NOTHING),
        (FITTED, math.nan, NOTHING),
        (tables([0.0], [0.0]), math.nan, NOTHING),
    ],
)
def test_where_acceptance_begins(calibration: Calibration, target: float, threshold: float) -> None:
    assert accept_threshold(calibration, target) == pytest.approx(threshold)


@given(answers.filter(lambda each: len(each) > 0), risky, st.sampled_from(["score", "box", "brightness"]), bad_numbers)
def test_nothing_with_nan_is_accepted(found: Detections, calibration: Calibration, where: str, bad: float) -> None:
    stats = replace(STATS, brightness=bad) if where == "brightness" else STATS
    if where == "score":
        found.scores[0] = bad
    elif where == "box":
        found.boxes[0, 2] = bad
    confidence = probability(found, T, stats, calibration)
    # Even where a table of nonsense would accept everything, the input counts as novel.
    assert confidence.novel or confidence.p < accept_threshold(calibration, 1.0)
    assert confidence.p == 0


SINKING = Scaling.model_construct(temperature=-1.0, bias=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ["mood", *FEATURES[1:]]}, "unknown features"),
        ({"weights": [1.0]}, "different lengths"),
        ({"weights": [-1.0, *FITTED.weights[1:]]}, "wrong sign"),
        ({"scale": [0.0] * len(FEATURES)}, "must be positive"),
        ({"bias": math.nan}, "NaN"),
        ({"novelty": KNOWN.model_copy(update={"centres": [[0.0, 0.0]]})}, "centres of 5"),
        ({"features": [], "mean": [], "scale": [], "weights": []}, "without any feature"),
        ({"method": "scaled"}, "says nothing about answers"),
        ({"answers": Scaling(temperature=1, bias=math.nan)}, "NaN"),
        ({"boxes": BoxCalibration(pooled=Scaling(temperature=math.inf))}, "NaN or infinity"),
        (
            {"boxes": BoxCalibration(pooled=Scaling(temperature=1), classes={2: SINKING})},
            "temperatures must be positive",
        ),
        ({"risk": RiskTable(thresholds=[0.5, 0.9], bounds=[0.1])}, "2 thresholds and 1 bounds"),
        ({"risk": RiskTable(thresholds=[0.9, 0.5], bounds=[0.1, 0.2])}, "do not rise"),
        ({"risk": RiskTable(thresholds=[0.5, 0.5], bounds=[0.1, 0.2])}, "do not rise"),
        ({"risk": RiskTable(thresholds=[0.5, math.nan], bounds=[0.1, 0.2])}, r"outside 0\.\.1"),
        ({"risk": RiskTable(thresholds=[0.5], bounds=[-0.1])}, r"outside 0\.\.1"),
        ({"risk": RiskTable(thresholds=[0.5], bounds=[1.1])}, r"outside 0\.\.1"),
    ],
)
def test_a_calibration_that_cannot_be_applied_is_refused(change: dict[str, Any], message: str) -> None:
    check_calibration(FITTED)
    with pytest.raises(ValueError, match=message):
        check_calibration(FITTED.model_copy(update=change))


A, B, FAR = [0, 0, 10, 10], [20, 0, 30, 10], [100, 100, 110, 110]


@pytest.mark.parametrize(
    ("predicted", "truth", "counts"),
    [
        ([], [], (0, 0, 0)),
        ([(A, 1, 0.9)], [(A, 1)], (1, 0, 0)),
        ([(A, 2, 0.9)], [(A, 1)], (0, 1, 1)),  # wrong class: extra and missed
        ([(A, 1, 0.9), (A, 1, 0.8)], [(A, 1)], (1, 1, 0)),  # found twice
        ([(A, 1, 0.9)], [(A, 1), (B, 2)], (1, 0, 1)),
        ([(A, 1, 0.9), (FAR, 1, 0.3)], [(A, 1)], (1, 1, 0)),
        ([([0, 0, 10, 4.9], 1, 0.9)], [(A, 1)], (0, 1, 1)),  # overlaps by 0.49
        ([([0, 0, 10, 5.1], 1, 0.9)], [(A, 1)], (1, 0, 0)),  # by 0.51
        ([([0, 0, 0, 0], 1, 0.9)], [([0, 0, 0, 0], 1)], (0, 1, 1)),  # no area, no overlap
    ],
)
def test_matching(predicted: list[Any], truth: list[Any], counts: tuple[int, int, int]) -> None:
    boxes, classes, scores = (np.array([row[k] for row in predicted]) for k in range(3))
    true_boxes, true_classes = (np.array([row[k] for row in truth]) for k in range(2))
    result = match(boxes, classes, scores, true_boxes, true_classes)
    assert (result.tp, result.fp, result.fn) == counts
    assert frame_right(boxes, classes, scores, true_boxes, true_classes) == (counts[1:] == (0, 0))


def test_the_best_scored_prediction_chooses_first() -> None:
    boxes = np.array([[0, 0, 10, 8], [0, 0, 10, 10]])
    found = pair(boxes, np.array([1, 1]), np.array([0.9, 0.5]), np.array([A]), np.array([1]))
    assert found.tolist() == [0, -1]


@given(answers, answers)
def test_matching_never_counts_a_box_twice(found: Detections, truth: Detections) -> None:
    result = match(found.boxes, found.classes, found.scores, truth.boxes, truth.classes)
    assert result.tp + result.fp == len(found)
    assert result.tp + result.fn == len(truth)
    assert min(result.tp, result.fp, result.fn) >= 0
    assert 0 <= f1(result.tp, result.fp, result.fn) <= 1
    overlaps = iou_matrix(found.boxes, truth.boxes)
    assert ((overlaps >= 0) & (overlaps <= 1 + 1e-9)).all()


@given(answers)
def test_the_truth_itself_is_the_right_answer(truth: Detections) -> None:
    assert frame_right(truth.boxes, truth.classes, truth.scores, truth.boxes, truth.classes)


@pytest.mark.parametrize(
    ("counts", "value"), [((0, 0, 0), 1.0), ((0, 1, 0), 0.0), ((2, 1, 1), 4 / 6), ((3, 0, 0), 1.0)]
)
def test_f1(counts: tuple[int, int, int], value: float) -> None:
    assert f1(*counts) == pytest.approx(value)
