"""The gate: whether a candidate release may go out. Pure, and it fails closed: what was not measured did not pass.

Every check, its rule and why: docs/gate.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.core.checks import Check, Parity, Verdict, maximum, minimum, parity_checks
from trainer.core.evaluation import Evaluation
from trainer.core.paired import chance_of_gain, class_drops, gain_low
from trainer.core.targets import Footprint, Target, target_checks

__all__ = [
    "Check",
    "Evidence",
    "Footprint",
    "Holdout",
    "Parity",
    "Rules",
    "Target",
    "Verdict",
    "gain_interval",
    "judge",
]

NAMED_MAX = 8  # classes that one reason names


CALIBRATION_FIX = "100 labelled images or more that trained nothing; give more with models.NAME.calibration"


@dataclass(frozen=True, slots=True)
class Rules:
    """The bounds. F1 values and AP are in 0..1; drops are absolute. Raises ValueError for a bound that bounds nothing."""

    images_min: int = 50
    boxes_min: int = 100
    near_duplicates_max: int = 0
    f1_min: float = 0.5  # on the target holdout, whatever there was before
    gain_confidence: float = 0.95  # of the one-sided interval of the gain, and against a gain by chance
    bootstrap_draws: int = 2000
    class_boxes_min: int = 5  # a class with fewer boxes in the holdout is too rare to judge alone
    class_drop_max: float = 0.1
    class_confidence: float = 0.95  # how sure it must be that a class lost anything at all
    forget_max: float = 0.03
    export_drop_max: float = 0.02
    ece_max: float = 0.1
    latency_ratio_max: float = 2.0

    def __post_init__(self) -> None:
        for name in ("gain_confidence", "class_confidence"):
            if not 0.5 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: use a number from 0.5 to below 1")
        for name in ("f1_min", "class_drop_max", "forget_max", "export_drop_max", "ece_max"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: use a number from 0 to 1")
        least = {"images_min": 1, "boxes_min": 1, "class_boxes_min": 1, "bootstrap_draws": 100, "near_duplicates_max": 0,
                 "latency_ratio_max": 0}  # fmt: skip
        for name, bound in least.items():
            if not bound <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: use a number from {bound} on")


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that was measured of one release. `target` is the holdout of the work as it is now (shifted and clean),
    `base` the one of the clean beginnings. None means: not measured."""

    model_sha256: str  # of the file that ships
    weights_sha256: str  # of the weights it was exported from; "": not known
    target: Evaluation | None
    base: Evaluation | None
    calibration_method: str = "uncalibrated"
    calibration_ece: float | None = None
    export_before: float | None = None  # `Evaluation.quality` of the file before quantisation
    export_after: float | None = None  # and of the file that ships, on the same images
    failures: tuple[str, ...] = ()  # why something could not be measured: the model does not load, answers NaN
    parity: Sequence[Parity] = ()  # none: the export was compared with nothing, which is refused
    model_bytes: int | None = None  # of the file that ships
    footprints: tuple[Footprint, ...] = ()  # one for each target


@dataclass(frozen=True, slots=True)
class Holdout:
    """Identities (sha256 of the pixels) of the frozen holdouts' images, and of everything that was trained on.

    `near_duplicates`: of the holdouts' images those that show nearly what an image of the training shows. None: nobody
    looked."""

    target: frozenset[str]
    base: frozenset[str]
    training: frozenset[str]
    near_duplicates: frozenset[str] | None = None


def judge(
    candidate: Evidence,
    current: Evidence | None,
    holdout: Holdout,
    rules: Rules,
    rng: np.random.Generator,
    targets: Sequence[Target] = (),
) -> Verdict:
    """Judge the bytes that would ship against the release that runs now (None: there is none yet).

    `rng` drives the draws of `core.paired`; `targets` are the profiles of the devices that it is for.
    """
    checks = [
        *_failure_checks("", candidate),
        *_holdout_checks(holdout, rules),
        _measured_check("target holdout", candidate.target, holdout.target),
        _measured_check("base holdout", candidate.base, holdout.base),
        *_finite_checks(candidate),
        _boxes_check("target", candidate.target, rules),
        _boxes_check("base", candidate.base, rules),
        minimum("f1", _f1(candidate.target), rules.f1_min, f"{_figure(candidate.target)} on the target holdout"),
        _export_check(candidate, rules),
        *parity_checks(candidate.parity),
        *_calibration_checks(candidate, rules),
    ]
    if current is not None:
        checks += [
            *_failure_checks("the current release ", current),
            _differs("new_bytes", "model file", candidate.model_sha256, current.model_sha256),
            _differs("new_weights", "weights", candidate.weights_sha256, current.weights_sha256),
            _measured_check("target holdout, current release", current.target, holdout.target),
            _measured_check("base holdout, current release", current.base, holdout.base),
            *_gain_checks(candidate.target, current.target, rules, rng),
            *_class_checks("target", candidate.target, current.target, rules, rng),
            *_class_checks("base", candidate.base, current.base, rules, rng),
            _forget_check(candidate, current, rules),
            _latency_check(candidate, current, rules),
        ]
    before = None if current is None else current.footprints
    checks += target_checks(targets, candidate.model_bytes, candidate.footprints, before, rules.latency_ratio_max)
    return Verdict(tuple(checks))


