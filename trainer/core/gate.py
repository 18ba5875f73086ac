"""The gate: whether a candidate release may go out. Pure, and it fails closed: what was not measured did not pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.core.evaluation import Evaluation


@dataclass(frozen=True, slots=True)
class Rules:
    """The bounds. F1 values and AP are in 0..1; drops are absolute."""

    images_min: int = 50
    boxes_min: int = 100
    f1_min: float = 0.5  # on the target holdout, whatever there was before
    gain_confidence: float = 0.95  # of the one-sided bootstrap interval of the gain
    bootstrap_draws: int = 2000
    class_boxes_min: int = 10  # a class with fewer boxes in the holdout is too rare to judge alone
    class_drop_max: float = 0.1
    forget_max: float = 0.03
    export_drop_max: float = 0.02
    ece_max: float = 0.1
    latency_ratio_max: float = 2.0


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
    export_before: float | None = None  # mAP50 of the file before quantisation
    export_after: float | None = None  # mAP50 of the file that ships, on the same images


@dataclass(frozen=True, slots=True)
class Holdout:
    """Identities (sha256 of the pixels) of the frozen holdouts' images, and of everything that was trained on."""

    target: frozenset[str]
    base: frozenset[str]
    training: frozenset[str]


@dataclass(frozen=True, slots=True)
class Check:
    """One named judgement; `reason` says what was found and what was allowed."""

    name: str
    passed: bool
    value: float | str | None
    bound: float | str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Passed only when every check passed, and there was at least one."""

    checks: tuple[Check, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether the release may go out."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """Why not: the reason of each failed check."""
        return [check.reason for check in self.checks if not check.passed]

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON-able values."""
        return {"passed": self.passed, "reasons": self.reasons, "checks": [asdict(check) for check in self.checks]}


def judge(
    candidate: Evidence, current: Evidence | None, holdout: Holdout, rules: Rules, rng: np.random.Generator
) -> Verdict:
    """Judge the bytes that would ship against the release that runs now (None: there is none yet).

    `rng` drives the paired bootstrap over images (Efron & Tibshirani 1993, chapter 13).
    """
    checks = [
        *_holdout_checks(holdout, rules),
        _measured_check("target holdout", candidate.target, holdout.target),
        _measured_check("base holdout", candidate.base, holdout.base),
        *_finite_checks(candidate),
        _minimum("f1", candidate.target.f1 if candidate.target else None, rules.f1_min, "F1 on the target holdout"),
        _export_check(candidate, rules),
        *_calibration_checks(candidate, rules),
    ]
    if current is not None:
        checks += [
            _differs("new_bytes", "model file", candidate.model_sha256, current.model_sha256),
            _differs("new_weights", "weights", candidate.weights_sha256, current.weights_sha256),
            _measured_check("target holdout, current release", current.target, holdout.target),
            _measured_check("base holdout, current release", current.base, holdout.base),
            _gain_check(candidate, current, rules, rng),
            *_class_checks("target", candidate.target, current.target, rules),
            *_class_checks("base", candidate.base, current.base, rules),
            _forget_check(candidate, current, rules),
            _latency_check(candidate, current, rules),
        ]
    return Verdict(tuple(checks))


def gain_interval(
    candidate: NDArray[np.int64], current: NDArray[np.int64], rules: Rules, rng: np.random.Generator
) -> tuple[float, float]:
    """Gain in F1 of per-image counts (n, 3) over the same images, and the lower end of its one-sided interval."""

    def f1_of(counts: NDArray[Any]) -> NDArray[np.float64]:
        total = 2 * counts[..., 0] + counts[..., 1] + counts[..., 2]
        share = np.divide(2.0 * counts[..., 0], total, out=np.ones(np.shape(total)), where=total > 0)
        return np.asarray(share, dtype=np.float64)

    n = len(candidate)
    gain = float(f1_of(candidate.sum(axis=0)) - f1_of(current.sum(axis=0)))
    gains = []
    for _ in range(rules.bootstrap_draws):
        drawn = rng.multinomial(n, np.full(n, 1 / n))
        gains.append(float(f1_of(drawn @ candidate) - f1_of(drawn @ current)))
    return gain, float(np.quantile(gains, 1 - rules.gain_confidence))


def _check(name: str, value: float | None, bound: float, ok: Callable[[float], bool], text: str) -> Check:
    """A check of a number: what is missing or not finite fails, whatever the comparison says."""
    if value is None or not math.isfinite(value):
        return Check(name, False, None, bound, f"{text}: not measured ({value}), bound {bound:g}")
    return Check(name, bool(ok(value)), value, bound, f"{text}: {value:.4g}, bound {bound:g}")


def _minimum(name: str, value: float | None, bound: float, text: str) -> Check:
    return _check(name, value, bound, lambda v: v >= bound, f"{text} (at least)")


