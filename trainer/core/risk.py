"""What accepting costs: upper bounds on the share of wrong answers among the accepted ones. Pure.

Selection with guaranteed risk (Geifman & El-Yaniv, "Selective classification for deep neural networks", 2017): the
thresholds are fixed before anything is counted, each gets the exact binomial bound of Clopper & Pearson (1934), and the
levels of all of them add up to the error that is allowed (Bonferroni), so that whoever picks one afterwards is covered.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from edged.wire.manifest import RiskTable

CONFIDENCE = 0.95  # that every bound of a table holds
# The thresholds: fixed before any item is seen, closer together where the probabilities of a usable model lie.
LEVELS = (
    0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.875, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995,
)  # fmt: skip


def upper_bound(wrong: int, accepted: int, confidence: float) -> float:
    """The largest error rate that `wrong` of `accepted` answers leave possible: one-sided and exact, 1 for none accepted.

    Clopper & Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", 1934.
    """
    if wrong >= accepted:
        return 1.0
    return float(beta.ppf(confidence, wrong + 1, accepted - wrong))


def risk_table(p: NDArray[np.float64], right: NDArray[np.bool_], confidence: float = CONFIDENCE) -> RiskTable:
    """Count what each of LEVELS would have cost on items that fitted nothing.

    `p` (n,): the probability of each answer, below every level where it would not be accepted whatever its probability
    (a novel input); `right` (n,): whether it was right. The bounds hold together with `confidence`.
    """
    each = 1 - (1 - confidence) / len(LEVELS)
    bounds = []
    for level in LEVELS:
        accepted = p >= level
        bounds.append(upper_bound(int((accepted & ~right).sum()), int(accepted.sum()), each))
    return RiskTable(thresholds=list(LEVELS), bounds=bounds, confidence=confidence, items=len(p))
