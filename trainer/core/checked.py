"""How many of a device's texts are right, from those that somebody checked: accepted and escalated answers, each with the
weight of what it stands for. Pure.

Escalated answers are checked for certain and accepted ones by lot, and not every question gets its verdict. So the two are
estimated apart and weighted with how many of each there were, which is counted before any limit (docs/policy.md):
stratified sampling (Cochran, Sampling Techniques, 1977, chapter 5), within a stratum Hajek's estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

UNSEEN_SHARE_MAX = 0.05  # of the answers may be of a kind of which none was checked; with more nothing is known


@dataclass(frozen=True, slots=True)
class Part:
    """The answers of one kind: how many were given, how many were checked with a verdict, the weights of those that were
    right, of all that were checked, and the sum of the squares of these."""

    items: int
    checked: int = 0
    right: float = 0.0
    all: float = 0.0
    squares: float = 0.0


def pooled(parts: Sequence[Part]) -> tuple[int, float, float] | None:
    """(checked answers, of these as many as the share that is right, the size that their weights leave); None: too much
    was not looked at.

    The size is Kish's (1965), (sum w)^2 / sum w^2, where an answer's weight is that of what it stands for.
    """
    total = sum(part.items for part in parts)
    seen = [part for part in parts if part.items > 0 and part.all > 0]
    covered = sum(part.items for part in seen)
    if covered <= 0 or total - covered > UNSEEN_SHARE_MAX * total:
        return None
    share = sum(part.items / covered * part.right / part.all for part in seen)
    inverse = sum((part.items / covered) ** 2 * part.squares / part.all**2 for part in seen)
    checked = sum(part.checked for part in seen)
    return checked, checked * share, 1 / inverse
