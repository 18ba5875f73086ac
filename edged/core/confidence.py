"""One calibrated probability that an answer is right, from what the model itself gave away.

A frame is RIGHT when its answer matches the truth one to one (`core.matching.frame_right`). The evidence is a handful
of named features of the detections and the distance of the input from those that the calibration was fitted on.
Laws: the probability is in 0..1; it never falls when every answered score rises; NaN in the evidence makes it 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edged.core.matching import iou_matrix
from edged.engines.base import Detections, ImageStats
from edged.wire.manifest import Calibration, Novelty, RiskTable, Scaling, Thresholds

# Feature -> the sign that its weight may have (+1: more is better evidence, -1: worse, 0: the data decides). The signs
# make the probability monotone in the answered scores and keep a fit on few items from learning nonsense.
SIGNS: dict[str, int] = {
    "min_logit": 1,  # logit of the lowest answered score; 0 without any
    "mean_logit": 1,  # mean logit of the answered scores; 0 without any
    "log_product": 1,  # sum of ln(score) of the answered boxes
    "kept": 0,  # ln(1 + number of answered boxes)
    "empty": 0,  # 1 when nothing was answered
    "missed_logit": -1,  # logit of the strongest weak candidate where nothing was answered
    "missed_count": -1,  # ln(1 + number of weak candidates where nothing was answered)
    "rival_logit": -1,  # logit of the strongest weak candidate of another class on an answered box
    "overlap": -1,  # largest IoU between two answered boxes
    "novelty": -1,  # Mahalanobis distance of the input from the calibration's inputs
}
FEATURES = tuple(SIGNS)

STATS = 5  # numbers in `stats_vector`
LEVEL_MIN = 0.004  # one grey level: below it a logarithm would only amplify rounding
SAME_PLACE_IOU = 0.5  # a weak candidate that overlaps an answered box this much speaks about that box
SCORE_MARGIN = 0.01  # scores are clipped to margin..1-margin before the logit
LENIENCE = 2.0  # an accepted answer may be wrong with at most this many times the target risk
ROUNDING = 1e-9  # 1 - 2 * 0.15 is not quite 0.7
NOTHING = 2.0  # a threshold that no probability reaches
NOVELTY_MAX = 1e6  # a distance is never infinite, so that it can be stored and sent
_LOGIT_NONE = math.log(SCORE_MARGIN / (1 - SCORE_MARGIN))  # "no weak candidate at all" in logits


@dataclass(frozen=True, slots=True)
class Confidence:
    """`p`: probability that the answer is right; `novelty`: distance of the input; `novel`: beyond what was calibrated;
    `calibrated`: whether `p` was fitted on data or is only a heuristic."""

    p: float
    novelty: float
    novel: bool
    calibrated: bool


def stats_vector(stats: ImageStats) -> NDArray[np.float64]:
    """(5,): the logarithms of brightness, contrast, sharpness and the lightest level, and the darkest level.

    The space in which novelty is measured. Light multiplies, so its changes are differences of logarithms; the extremes
    tell bad light from dark scenes, which the mean alone cannot.
    """
    values = (stats.brightness, stats.contrast, stats.sharpness, stats.high)
    return np.array([*(math.log(max(value, 0.0) + LEVEL_MIN) for value in values), stats.low])


def novelty(stats: ImageStats, calibration: Calibration) -> float:
    """Mahalanobis distance of an input from the nearest centre of the calibration's reference.

    0 without a reference, NOVELTY_MAX for NaN.
    """
    if calibration.novelty is None:
        return 0.0
    away = stats_vector(stats) - np.asarray(calibration.novelty.centres)
    squared = float(((away @ np.asarray(calibration.novelty.inverse_covariance)) * away).sum(axis=1).min())
    return min(math.sqrt(max(squared, 0.0)), NOVELTY_MAX) if math.isfinite(squared) else NOVELTY_MAX


def features(
    detections: Detections, thresholds: Thresholds, stats: ImageStats, calibration: Calibration
) -> dict[str, float]:
    """The evidence of one frame by name, in the order of FEATURES."""
    answered = detections.scores >= thresholds.score
    scores = np.clip(detections.scores[answered].astype(np.float64), SCORE_MARGIN, 1 - SCORE_MARGIN)
    boxes, classes = detections.boxes[answered], detections.classes[answered]
    weak_scores = detections.scores[~answered].astype(np.float64)
    weak_classes = detections.classes[~answered]

    there = iou_matrix(detections.boxes[~answered], boxes) >= SAME_PLACE_IOU
    missed = weak_scores[~there.any(axis=1)]
    rivals = weak_scores[(there & (weak_classes[:, None] != classes[None])).any(axis=1)]
    pairs = iou_matrix(boxes, boxes)
    np.fill_diagonal(pairs, 0.0)
    logits = np.log(scores / (1 - scores))
    return {
        "min_logit": float(logits.min(initial=math.inf)) if len(scores) else 0.0,
        "mean_logit": float(logits.mean()) if len(scores) else 0.0,
        "log_product": float(np.log(scores).sum()),
        "kept": math.log1p(len(scores)),
        "empty": float(len(scores) == 0),
        "missed_logit": _strongest_logit(missed),
        "missed_count": math.log1p(len(missed)),
        "rival_logit": _strongest_logit(rivals),
        "overlap": float(pairs.max(initial=0.0)),
        "novelty": novelty(stats, calibration),
    }


def _strongest_logit(scores: NDArray[np.float64]) -> float:
    return logit(float(scores.max())) if len(scores) else _LOGIT_NONE


def probability(
    detections: Detections, thresholds: Thresholds, stats: ImageStats, calibration: Calibration
) -> Confidence:
    """How probably the answer on this frame is right.

    Where the input is farther from the calibration's inputs than its limit, the probability shrinks by limit/distance:
    continuous at the limit, and no number of sure boxes buys it back.
    """
    calibrated = calibration.method != "uncalibrated"
    seen = (stats.brightness, stats.contrast, stats.sharpness, stats.low, stats.high)
    numbers = (*seen, *detections.scores, *detections.boxes.ravel())
    if not np.isfinite(numbers).all():
        return Confidence(0.0, NOVELTY_MAX, True, calibrated)
    evidence = features(detections, thresholds, stats, calibration)
    p = _logistic(evidence, calibration) if calibrated else _heuristic(evidence)
    distance = evidence["novelty"]
    novel = calibration.novelty is not None and distance > calibration.novelty.limit
    if novel and calibration.novelty is not None:
        p *= calibration.novelty.limit / distance
    return Confidence(p if math.isfinite(p) else 0.0, distance, novel, calibrated)


def _logistic(evidence: dict[str, float], calibration: Calibration) -> float:
    rows = zip(calibration.features, calibration.mean, calibration.scale, calibration.weights, strict=True)
    return sigmoid(calibration.bias + sum(w * (evidence[name] - mean) / scale for name, mean, scale, w in rows))


def _heuristic(evidence: dict[str, float]) -> float:
    """Without a fit: the weakest answered score, times how surely the strongest missed candidate is nothing."""
    answered = 1.0 if evidence["empty"] else sigmoid(evidence["min_logit"])
    return answered * (1 - sigmoid(evidence["missed_logit"]))


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)) without overflow; 0 for NaN, because no evidence is no confidence."""
    if math.isnan(value):
        return 0.0
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def answer_probability(mean_logprob: float, calibration: Calibration) -> Confidence:
    """How probably a generated answer is right, from the mean log-probability of its tokens; 0 for NaN.

    Without a fit it is the geometric mean of the tokens' probabilities, and says `calibrated=False`. Text has no novelty.
    """
    calibrated = calibration.method == "scaled"
    if math.isnan(mean_logprob):
        return Confidence(0.0, 0.0, False, calibrated)
    mean = math.exp(min(mean_logprob, 0.0))
    p = _scaled(mean, calibration.answers) if calibrated and calibration.answers is not None else mean
    return Confidence(p, 0.0, False, calibrated)