def gain_interval(
    candidate: NDArray[np.int64], current: NDArray[np.int64], rules: Rules, rng: np.random.Generator
) -> tuple[float, float]:
    """Gain in F1 of per-image counts (n, 3) over the same images, and the lower end of its one-sided interval."""
    return gain_low(candidate, current, rules.bootstrap_draws, rules.gain_confidence, rng)


def _f1(evaluation: Evaluation | None) -> float | None:
    """F1, or nothing where nothing was to be found: that would be a perfect score."""
    return evaluation.f1 if evaluation is not None and evaluation.n_boxes > 0 else None


def _figure(evaluation: Evaluation | None) -> str:
    return evaluation.figure if evaluation is not None else "F1"


def _failure_checks(whose: str, evidence: Evidence) -> list[Check]:
    return [Check("measurable", False, None, None, f"{whose}could not be measured: {why}") for why in evidence.failures]


def _holdout_checks(holdout: Holdout, rules: Rules) -> list[Check]:
    frozen = holdout.target | holdout.base
    shared = len(frozen & holdout.training)
    checks = [
        minimum("holdout_images", len(holdout.target), rules.images_min, "images in the target holdout"),
        minimum("base_images", len(holdout.base), rules.images_min, "images in the base holdout"),
        maximum("disjoint", shared, 0, "images of the holdout that were trained on"),
        minimum("training_known", len(holdout.training), 1, "images known to have been trained on"),
    ]
    near = None if holdout.near_duplicates is None else len(frozen & holdout.near_duplicates)
    text = "images of the holdout that are nearly ones trained on"
    return [*checks, maximum("near_duplicates", near, rules.near_duplicates_max, text)]


def _measured_check(what: str, evaluation: Evaluation | None, images: frozenset[str]) -> Check:
    """Every image of the holdout was scored, and nothing else."""
    name = f"measured ({what})"
    if evaluation is None or not images:
        return Check(name, False, None, len(images), f"{what}: not evaluated, or the holdout is empty")
    scored = set(evaluation.images)
    odd = len(scored ^ images)
    whole = len(evaluation.images) == len(evaluation.counts) == len(scored)
    text = (
        f"{what}: {odd} images differ between the frozen holdout and what was scored, {len(evaluation.counts)} results"
    )
    return Check(name, odd == 0 and whole, odd, 0, text)


def _finite_checks(candidate: Evidence) -> list[Check]:
    checks = []
    for what, evaluation in (("target", candidate.target), ("base", candidate.base)):
        if evaluation is None:
            continue  # its "measured" check has failed already
        bad = [name for name, value in evaluation.metrics.items() if not 0 <= value <= 1]
        text = f"{what} holdout: {', '.join(bad) or 'no metric'} not a number in 0..1"
        checks.append(Check(f"finite ({what})", not bad, ", ".join(bad) or None, "0..1", text))
    return checks


def _boxes_check(what: str, evaluation: Evaluation | None, rules: Rules) -> Check:
    count = None if evaluation is None else evaluation.n_boxes
    return minimum(f"boxes ({what})", count, rules.boxes_min, f"labelled boxes in the {what} holdout")


def _export_check(candidate: Evidence, rules: Rules) -> Check:
    before, after = candidate.export_before, candidate.export_after
    drop = None if before is None or after is None else before - after
    what = "accuracy" if candidate.target is not None and not candidate.target.has_ap else "mAP50"
    return maximum("export", drop, rules.export_drop_max, f"{what} lost between the exported and the quantised file")


def _calibration_checks(candidate: Evidence, rules: Rules) -> list[Check]:
    method = candidate.calibration_method
    fitted = Check(
        "calibrated",
        method != "uncalibrated",
        method,
        "fitted",
        f"calibration is {method!r}, it must be fitted on data: {CALIBRATION_FIX}",
    )
    error = "expected calibration error"
    if candidate.calibration_ece is None:
        error += f" ({CALIBRATION_FIX})"
    return [fitted, maximum("calibration", candidate.calibration_ece, rules.ece_max, error)]


def _differs(name: str, what: str, candidate: str, current: str) -> Check:
    """A candidate that is the current release again is none, however well it scored: quantising and calibrating anew
    moves the figures a little, and chance may move them up."""
    known = bool(candidate) and bool(current)
    text = f"{what} {candidate[:12]!r} against the current {current[:12]!r}: must be known and differ"
    return Check(name, known and candidate != current, candidate, current, text)


def _apart(candidate: Evaluation, current: Evaluation) -> str:
    """Why two evaluations cannot be compared image by image; empty when they can."""
    if candidate.kind != current.kind:
        return f"the two releases are of kinds {candidate.kind} and {current.kind}"
    truths = [[tp + fn for tp, _, fn in each.counts] for each in (candidate, current)]
    if candidate.images != current.images or truths[0] != truths[1] or not truths[0]:
        return "the two releases were not scored on the same images and boxes"
    return ""


