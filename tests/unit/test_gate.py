"""The gate: one row for each way in which a training can go wrong, and each must be caught by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.parities import SAME, Parity
from trainer.core.evaluation import Counts, Evaluation
from trainer.core.gate import Evidence, Holdout, Rules, Verdict, judge

IMAGES = 120
LABELS = ["zero", "one", "two"]
RULES = Rules(bootstrap_draws=400)


def evaluation(kind: str, hit_rate: float, seed: int = 1, missing_class: int | None = None) -> Evaluation:
    """Results of a model that finds each of 3 boxes an image (one a class) with `hit_rate`; never `missing_class`."""
    rng = np.random.default_rng(seed)
    hits = rng.random((IMAGES, len(LABELS))) < hit_rate
    if missing_class is not None:
        hits[:, missing_class] = False
    counts: list[Counts] = [(int(row.sum()), 0, int((~row).sum())) for row in hits]
    classes: list[Counts] = [(int(column.sum()), 0, int((~column).sum())) for column in hits.T]
    return Evaluation(
        release="digits@1.1",
        labels=LABELS,
        images=[f"{kind}{index}" for index in range(IMAGES)],
        counts=counts,
        class_counts=classes,
        map50=hit_rate,
        map50_95=hit_rate / 2,
        per_class_ap50=[hit_rate] * len(LABELS),
        latency_ms_median=4.0,
        class_rows=[(n, c, int(hit), 0, int(not hit)) for n, row in enumerate(hits) for c, hit in enumerate(row)],
    )


CURRENT = Evidence("a" * 64, "1" * 64, evaluation("t", 0.6), evaluation("b", 0.97))
CANDIDATE = Evidence(
    "b" * 64,
    "2" * 64,
    evaluation("t", 0.9, seed=2),
    evaluation("b", 0.97, seed=3),
    calibration_method="logistic",
    calibration_ece=0.03,
    export_before=0.905,
    export_after=0.9,
    parity=(SAME,),
)
HOLDOUT = Holdout(
    frozenset(f"t{index}" for index in range(IMAGES)),
    frozenset(f"b{index}" for index in range(IMAGES)),
    frozenset(f"s{index}" for index in range(300)),
    near_duplicates=frozenset(),
)


def verdict(
    candidate: Evidence = CANDIDATE,
    current: Evidence | None = CURRENT,
    holdout: Holdout = HOLDOUT,
    rules: Rules = RULES,
) -> Verdict:
    return judge(candidate, current, holdout, rules, np.random.default_rng(7))


def test_a_better_release_passes_and_says_why() -> None:
    result = verdict()
    assert result.passed, result.reasons
    assert result.reasons == []
    gain = next(check for check in result.checks if check.name == "gain")
    assert isinstance(gain.value, float)
    assert 0.1 < gain.value < 0.2
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["passed"] is True


def test_a_first_release_needs_no_predecessor() -> None:
    assert verdict(current=None).passed
    weak = verdict(replace(CANDIDATE, target=evaluation("t", 0.2)), current=None)
    assert [check.name for check in weak.checks if not check.passed] == ["f1"]


def test_the_same_seed_gives_the_same_verdict() -> None:
    assert verdict() == verdict()


TARGET, BASE = CANDIDATE.target, CANDIDATE.base
assert TARGET is not None
assert BASE is not None
EMPTY = replace(
    BASE, counts=[(0, 0, 0)] * IMAGES, class_counts=[(0, 0, 0)] * 3, class_rows=[], map50=math.nan, map50_95=math.nan
)


# name -> (candidate, current, holdout, the checks that must fail, a part of a reason)
FAILURES: dict[str, tuple[Evidence, Evidence, Holdout, set[str], str]] = {
    "shuffled labels taught nothing": (
        replace(CANDIDATE, target=evaluation("t", 0.62, seed=1)),
        replace(CURRENT, target=evaluation("t", 0.6, seed=8)),
        HOLDOUT,
        {"gain", "chance"},
        "no better than the current release",
    ),
    "shuffled labels made it useless": (
        replace(CANDIDATE, target=evaluation("t", 0.1), base=evaluation("b", 0.1)),
        CURRENT,
        HOLDOUT,
        {
            "gain",
            "chance",
            "f1",
            "forgetting",
            *(f"class {label} ({what})" for label in LABELS for what in ("target", "base")),
        },
        "F1 on the target holdout (at least)",
    ),
    "the same weights again, and chance was kind": (
        replace(CANDIDATE, weights_sha256=CURRENT.weights_sha256),
        CURRENT,
        HOLDOUT,
        {"new_weights"},
        "must be known and differ",
    ),
    "weights unknown": (
        replace(CANDIDATE, weights_sha256=""),
        CURRENT,
        HOLDOUT,
        {"new_weights"},
        "must be known and differ",
    ),
    "no better than before": (
        replace(CANDIDATE, target=CURRENT.target, base=CURRENT.base),
        CURRENT,
        HOLDOUT,
        {"gain", "chance"},
        "no better than the current release",
    ),
    "the same bytes again": (
        replace(CANDIDATE, model_sha256=CURRENT.model_sha256),
        CURRENT,
        HOLDOUT,
        {"new_bytes"},
        "must be known and differ",
    ),
    "training data in the holdout": (
        CANDIDATE,
        CURRENT,
        replace(HOLDOUT, training=HOLDOUT.training | {"t7", "b9"}),
        {"disjoint"},
        "trained on (at most): 2, bound 0",
    ),
    "training data unknown": (
        CANDIDATE,
        CURRENT,
        replace(HOLDOUT, training=frozenset()),
        {"training_known"},
        "0, bound 1",
    ),
    "one class forgotten": (
        replace(CANDIDATE, target=evaluation("t", 1.0, missing_class=1)),
        replace(CURRENT, target=evaluation("t", 0.4)),
        HOLDOUT,
        {"class one (target)"},
        "F1 lost on class 'one' of the target holdout",
    ),
    "clean scenes forgotten": (
        replace(CANDIDATE, base=evaluation("b", 0.88)),
        CURRENT,
        HOLDOUT,
        {"forgetting"},
        "F1 lost on the base holdout",
    ),
    "quantisation broke it": (
        replace(CANDIDATE, export_before=0.95, export_after=0.4),
        CURRENT,
        HOLDOUT,
        {"export"},
        "0.55, bound 0.02",
    ),
    "export never compared": (replace(CANDIDATE, export_before=None), CURRENT, HOLDOUT, {"export"}, "not measured"),
    "a NaN metric": (
        replace(CANDIDATE, target=replace(TARGET, map50=math.nan)),
        CURRENT,
        HOLDOUT,
        {"finite (target)"},
        "mAP50 not a number",
    ),
    "a NaN export figure": (
        replace(CANDIDATE, export_after=math.nan),
        CURRENT,
        HOLDOUT,
        {"export"},
        "not measured (nan)",
    ),
    "an empty holdout": (
        replace(CANDIDATE, target=replace(TARGET, images=[], counts=[], class_counts=[(0, 0, 0)] * 3, map50=math.nan)),
        CURRENT,
        replace(HOLDOUT, target=frozenset()),
        {"holdout_images", "measured (target holdout)", "measured (target holdout, current release)", "gain", "chance"}
        | {"finite (target)", "boxes (target)", "f1", "classes (target)"},
        "images in the target holdout (at least): 0, bound 50",
    ),
    "a part of the holdout skipped": (
        replace(CANDIDATE, base=replace(BASE, images=BASE.images[:-1], counts=BASE.counts[:-1])),
        CURRENT,
        HOLDOUT,
        {"measured (base holdout)", "classes (base)"},
        "1 images differ",
    ),
    "one image scored many times": (
        replace(CANDIDATE, target=replace(TARGET, images=[*TARGET.images, "t0"], counts=[*TARGET.counts, (3, 0, 0)])),
        CURRENT,
        HOLDOUT,
        {"measured (target holdout)", "gain", "chance", "classes (target)"},
        "not scored on the same images",
    ),
    "not evaluated at all": (
        replace(CANDIDATE, target=None, base=None),
        CURRENT,
        HOLDOUT,
        {
            "measured (target holdout)",
            "measured (base holdout)",
            "boxes (target)",
            "boxes (base)",
            "f1",
            "gain",
            "chance",
            "classes (target)",
            "classes (base)",
            "forgetting",
            "latency",
        },
        "not evaluated",
    ),
    "a model that does not load": (
        replace(CANDIDATE, failures=("release digits@1.1: model.onnx cannot be loaded",)),
        CURRENT,
        HOLDOUT,
        {"measurable"},
        "could not be measured: release digits@1.1: model.onnx cannot be loaded",
    ),
    "a current release that does not load any more": (
        CANDIDATE,
        replace(CURRENT, failures=("model.onnx is missing",)),
        HOLDOUT,
        {"measurable"},
        "the current release could not be measured: model.onnx is missing",
    ),
    "nearly training data in the holdout": (
        CANDIDATE,
        CURRENT,
        replace(HOLDOUT, near_duplicates=frozenset({"t3", "s1"})),
        {"near_duplicates"},
        "nearly ones trained on (at most): 1, bound 0",
    ),
    "a holdout in which nobody looked for training data": (
        CANDIDATE,
        CURRENT,
        replace(HOLDOUT, near_duplicates=None),
        {"near_duplicates"},
        "nearly ones trained on (at most): not measured",
    ),
    "a base holdout without boxes": (
        replace(CANDIDATE, base=EMPTY),
        replace(CURRENT, base=EMPTY),
        HOLDOUT,
        {"boxes (base)", "finite (base)", "forgetting", "classes (base)"},
        "F1 lost on the base holdout (at most): not measured",
    ),
    "an export that differs": (
        replace(CANDIDATE, parity=(Parity("logits", 0.01, 0.05, True), Parity("boxes", 3.0, 1.0, False))),
        CURRENT,
        HOLDOUT,
        {"parity (boxes)"},
        "what it was made of, boxes: 3, tolerance 1",
    ),
    "an export that answers NaN": (
        replace(CANDIDATE, parity=(Parity("logits", math.nan, 0.05, True),)),
        CURRENT,
        HOLDOUT,
        {"parity (logits)"},
        "logits: nan",
    ),
    "an export compared with nothing": (
        replace(CANDIDATE, parity=()),
        CURRENT,
        HOLDOUT,
        {"parity"},
        "compared with nothing",
    ),
    "another kind of release": (
        replace(CANDIDATE, target=replace(TARGET, kind="segment")),
        CURRENT,
        HOLDOUT,
        {"gain", "chance", "classes (target)"},
        "the two releases are of kinds segment and detect",
    ),
    "another truth than the current release's": (
        replace(CANDIDATE, target=replace(TARGET, counts=[(3, 0, 1), *TARGET.counts[1:]])),
        CURRENT,
        HOLDOUT,
        {"gain", "chance", "classes (target)"},
        "not scored on the same images and boxes",
    ),
    "counts of classes that do not add up": (
        replace(CANDIDATE, target=replace(TARGET, class_rows=TARGET.class_rows[1:])),
        CURRENT,
        HOLDOUT,
        {"classes (target)"},
        "do not add up",
    ),
    "no calibration": (
        replace(CANDIDATE, calibration_method="uncalibrated", calibration_ece=None),
        CURRENT,
        HOLDOUT,
        {"calibrated", "calibration"},
        "calibration is 'uncalibrated'",
    ),
    "an overconfident calibration": (
        replace(CANDIDATE, calibration_ece=0.3),
        CURRENT,
        HOLDOUT,
        {"calibration"},
        "0.3, bound",
    ),
    "far slower": (
        replace(CANDIDATE, target=replace(TARGET, latency_ms_median=9.0)),
        CURRENT,
        HOLDOUT,
        {"latency"},
        "2.25, bound 2",
    ),
    "other classes": (
        replace(CANDIDATE, base=replace(BASE, labels=["a", "b", "c"])),
        CURRENT,
        HOLDOUT,
        {"classes (base)"},
        "not comparable",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_planted_failure_is_caught_by_name(name: str) -> None:
    candidate, current, holdout, failing, words = FAILURES[name]
    result = verdict(candidate, current, holdout)
    assert not result.passed
    assert {check.name for check in result.checks if not check.passed} == failing
    assert any(words in reason for reason in result.reasons), result.reasons
    json.dumps(result.to_dict(), allow_nan=False)


def failed(result: Verdict) -> set[str]:
    return {check.name for check in result.checks if not check.passed}


def test_too_few_boxes_prove_nothing() -> None:
    result = verdict(rules=replace(RULES, boxes_min=IMAGES * 3 + 1))
    assert failed(result) == {"boxes (target)", "boxes (base)"}
    assert "boxes in the target holdout (at least): 360, bound 361" in " ".join(result.reasons)


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ({"gain_confidence": 1.0}, "gain_confidence = 1.0: use a number from 0.5"),
        ({"f1_min": 50}, "f1_min = 50: use a number from 0 to 1"),
        ({"forget_max": math.nan}, "forget_max = nan"),
        ({"images_min": 0}, "images_min = 0: use a number from 1 on"),
        ({"bootstrap_draws": 1}, "bootstrap_draws = 1: use a number from 100 on"),
        ({"latency_ratio_max": math.inf}, "latency_ratio_max = inf"),
    ],
)
def test_a_bound_that_bounds_nothing_is_refused(bound: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rules(**bound)


def test_an_empty_verdict_does_not_pass() -> None:
    assert not Verdict().passed


@pytest.mark.parametrize(
    "change", [lambda e: e, lambda e: replace(e, map50=math.nan, per_class_ap50=[math.nan, 1.0, 0.5])]
)
def test_an_evaluation_survives_json(change: Callable[[Evaluation], Evaluation]) -> None:
    before = change(TARGET)
    text = json.dumps(before.to_dict(), allow_nan=False)
    after = Evaluation.from_dict(json.loads(text))
    assert repr(after) == repr(before)  # repr, because NaN is not equal to itself
    summary: dict[str, Any] = json.loads(json.dumps(before.summary(), allow_nan=False))
    assert summary["n_boxes"] == IMAGES * 3
    assert summary["class_f1"].keys() == set(LABELS)