def box_probabilities(detections: Detections, calibration: Calibration) -> NDArray[np.float64]:
    """How probably each box is right, (n,) in 0..1 in the order of the detections; 0 for NaN.

    Without a fit it is the box's own score.
    """
    scalings = calibration.boxes
    out = np.empty(len(detections))
    for row, (score, label) in enumerate(zip(detections.scores.tolist(), detections.classes.tolist(), strict=True)):
        if not (math.isfinite(score) and np.isfinite(detections.boxes[row]).all()):
            out[row] = 0.0
        elif scalings is None:
            out[row] = min(max(score, 0.0), 1.0)
        else:
            out[row] = _scaled(score, scalings.classes.get(label, scalings.pooled))
    return out


def _scaled(score: float, scaling: Scaling) -> float:
    return sigmoid(logit(score) / scaling.temperature + scaling.bias)


def logit(score: float) -> float:
    """ln(score / (1 - score)) of a score clipped to SCORE_MARGIN..1 - SCORE_MARGIN."""
    clipped = min(max(score, SCORE_MARGIN), 1 - SCORE_MARGIN)
    return math.log(clipped / (1 - clipped))


def accept_threshold(calibration: Calibration, target_risk: float) -> float:
    """The smallest probability from which on answers may be accepted so that at most `target_risk` of them are wrong.

    From the release's risk table: the smallest threshold whose bound is no more than the target, NOTHING where none is.
    The bound speaks about all accepted answers together, and about inputs like those that were counted. When doubtful
    inputs become more frequent, p can hold and the average not: so no single answer that is more than LENIENCE times as
    likely wrong as the target is accepted either.

    Without a table it is Chow's rule (C. K. Chow, "On optimum recognition error and reject tradeoff", 1970): each answer
    must be right with a probability of at least 1 - target_risk. Never rises with `target_risk`.
    """
    if calibration.method == "uncalibrated" or math.isnan(target_risk):
        return NOTHING
    if calibration.risk is None:
        return 1.0 - target_risk
    least = 1.0 - LENIENCE * target_risk - ROUNDING
    rows = zip(calibration.risk.thresholds, calibration.risk.bounds, strict=True)
    return next((threshold for threshold, bound in rows if bound <= target_risk and threshold >= least), NOTHING)