def _gain_checks(
    candidate: Evaluation | None, current: Evaluation | None, rules: Rules, rng: np.random.Generator
) -> list[Check]:
    what = f"gain of {_figure(candidate)} on the target holdout"
    text, by_chance = f"no better than the current release: {what}", f"chance of such a {what} without being better"
    reason = "not measured" if candidate is None or current is None else _apart(candidate, current)
    if candidate is None or current is None or reason:
        return [
            Check("gain", False, None, 0.0, f"{text}: {reason}"),
            Check("chance", False, None, 1 - rules.gain_confidence, f"{by_chance}: {reason}"),
        ]
    new, old = (np.array(each.counts, dtype=np.int64) for each in (candidate, current))
    gain, low = gain_interval(new, old, rules, rng)
    sure = f"{rules.gain_confidence:.0%} sure of more than {low:+.4f}, must be above 0"
    by_swapping = chance_of_gain(new, old, rules.bootstrap_draws, rng)
    return [
        Check("gain", low > 0, low, 0.0, f"{what if low > 0 else text} {gain:+.4f}, {sure}"),
        maximum("chance", by_swapping, 1 - rules.gain_confidence, by_chance),
    ]


def _class_checks(
    what: str, candidate: Evaluation | None, current: Evaluation | None, rules: Rules, rng: np.random.Generator
) -> list[Check]:
    """Each class with enough boxes: refused when it lost more than the bound, and surely lost something.

    The bare loss of a small class is noise: one box of ten is 0.1. The interval over the images tells; a class that lost
    everything has one without width.
    """
    reason = "not measured"
    if candidate is not None and current is not None:
        same = candidate.labels == current.labels
        reason = _apart(candidate, current) if same else "they have other classes"
    if candidate is None or current is None or reason:
        text = f"{what} holdout: the two releases' classes are not comparable: {reason}"
        return [Check(f"classes ({what})", False, None, None, text)]
    try:
        new, old = candidate.by_class(), current.by_class()
    except (ValueError, IndexError) as error:
        text = f"{what} holdout: the two releases' classes are not comparable: {error}"
        return [Check(f"classes ({what})", False, None, None, text)]
    boxes = (new[..., 0] + new[..., 2]).sum(axis=0)
    if not np.array_equal(new[..., 0] + new[..., 2], old[..., 0] + old[..., 2]):
        text = f"{what} holdout: the two releases' classes are not comparable: they were scored on other boxes"
        return [Check(f"classes ({what})", False, None, None, text)]
    judged = [number for number, count in enumerate(boxes) if count >= rules.class_boxes_min]
    checks = [_judged_check(what, candidate.labels, boxes.tolist(), judged, rules)]
    drops = class_drops(new[:, judged], old[:, judged], rules.bootstrap_draws, rules.class_confidence, rng)
    for number, (drop, low, high) in zip(judged, drops, strict=True):
        label = candidate.labels[number]
        text = f"{candidate.figure} lost on class {label!r} of the {what} holdout ({boxes[number]} boxes)"
        # Not finite: nothing is known of it, so nothing excuses the loss.
        sure = not low <= 0
        told = f"{text} (at most): {drop:.4g}, bound {rules.class_drop_max:g}, surely between {low:.3f} and {high:.3f}"
        checks.append(Check(f"class {label} ({what})", drop <= rules.class_drop_max or not sure, drop,
                            rules.class_drop_max, told))  # fmt: skip
    return checks


def _judged_check(what: str, labels: list[str], boxes: list[int], judged: list[int], rules: Rules) -> Check:
    """What no check speaks of is at least named."""
    rare = [f"{label!r} ({count})" for label, count in zip(labels, boxes, strict=True) if count < rules.class_boxes_min]
    text = f"{len(judged)} of {len(labels)} classes have {rules.class_boxes_min} boxes or more in the {what} holdout"
    if rare:
        more = f" and {len(rare) - NAMED_MAX} more" if len(rare) > NAMED_MAX else ""
        text += f"; too rare to judge: {', '.join(rare[:NAMED_MAX])}{more}"
    return Check(f"classes ({what})", bool(judged), len(judged), 1, text)


def _forget_check(candidate: Evidence, current: Evidence, rules: Rules) -> Check:
    new, old = _f1(candidate.base), _f1(current.base)
    drop = None if new is None or old is None else old - new
    return maximum("forgetting", drop, rules.forget_max, f"{_figure(candidate.base)} lost on the base holdout")


def _latency_check(candidate: Evidence, current: Evidence, rules: Rules) -> Check:
    ratio = None
    if candidate.target is not None and current.target is not None and current.target.latency_ms_median > 0:
        ratio = candidate.target.latency_ms_median / current.target.latency_ms_median
    return maximum("latency", ratio, rules.latency_ratio_max, "median latency over the current release's")
