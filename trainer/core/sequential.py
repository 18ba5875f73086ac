"""A test that may be looked at every minute: evidence that an effect is above zero, valid at every look. Pure.

The effect is estimated again and again from growing data. Written as the score `effect * information`, with
`information = 1 / variance`, it moves like a Brownian motion with drift `effect` in information time: so do estimates of
mixed models too, whose covariance between two looks is the variance at the later one (Scharfstein, Tsiatis & Robins 1997;
Jennison & Turnbull, "Group Sequential Methods", 2000, chapter 11). Its likelihood ratio, averaged over a half-normal prior
of effects above zero, is a supermartingale that begins at 1 for every effect of zero or below, so that the chance that it
ever reaches 1/alpha is at most alpha (Ville's inequality). This is the mixture sequential probability ratio test of Robbins
(1970), used for peeking by Johari, Pekelis & Walsh ("Always valid inference", 2017) and as a one-sided normal mixture by
Howard, Ramdas, McAuliffe & Sekhon ("Time-uniform, nonparametric, nonasymptotic confidence sequences", 2021).
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def log_evidence(effect: Any, variance: Any, scale: float) -> Values:
    """The logarithm of the evidence that the effect is above zero, the same shape as `effect` and `variance`.

    `scale`: the size of effect that the test is best at, in the effect's unit. Where there is no estimate (a variance that
    is infinite or no number) the evidence is none: 0.
    """
    from scipy.special import log_ndtr  # here: the command line is ready without it

    effect, variance = np.asarray(effect, np.float64), np.asarray(variance, np.float64)
    known = np.isfinite(effect) & np.isfinite(variance) & (variance > 0)
    information = np.where(known, 1 / np.where(known, variance, 1.0), 0.0)
    score = np.where(known, effect, 0.0) * information
    wide = np.sqrt(information + 1 / scale**2)
    standard = score / wide
    log = np.log(2) - np.log(scale * wide) + standard**2 / 2 + log_ndtr(standard)
    return np.where(known, log, 0.0)


def surely_above_zero(effect: Any, variance: Any, scale: float, alpha: float) -> NDArray[np.bool_]:
    """Whether the evidence is at least 1/alpha: of effects of zero or below, at most a share `alpha` is ever called so,
    however often one looks."""
    sure: NDArray[np.bool_] = log_evidence(effect, variance, scale) >= -np.log(alpha)
    return sure


def quantile(level: float) -> float:
    """Of the standard normal distribution."""
    return NormalDist().inv_cdf(level)
