"""What parity calls the same, and what it does not: every metric, and that nothing passes by having nothing to compare."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from trainer.core.parity import (
    IMAGE_TOLERANCES,
    Answer,
    Exported,
    Parity,
    ParityFailed,
    ParityReport,
    compare_boxes,
    compare_labels,
    compare_logits,
    effect_off,
    rows_of,
    text_tolerances,
)

BOXES = np.array([[10, 10, 50, 50], [60, 10, 90, 50], [10, 60, 50, 90]], np.float32)


def answer(
    boxes: np.ndarray = BOXES, scores: tuple[float, ...] = (0.9, 0.8, 0.7), kinds: tuple[int, ...] = (0, 1, 2)
) -> Answer:
    return Answer(np.asarray(boxes, np.float32), np.array(scores), np.array(kinds))


def test_logits_that_are_the_same_are_not_off() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 11)).astype(np.float32)
    assert compare_logits(logits, logits) == {"logits_max": 0, "logits_mean": 0, "top1_changed": 0, "kl": 0}


def test_logits_are_measured_in_their_own_deviations_and_in_nats() -> None:
    expected = np.array([[2.0, -2.0], [2.0, -2.0]])
    found = np.array([[2.0, -2.0], [-2.0, 2.0]])
    values = compare_logits(expected, found)
    assert values["logits_max"] == pytest.approx(2.0)  # 4, and their standard deviation is 2
    assert values["logits_mean"] == pytest.approx(1.0)
    assert values["top1_changed"] == 0.5
    # One of two positions: sum p ln(p / q) = (p - q) * 4 with p, q = sigmoid(+-4).
    p = 1 / (1 + math.exp(-4))
    assert values["kl"] == pytest.approx(4 * (2 * p - 1) / 2)


@pytest.mark.parametrize(
    "found", [np.full((6, 11), np.nan), np.zeros((5, 11)), np.full((6, 11), np.inf)], ids=["NaN", "short", "infinite"]
)
def test_logits_that_cannot_be_compared_pass_no_tolerance(found: np.ndarray) -> None:
    values = compare_logits(np.ones((6, 11)), found)
    assert not any(row.passed for row in rows_of("logits", values, text_tolerances("Q4_K_M")))


def test_an_adapter_is_judged_by_what_it_changes() -> None:
    rng = np.random.default_rng(1)
    base, change = rng.normal(size=(4, 9)), rng.normal(size=(4, 9)) * 0.001
    assert effect_off(base, base + change, base, base + change) == pytest.approx(0)
    assert effect_off(base, base + change, base, base + 2 * change) == pytest.approx(1)  # twice its scale
    assert effect_off(base, base + change, base, base) == pytest.approx(1)  # not attached
    assert math.isnan(effect_off(base, base, base, base))  # it does nothing, so nothing is shown


def test_boxes_that_are_the_same_are_not_off() -> None:
    assert compare_boxes([answer()], [answer()], 0.25) == {"boxes_changed": 0, "iou_off": 0, "score_off": 0}


CHANGED: dict[str, tuple[Answer, str]] = {
    "lost": (answer(BOXES[:2], (0.9, 0.8), (0, 1)), "boxes_changed"),
    "other class": (answer(kinds=(0, 1, 1)), "boxes_changed"),
    "new": (
        answer(np.vstack([BOXES, [[60, 60, 90, 90], [5, 5, 9, 9]]]), (0.9, 0.8, 0.7, 0.6, 0.6), (0, 1, 2, 2, 2)),
        "boxes_changed",
    ),
    "moved": (answer(BOXES + np.array([8, 0, 8, 0], np.float32)), "iou_off"),
    "less sure": (answer(scores=(0.7, 0.6, 0.5)), "score_off"),
    "nothing": (answer(np.empty((0, 4)), (), ()), "boxes_changed"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_boxes_that_changed_are_seen(name: str) -> None:
    found, metric = CHANGED[name]
    values = compare_boxes([answer()], [found], 0.25)
    failed = [row.metric for row in rows_of("detect", values, IMAGE_TOLERANCES["int8"]) if not row.passed]
    assert metric in failed


def test_a_box_at_the_threshold_may_come_or_go() -> None:
    many = [answer(scores=(0.9, 0.8, 0.7))] * 3  # enough sure ones: weaker ones do not count
    weak = answer(np.vstack([BOXES, [[60, 60, 90, 90]]]), (0.9, 0.8, 0.7, 0.3), (0, 1, 2, 2))
    assert compare_boxes([*many, weak], [*many, answer()], 0.25)["boxes_changed"] == 0
    assert compare_boxes([*many, answer()], [*many, weak], 0.25)["boxes_changed"] == 0


def test_weak_boxes_are_compared_where_there_are_no_others() -> None:
    weak = answer(scores=(0.11, 0.1, 0.09))
    assert compare_boxes([weak], [weak], 0.25)["boxes_changed"] == 0
    assert compare_boxes([weak], [answer(scores=(0.11, 0.1, 0.09), kinds=(2, 1, 0))], 0.25)["boxes_changed"] > 0.5


def test_masks_are_compared_where_both_have_one() -> None:
    left, right = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    left[:, :2], right[:, 1:3] = True, True
    one = Answer(BOXES[:1], np.array([0.9]), np.array([0]), [left])
    other = Answer(BOXES[:1], np.array([0.9]), np.array([0]), [right])
    assert compare_boxes([one], [one], 0.25)["mask_off"] == 0
    assert compare_boxes([one], [other], 0.25)["mask_off"] == pytest.approx(1 - 4 / 12)


def test_a_classifier_is_compared_by_its_best_label_and_its_probabilities() -> None:
    nothing = np.empty((0, 4))
    told = Answer(nothing, np.array([0.7, 0.2, 0.1]), np.array([0, 1, 2]))
    assert compare_labels([told], [told]) == {"labels_changed": 0, "score_off": 0}
    swapped = Answer(nothing, np.array([0.7, 0.2, 0.1]), np.array([1, 0, 2]))
    assert compare_labels([told], [swapped])["labels_changed"] == 1
    assert compare_labels([told], [swapped])["score_off"] == pytest.approx(1 / 3)


def test_nothing_found_and_nothing_compared_is_a_failure() -> None:
    empty = answer(np.empty((0, 4)), (), ())
    values = compare_boxes([empty], [empty], 0.25)
    report = ParityReport("int8", 1, rows_of("detect", values, IMAGE_TOLERANCES["int8"]))
    assert not report.passed
    with pytest.raises(ParityFailed, match=r"1 golden inputs: detect boxes_changed nan.*that the checkpoint answers"):
        report.check()
    assert '"value": null' in json.dumps(report.to_dict(), allow_nan=False)
    assert not ParityReport("int8", 0, ()).passed
    with pytest.raises(ParityFailed, match="without parity"):
        Exported({}, ()).check()


def test_one_failing_step_fails_the_export() -> None:
    good = ParityReport("F16", 3, (Parity("logits", "kl", 0.001, 0.005),))
    bad = ParityReport("Q4_K_M", 3, (Parity("logits", "kl", 0.4, 0.3),))
    assert Exported({}, (good,)).check().lineage()[0]["passed"]
    with pytest.raises(ParityFailed, match=r"Q4_K_M file.*logits kl 0\.4, at most 0\.3"):
        Exported({}, (good, bad)).check()


@pytest.mark.parametrize(("form", "same"), [("Q4_K_M", "Q4"), ("IQ4_NL", "Q4"), ("Q8_0", "Q8"), ("F16", "F16")])
def test_formats_of_a_family_share_their_tolerances(form: str, same: str) -> None:
    assert text_tolerances(form) == text_tolerances(same)


def test_a_format_without_tolerances_is_refused() -> None:
    with pytest.raises(ValueError, match=r"TQ1_0.*known: fp32"):
        text_tolerances("TQ1_0")