def check_calibration(calibration: Calibration) -> None:
    """Refuse a calibration that this device cannot apply; raises ValueError naming what does not fit."""
    unknown = [name for name in calibration.features if name not in SIGNS]
    if unknown:
        raise ValueError(f"calibration uses unknown features {unknown}; this version knows {', '.join(FEATURES)}")
    lengths = {len(calibration.features), len(calibration.mean), len(calibration.scale), len(calibration.weights)}
    if len(lengths) != 1:
        raise ValueError(
            f"calibration lists have different lengths {sorted(lengths)}; features, mean, scale and weights"
        )
    if calibration.method == "logistic" and not calibration.features:
        raise ValueError("calibration is logistic without any feature; fit it again")
    if calibration.method == "scaled" and calibration.answers is None:
        raise ValueError("calibration is scaled, but says nothing about answers; fit it again")
    numbers = [*calibration.mean, *calibration.scale, *calibration.weights, calibration.bias]
    if calibration.novelty is not None:
        numbers += _checked_reference(calibration.novelty)
    scalings = [calibration.answers] if calibration.answers is not None else []
    if calibration.boxes is not None:
        scalings += [calibration.boxes.pooled, *calibration.boxes.classes.values()]
    numbers += [value for scaling in scalings for value in (scaling.temperature, scaling.bias)]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("calibration holds NaN or infinity; fit it again")
    if any(scale <= 0 for scale in calibration.scale):
        raise ValueError(f"calibration's scale {calibration.scale} must be positive; fit it again")
    if any(scaling.temperature <= 0 for scaling in scalings):
        raise ValueError("calibration's temperatures must be positive: surer scores would lower the probability")
    wrong = [
        name for name, weight in zip(calibration.features, calibration.weights, strict=True) if SIGNS[name] * weight < 0
    ]
    if wrong:
        raise ValueError(
            f"calibration's weights of {wrong} have the wrong sign: surer boxes would lower the probability"
        )
    if calibration.risk is not None:
        _check_risk(calibration.risk)


def _checked_reference(reference: Novelty) -> list[float]:
    """The reference's numbers; raises ValueError where its shape is not that of `stats_vector`."""
    rows = [*reference.centres, *reference.inverse_covariance]
    if {len(row) for row in rows} != {STATS} or len(reference.inverse_covariance) != STATS:
        sizes = [len(row) for row in rows]
        raise ValueError(
            f"calibration's novelty reference has rows of {sizes}; expected centres of {STATS} "
            f"and a {STATS} x {STATS} matrix"
        )
    return [*(value for row in rows for value in row), reference.limit]


def _check_risk(table: RiskTable) -> None:
    """Raises ValueError where a threshold or bound of the table is no probability, or the thresholds do not rise."""
    if len(table.thresholds) != len(table.bounds):
        raise ValueError(
            f"calibration's risk table has {len(table.thresholds)} thresholds and {len(table.bounds)} bounds; "
            "one bound belongs to each threshold"
        )
    if not all(0.0 <= value <= 1.0 for value in (*table.thresholds, *table.bounds)):  # written so that NaN fails
        raise ValueError("calibration's risk table holds values outside 0..1; fit it again")
    if any(later <= former for former, later in pairwise(table.thresholds)):
        raise ValueError(f"calibration's risk thresholds {table.thresholds} do not rise; fit it again")