def _maximum(name: str, value: float | None, bound: float, text: str) -> Check:
    return _check(name, value, bound, lambda v: v <= bound, f"{text} (at most)")


def _holdout_checks(holdout: Holdout, rules: Rules) -> list[Check]:
    frozen = holdout.target | holdout.base
    shared = len(frozen & holdout.training)
    return [
        _minimum("holdout_images", len(holdout.target), rules.images_min, "images in the target holdout"),
        _minimum("base_images", len(holdout.base), rules.images_min, "images in the base holdout"),
        _maximum("disjoint", shared, 0, "images of the holdout that were trained on"),
        _minimum("training_known", len(holdout.training), 1, "images known to have been trained on"),
    ]


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
        values = {"mAP50": evaluation.map50, "mAP50-95": evaluation.map50_95, "F1": evaluation.f1}
        bad = [name for name, value in values.items() if not 0 <= value <= 1]
        text = f"{what} holdout: {', '.join(bad) or 'no metric'} not a number in 0..1"
        checks.append(Check(f"finite ({what})", not bad, ", ".join(bad) or None, "0..1", text))
    return checks


def _export_check(candidate: Evidence, rules: Rules) -> Check:
    before, after = candidate.export_before, candidate.export_after
    drop = None if before is None or after is None else before - after
    return _maximum("export", drop, rules.export_drop_max, "mAP50 lost between the exported and the quantised file")


def _calibration_checks(candidate: Evidence, rules: Rules) -> list[Check]:
    method = candidate.calibration_method
    fitted = Check(
        "calibrated",
        method != "uncalibrated",
        method,
        "fitted",
        f"calibration is {method!r}, it must be fitted on data",
    )
    return [fitted, _maximum("calibration", candidate.calibration_ece, rules.ece_max, "expected calibration error")]


def _differs(name: str, what: str, candidate: str, current: str) -> Check:
    """A candidate that is the current release again is none, however well it scored: quantising and calibrating anew
    moves the figures a little, and chance may move them up."""
    known = bool(candidate) and bool(current)
    text = f"{what} {candidate[:12]!r} against the current {current[:12]!r}: must be known and differ"
    return Check(name, known and candidate != current, candidate, current, text)


def _gain_check(candidate: Evidence, current: Evidence, rules: Rules, rng: np.random.Generator) -> Check:
    name, text = "gain", "no better than the current release: gain of F1 on the target holdout"
    if candidate.target is None or current.target is None or not candidate.target.counts:
        return Check(name, False, None, 0.0, f"{text}: not measured")
    if candidate.target.images != current.target.images or candidate.target.n_boxes != current.target.n_boxes:
        return Check(name, False, None, 0.0, f"{text}: the two releases were not scored on the same images and boxes")
    if candidate.target.n_boxes < rules.boxes_min:
        few = candidate.target.n_boxes
        return Check(
            name, False, few, rules.boxes_min, f"{text}: {few} boxes in the holdout, at least {rules.boxes_min}"
        )
    new, old = (np.array(each.counts, dtype=np.int64) for each in (candidate.target, current.target))
    gain, low = gain_interval(new, old, rules, rng)
    if low > 0:
        text = "gain of F1 on the target holdout"
    sure = f"{rules.gain_confidence:.0%} sure of more than {low:+.4f}, must be above 0"
    return Check(name, low > 0, low, 0.0, f"{text} {gain:+.4f}, {sure}")


def _class_checks(what: str, candidate: Evaluation | None, current: Evaluation | None, rules: Rules) -> list[Check]:
    if candidate is None or current is None or candidate.labels != current.labels:
        return [
            Check(
                f"classes ({what})", False, None, None, f"{what} holdout: the two releases' classes are not comparable"
            )
        ]
    checks = []
    for label, (tp, _, fn) in zip(candidate.labels, candidate.class_counts, strict=True):
        if tp + fn < rules.class_boxes_min:
            continue
        drop = current.class_f1[label] - candidate.class_f1[label]
        text = f"F1 lost on class {label!r} of the {what} holdout"
        checks.append(_maximum(f"class {label} ({what})", drop, rules.class_drop_max, text))
    return checks


def _forget_check(candidate: Evidence, current: Evidence, rules: Rules) -> Check:
    drop = None if candidate.base is None or current.base is None else current.base.f1 - candidate.base.f1
    return _maximum("forgetting", drop, rules.forget_max, "F1 lost on the base holdout")


def _latency_check(candidate: Evidence, current: Evidence, rules: Rules) -> Check:
    ratio = None
    if candidate.target is not None and current.target is not None and current.target.latency_ms_median > 0:
        ratio = candidate.target.latency_ms_median / current.target.latency_ms_median
    return _maximum("latency", ratio, rules.latency_ratio_max, "median latency over the current release's")
