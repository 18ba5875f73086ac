"""Fits a release's calibration: how evidence becomes the probability of being right, on data used for nothing else.

A fixed draw takes a third of the items aside. The others fit the probability and the novelty reference; this third only
counts what each threshold would have cost (`core.risk`), which is what makes those bounds hold. See docs/confidence.md.

The novelty reference also takes the inputs that the weights have learned: what was trained on is known, and a fleet's few
items that fall to the calibration alone would call most of a newly learned light new again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.optimize import minimize

from edged.core.confidence import (
    FEATURES,
    SIGNS,
    Confidence,
    answer_probability,
    features,
    novelty,
    probability,
    stats_vector,
)
from edged.engines.base import Detections, ImageStats
from edged.wire.manifest import BoxCalibration, Calibration, Novelty, Thresholds
from edged.wire.measured import confidence_histogram
from trainer.core.risk import risk_table
from trainer.scaling import fit_boxes, fit_scaling

ITEMS_MIN = 100  # fewer items cannot tell 90 % from 97 %
PENALTIES = (1.0, 3.0, 10.0, 30.0)  # L2, chosen by cross-validation
FOLDS = 5
PARTS = 3  # one counts, the others fit
# Of the distances seen: a higher quantile of a few hundred images is the distance of one odd image. The margin because
# the sample's tail is thin.
LIMIT_QUANTILE, LIMIT_MARGIN = 0.99, 1.1
# Scenes come in kinds: one centre for all would call the space between them known.
ITEMS_PER_CENTRE, CENTRES_MAX = 200, 8
# The weights are pulled towards these, not towards 0: with few wrong answers to learn from, a weak score is doubted.
PRIOR = {"min_logit": 0.5, "missed_logit": -0.5, "rival_logit": -0.25, "overlap": -0.25, "novelty": -0.25}
# A feature that hardly varied in the fit must not become infinitely telling in the field.
SCALE_MIN = 0.25
DEVIATION_MIN = np.array([0.05, 0.05, 0.05, 0.05, 0.02])  # of what `stats_vector` holds
NOT_ACCEPTED = -1.0  # the probability of a novel input, for counting: no threshold lets it pass


class Item(NamedTuple):
    """One image's answer with its weak candidates, its input, whether the whole answer was right, and which of its boxes
    were: `boxes_right` (n,) in the order of the detections."""

    detections: Detections
    stats: ImageStats
    right: bool
    boxes_right: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """How well the probabilities hold on items that did not fit them: each third judges the fit on the other two.

    `ece`: expected calibration error over 10 equally filled bins (Guo et al. 2017); `brier`: mean squared error of p.
    """

    items: int
    right: int
    ece: float
    brier: float
    mean_p: float

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return asdict(self)


def fit(items: Sequence[Item], answered: Thresholds, learned: Sequence[ImageStats] = ()) -> Calibration:
    """L2-regularised logistic regression with signed weights, the novelty reference, the boxes' scaling, the risk table.

    `learned`: statistics of the inputs that the weights were trained on; only the novelty reference takes them. Fewer
    than ITEMS_MIN items give an `uncalibrated` calibration. Items that are all right (or all wrong) are fine: the targets
    are smoothed (Platt 1999), so that no number of right answers makes a probability of 1.
    """
    if len(items) < ITEMS_MIN:
        return Calibration(items=len(items))
    counts = _parts(len(items)) == 0
    counting, fitting = _split(items, counts)
    model = _fit_frames(fitting, answered, learned)
    each = [probability(item.detections, answered, item.stats, model) for item in counting]
    update = {
        "items": len(items),
        "risk": risk_table(_accepting(each), np.array([item.right for item in counting], dtype=bool)),
        "confidence_histogram": confidence_histogram([confidence.p for confidence in each]),  # as devices count them
        "boxes": _boxes(items, answered),  # boxes have no bound to keep: all items may fit them
    }
    return model.model_copy(update=update)


def fit_answers(pairs: Sequence[tuple[float, bool]]) -> Calibration:
    """The calibration of a language model from its answers' mean log-probability per token and whether each was right.

    Fewer than ITEMS_MIN give an `uncalibrated` one. Raises ValueError for a log-probability that is NaN.
    """
    if len(pairs) < ITEMS_MIN:
        return Calibration(items=len(pairs))
    if any(math.isnan(logprob) for logprob, _ in pairs):
        raise ValueError("an answer's mean log-probability is NaN; leave out answers without tokens")
    raw = np.exp(np.minimum([logprob for logprob, _ in pairs], 0.0))
    right, counts = np.array([each for _, each in pairs], dtype=bool), _parts(len(pairs)) == 0
    model = Calibration(method="scaled", answers=fit_scaling(raw[~counts], right[~counts]), items=len(pairs))
    p = np.array([answer_probability(logprob, model).p for logprob, _ in pairs])
    update = {
        "risk": risk_table(p[counts], right[counts]),
        "confidence_histogram": confidence_histogram(p[counts].tolist()),
    }
    return model.model_copy(update=update)


def cross_validate(
    items: Sequence[Item], answered: Thresholds, learned: Sequence[ImageStats] = ()
) -> CalibrationReport:
    """What a fit on two thirds of the items says about the other third, for every third; needs ITEMS_MIN items.

    Raises ValueError with fewer.
    """
    if len(items) < ITEMS_MIN:
        raise ValueError(f"{len(items)} items cannot be cross-validated; at least {ITEMS_MIN} are needed")
    parts, p = _parts(len(items)), np.empty(len(items))
    for part in range(PARTS):
        held, fitting = _split(items, parts == part)
        model = _fit_frames(fitting, answered, learned)
        p[parts == part] = [probability(item.detections, answered, item.stats, model).p for item in held]
    right = np.array([item.right for item in items], dtype=bool)
    brier = float(((p - right) ** 2).mean())
    return CalibrationReport(len(items), int(right.sum()), expected_calibration_error(p, right), brier, float(p.mean()))


def _parts(count: int) -> NDArray[np.int64]:
    """The part (0..PARTS-1) of each item, by a draw that depends on their number alone: items that come sorted (clean,
    then shifted) fall evenly into all parts, and nothing about an item chooses its part."""
    return np.random.default_rng(0).permutation(count) % PARTS


def _split(items: Sequence[Item], aside: NDArray[np.bool_]) -> tuple[list[Item], list[Item]]:
    marked = list(zip(items, aside.tolist(), strict=True))
    return [item for item, away in marked if away], [item for item, away in marked if not away]


def _fit_frames(items: Sequence[Item], answered: Thresholds, learned: Sequence[ImageStats]) -> Calibration:
    """The probability of a frame and the novelty reference, without a risk table."""
    reference = _reference([*(item.stats for item in items), *learned])
    evidence = _evidence(items, answered, Calibration(novelty=reference))
    right = np.array([item.right for item in items], dtype=bool)
    penalty = min(PENALTIES, key=lambda each: _cross_validated_loss(evidence, right, each))
    model = _fit_logistic(evidence, right, penalty)
    return Calibration(
        method="logistic",
        features=list(FEATURES),
        mean=model.mean.tolist(),
        scale=model.scale.tolist(),
        weights=model.weights.tolist(),
        bias=model.bias,
        items=len(items),
        novelty=reference,
    )


def _accepting(each: Sequence[Confidence]) -> NDArray[np.float64]:
    """The probability of each item as a device computes it, NOT_ACCEPTED for novel inputs."""
    return np.array([NOT_ACCEPTED if confidence.novel else confidence.p for confidence in each])


def _boxes(items: Sequence[Item], answered: Thresholds) -> BoxCalibration | None:
    scores: list[float] = []
    classes: list[int] = []
    right: list[bool] = []
    for item in items:
        kept = item.detections.scores >= answered.score
        scores += item.detections.scores[kept].tolist()
        classes += item.detections.classes[kept].tolist()
        right += item.boxes_right[kept].tolist()
    return fit_boxes(scores, classes, right)


def expected_calibration_error(p: NDArray[np.float64], right: NDArray[np.bool_], bins: int = 10) -> float:
    """Mean |share right - mean p| over `bins` bins of equal count, weighted by count; 0 for no items."""
    order = np.argsort(p, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return float(sum(len(part) * abs(right[part].mean() - p[part].mean()) for part in parts) / max(len(p), 1))


@dataclass(frozen=True, slots=True)
class _Logistic:
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weights: NDArray[np.float64]
    bias: float

    def p(self, evidence: NDArray[np.float64]) -> NDArray[np.float64]:
        z = (evidence - self.mean) / self.scale @ self.weights + self.bias
        return np.asarray(1 / (1 + np.exp(-np.clip(z, -700, 700))))


def _evidence(items: Sequence[Item], answered: Thresholds, calibration: Calibration) -> NDArray[np.float64]:
    rows = [list(features(item.detections, answered, item.stats, calibration).values()) for item in items]
    evidence = np.array(rows, dtype=np.float64)
    if not np.isfinite(evidence).all():
        bad = int(np.flatnonzero(~np.isfinite(evidence).all(axis=1))[0])
        raise ValueError(f"item {bad} has evidence that is not finite: {dict(zip(FEATURES, rows[bad], strict=True))}")
    return evidence


def _fit_logistic(evidence: NDArray[np.float64], right: NDArray[np.bool_], penalty: float) -> _Logistic:
    mean, scale = evidence.mean(axis=0), np.maximum(evidence.std(axis=0), SCALE_MIN)
    x = (evidence - mean) / scale
    good = int(right.sum())
    target = np.where(right, (good + 1) / (good + 2), 1 / (len(right) - good + 2))
    prior = np.array([PRIOR.get(name, 0.0) for name in FEATURES])

    def loss(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = x @ theta[:-1] + theta[-1]
        away = theta[:-1] - prior
        value = float((np.logaddexp(0, z) - target * z).sum() + penalty * (away @ away) / 2)
        error = 1 / (1 + np.exp(-np.clip(z, -700, 700))) - target
        return value, np.append(x.T @ error + penalty * away, error.sum())

    bounds = [{1: (0.0, None), -1: (None, 0.0), 0: (None, None)}[SIGNS[name]] for name in FEATURES]
    start = np.append(prior, np.log(target.mean() / (1 - target.mean())))
    result = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[*bounds, (None, None)])
    if not np.isfinite(result.x).all():
        raise ValueError(f"the calibration did not converge: {result.message}")
    return _Logistic(mean, scale, result.x[:-1], float(result.x[-1]))


def _cross_validated_loss(evidence: NDArray[np.float64], right: NDArray[np.bool_], penalty: float) -> float:
    loss = 0.0
    for held in _folds(len(right)):
        p = np.clip(_fit_logistic(evidence[~held], right[~held], penalty).p(evidence[held]), 1e-6, 1 - 1e-6)
        loss -= float(np.where(right[held], np.log(p), np.log(1 - p)).sum())
    return loss


def _folds(count: int) -> list[NDArray[np.bool_]]:
    """Every FOLDS-th item each: items that come sorted by kind (clean, then shifted) spread over all folds."""
    return [np.arange(count) % FOLDS == fold for fold in range(FOLDS)]


def _reference(stats: Sequence[ImageStats]) -> Novelty:
    """Centres of the inputs (k-means), the inverse covariance around them, and how far away an input is new."""
    vectors = np.array([stats_vector(each) for each in stats])
    deviation = np.maximum(vectors.std(axis=0), DEVIATION_MIN)
    kinds = min(len(vectors) // ITEMS_PER_CENTRE, CENTRES_MAX, len(np.unique(vectors, axis=0)))
    # The seed is fixed so that the same items always give the same release; empty clusters are dropped.
    _, nearest = kmeans2(vectors / deviation, max(kinds, 1), minit="++", rng=np.random.default_rng(0))
    used, nearest = np.unique(nearest, return_inverse=True)
    centres = np.array([vectors[nearest == index].mean(axis=0) for index in range(len(used))])
    covariance = np.cov(vectors - centres[nearest], rowvar=False) + np.diag(DEVIATION_MIN**2)
    inverse = np.linalg.inv(covariance)
    reference = Novelty(centres=centres.tolist(), inverse_covariance=inverse.tolist(), limit=1.0)
    distances = [novelty(each, Calibration(novelty=reference)) for each in stats]
    limit = float(np.quantile(distances, LIMIT_QUANTILE)) * LIMIT_MARGIN
    # A distance of 3.5 in 5 dimensions holds 97 % of a normal distribution: less is never called new.
    return reference.model_copy(update={"limit": max(limit, 3.5)})
