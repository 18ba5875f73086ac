"""Risk tables, scalings and answers: what is promised about them holds over many draws, and what is too little stays so."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from edged.core.confidence import NOTHING, accept_threshold, answer_probability, check_calibration, probability
from edged.engines.base import Detections, ImageStats
from edged.metrics import Window
from edged.wire.manifest import Calibration, RiskTable, Scaling, Thresholds
from trainer.calibrate import ITEMS_MIN, Item, expected_calibration_error, fit, fit_answers
from trainer.core.risk import LEVELS, risk_table, upper_bound
from trainer.scaling import BOXES_MIN, CLASS_BOXES_MIN, fit_boxes, fit_scaling

T = Thresholds(score=0.25)


@pytest.mark.parametrize(("wrong", "accepted"), [(0, 1), (0, 60), (1, 60), (7, 60), (59, 60), (30, 400)])
def test_the_bound_is_the_exact_one(wrong: int, accepted: int) -> None:
    """At the bound, seeing so few wrong answers has exactly the probability that was given away."""
    assert binom.cdf(wrong, accepted, upper_bound(wrong, accepted, 0.95)) == pytest.approx(0.05)


def test_where_nothing_was_counted_nothing_is_promised() -> None:
    assert [upper_bound(*counts, 0.95) for counts in ((0, 0), (1, 1), (20, 20))] == [1.0, 1.0, 1.0]


def chosen(table: RiskTable, target: float) -> float:
    return accept_threshold(Calibration(method="scaled", answers=Scaling(temperature=1), risk=table), target)


@pytest.mark.parametrize(("items", "target"), [(150, 0.15), (300, 0.1), (300, 0.15), (1000, 0.1)])
def test_the_target_is_missed_in_at_most_one_draw_of_twenty(items: int, target: float) -> None:
    """The hardest world: a little above the target at every threshold, so that accepting anything at all is a miss.

    Twenty thresholds are twenty chances to be lucky: without the correction for them, or with the observed risk in place
    of its bound, far more than 5 % of the draws would accept.
    """
    rng, draws = np.random.default_rng(items), 600
    risk = target * 1.02
    missed = 0
    for _ in range(draws):
        p = rng.beta(8, 1, size=items)
        missed += chosen(risk_table(p, rng.random(items) >= risk), target) < NOTHING
    assert missed <= binom.ppf(0.999, draws, 0.05)


def test_a_good_model_is_trusted_on_a_few_hundred_items() -> None:
    rng = np.random.default_rng(0)
    accepted = []
    for _ in range(100):
        p = rng.beta(12, 1, size=150)
        threshold = chosen(risk_table(p, rng.random(150) < p), 0.15)
        accepted.append(float((p >= threshold).mean()))
    assert np.quantile(accepted, 0.1) > 0.4
    assert np.median(accepted) > 0.8


def test_twenty_right_answers_prove_little() -> None:
    table = risk_table(np.full(20, 0.99), np.full(20, True))
    assert min(table.bounds) == pytest.approx(1 - (0.05 / len(LEVELS)) ** (1 / 20))
    assert chosen(table, 0.15) == NOTHING


def test_a_table_counts_what_each_threshold_accepts() -> None:
    p = np.array([0.999, 0.96, 0.96, 0.72, 0.3, -1.0])  # the last is novel: no threshold lets it pass
    table = risk_table(p, np.array([True, False, True, True, False, False]), confidence=0.9)
    rows = dict(zip(table.thresholds, table.bounds, strict=True))
    each = 1 - 0.1 / len(LEVELS)
    assert rows[0.995] == upper_bound(0, 1, each)
    assert rows[0.95] == rows[0.96] == upper_bound(1, 3, each)
    assert rows[0.7] == upper_bound(1, 4, each)
    assert rows[0.2] == upper_bound(2, 5, each)
    assert (table.items, table.confidence) == (6, 0.9)


def frames(count: int, seed: int) -> list[Item]:
    """Frames of one box, right with the probability that is its score."""
    rng = np.random.default_rng(seed)
    items = []
    for score, luck in zip(rng.uniform(0.3, 0.99, count), rng.random(count), strict=True):
        found = Detections(np.array([[0, 0, 9, 9]], np.float32), np.array([score], np.float32), np.array([0]))
        stats = ImageStats(*rng.normal([0.5, 0.2, 0.1, 0.1, 0.9], 0.02))
        items.append(Item(found, stats, bool(luck < score), np.array([luck < score])))
    return items


def test_what_counts_fits_nothing_and_what_fits_does_not_count() -> None:
    items = frames(120, 1)
    before = fit(items, T)
    check_calibration(before)
    assert before.risk is not None
    assert before.risk.items == 40
    counts, fits = [], []
    for index in range(8):  # what changes when this item's truth does?
        after = fit([*items[:index], items[index]._replace(right=not items[index].right), *items[index + 1 :]], T)
        if after.weights == before.weights:
            counts.append(index)
            assert after.risk != before.risk
        else:
            fits.append(index)
    assert len(fits) > len(counts) > 0


def test_a_release_carries_the_histogram_of_what_counted_as_devices_will_count_it() -> None:
    items = frames(150, 3)
    model = fit(items, T)
    p = [probability(item.detections, T, item.stats, model).p for item in items]
    assert model.risk is not None
    assert sum(model.confidence_histogram) == model.risk.items == 50
    window = Window(0.0)
    for each in p:
        window.answer("line", "toy@1.0", "accept", "confident", each, 1.0)
    everything = window.close(1.0)[0]["confidence_histogram"]
    assert all(part <= whole for part, whole in zip(model.confidence_histogram, everything, strict=True))
    rows = [(-0.05, True), (-3.0, False)] * 75
    assert sum(fit_answers(rows).confidence_histogram) == 50
    assert fit(items[: ITEMS_MIN - 1], T).confidence_histogram == []


def test_the_same_items_give_the_same_release() -> None:
    assert fit(frames(150, 2), T) == fit(frames(150, 2), T)


def hits(scores: NDArray[np.float64], scaling: Scaling, seed: int) -> NDArray[np.bool_]:
    z = np.log(scores / (1 - scores)) / scaling.temperature + scaling.bias
    return np.asarray(np.random.default_rng(seed).random(len(scores)) < 1 / (1 + np.exp(-z)))


@pytest.mark.parametrize("true", [Scaling(temperature=2.0, bias=0.3), Scaling(temperature=0.6, bias=-0.5)])
def test_a_scaling_is_found_again(true: Scaling) -> None:
    scores = np.random.default_rng(0).uniform(0.1, 0.95, 20_000)
    found = fit_scaling(scores, hits(scores, true, 1))
    assert (found.temperature, found.bias) == pytest.approx((true.temperature, true.bias), abs=0.1)


@pytest.mark.parametrize("right", [True, False])
def test_one_outcome_alone_makes_no_certainty(right: bool) -> None:
    scores = np.random.default_rng(0).uniform(0.3, 0.95, 200)
    found = fit_scaling(scores, np.full(200, right))
    p = 1 / (1 + np.exp(-(np.log(scores / (1 - scores)) / found.temperature + found.bias)))
    assert 0 < p.min() <= p.max() < 1
    assert (p.mean() > 0.95) == right


def test_rare_classes_share_a_scaling() -> None:
    rng = np.random.default_rng(0)
    counts = {0: CLASS_BOXES_MIN, 1: CLASS_BOXES_MIN - 1, 2: 40}
    classes = [label for label, count in counts.items() for _ in range(count)]
    scores = rng.uniform(0.3, 0.95, len(classes)).tolist()
    right = [bool(label != 0 and luck < 0.9) for label, luck in zip(classes, rng.random(len(classes)), strict=True)]
    found = fit_boxes(scores, classes, right)
    assert found is not None
    assert list(found.classes) == [0]
    assert found.items == len(classes)
    # Class 0 is never right; the pool of the others knows nothing of it.
    assert found.classes[0].bias < -2 < 0 < found.pooled.bias


def test_where_all_classes_are_rare_together_the_pool_is_everything() -> None:
    rng = np.random.default_rng(0)
    classes = [0] * (CLASS_BOXES_MIN + 1) + [1] * 20
    scores = rng.uniform(0.3, 0.95, len(classes)).tolist()
    right = [label == 0 for label in classes]
    found = fit_boxes(scores, classes, right)
    assert found is not None
    assert found.pooled.bias > 0  # 20 boxes alone would have said: always wrong


def test_too_few_boxes_stay_as_they_are() -> None:
    assert fit_boxes([0.9] * (BOXES_MIN - 1), [0] * (BOXES_MIN - 1), [True] * (BOXES_MIN - 1)) is None


def replies(count: int, seed: int) -> list[tuple[float, bool]]:
    """A model that is far too sure: its answers of 95 % are right in three cases of four."""
    rng = np.random.default_rng(seed)
    raw = rng.uniform(0.5, 0.999, count)
    right = hits(raw, Scaling(temperature=2.0, bias=-0.3), seed + 1)
    return [(math.log(score), bool(hit)) for score, hit in zip(raw, right, strict=True)]


def test_answers_are_right_as_often_as_they_say() -> None:
    calibration = fit_answers(replies(3000, 1))
    check_calibration(calibration)
    fresh = replies(3000, 5)
    right = np.array([hit for _, hit in fresh])
    before, after = (
        expected_calibration_error(np.array([answer_probability(logprob, each).p for logprob, _ in fresh]), right)
        for each in (Calibration(), calibration)
    )
    assert after < 0.03 < 0.1 < before
    assert calibration.risk is not None
    assert calibration.risk.items == 1000
    threshold = accept_threshold(calibration, 0.3)
    accepted = np.array([answer_probability(logprob, calibration).p >= threshold for logprob, _ in fresh])
    assert accepted.mean() > 0.1
    assert (~right[accepted]).mean() <= 0.3


def test_too_few_answers_are_uncalibrated() -> None:
    calibration = fit_answers(replies(ITEMS_MIN - 1, 1))
    assert (calibration.method, calibration.answers, calibration.risk) == ("uncalibrated", None, None)
    assert accept_threshold(calibration, 0.5) == NOTHING


def test_an_answer_without_a_probability_is_refused() -> None:
    with pytest.raises(ValueError, match="is NaN"):
        fit_answers([*replies(ITEMS_MIN, 1), (math.nan, True)])
