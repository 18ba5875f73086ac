"""Fits the scalings that make one raw score a probability: of a box, or of a generated answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from edged.core.confidence import logit
from edged.wire.manifest import BoxCalibration, Scaling

CLASS_BOXES_MIN = 300  # a class with fewer examples shares its scaling with the others like it
BOXES_MIN = 100  # fewer boxes in all say nothing
SLOPE_MIN, SLOPE_MAX = 0.02, 50.0  # 1 / temperature
PENALTY = 1.0  # towards the score itself (slope 1, bias 0), as strong as a few examples


def fit_scaling(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> Scaling:
    """The temperature and bias under which the scores (n,) in 0..1 best say how often they are right (n,).

    Logistic regression of one variable with Platt's smoothed targets ("Probabilistic outputs for support vector
    machines", 1999): no number of right answers makes a probability of 1.
    """
    x = np.array([logit(score) for score in scores.tolist()])
    good = int(right.sum())
    target = np.where(right, (good + 1) / (good + 2), 1 / (len(right) - good + 2))

    def loss(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z, away = theta[0] * x + theta[1], theta - np.array([1.0, 0.0])
        error = 1 / (1 + np.exp(-np.clip(z, -700, 700))) - target
        value = float((np.logaddexp(0, z) - target * z).sum() + PENALTY * (away @ away) / 2)
        return value, np.array([error @ x, error.sum()]) + PENALTY * away

    result = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B",
                      bounds=[(SLOPE_MIN, SLOPE_MAX), (None, None)])  # fmt: skip
    if not np.isfinite(result.x).all():
        raise ValueError(f"the scaling did not converge: {result.message}")
    return Scaling(temperature=1 / float(result.x[0]), bias=float(result.x[1]))


def fit_boxes(scores: Sequence[float], classes: Sequence[int], right: Sequence[bool]) -> BoxCalibration | None:
    """How answered boxes' scores become probabilities, from the score, class and truth of each; None below BOXES_MIN.

    Classes with fewer than CLASS_BOXES_MIN boxes are pooled; where all of these together are fewer than that, the pool
    is every box there is.
    """
    if len(scores) < BOXES_MIN:
        return None
    score, label, truth = np.array(scores, np.float64), np.array(classes, np.int64), np.array(right, bool)
    values, counts = np.unique(label, return_counts=True)
    large = values[counts >= CLASS_BOXES_MIN]
    small = ~np.isin(label, large)
    pool = small if small.sum() >= CLASS_BOXES_MIN else np.ones(len(score), bool)
    own = {int(value): fit_scaling(score[label == value], truth[label == value]) for value in large}
    return BoxCalibration(pooled=fit_scaling(score[pool], truth[pool]), classes=own, items=len(score))
