"""Two models on the same images: how sure it is that one is better, counted over images.

Images are drawn, not boxes: the boxes of one image are right or wrong together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
CELLS_MAX = 4_000_000  # of one block of draws: 32 MB


def f1_of(counts: NDArray[Any]) -> Table:
    """F1 of true positives, false positives and false negatives in the last axis; 1 where there is none of them."""
    total = 2 * counts[..., 0] + counts[..., 1] + counts[..., 2]
    share = np.divide(2.0 * counts[..., 0], total, out=np.ones(np.shape(total)), where=total > 0)
    return np.asarray(share, dtype=np.float64)


def resampled(table: NDArray[Any], draws: int, rng: np.random.Generator) -> Table:
    """Column sums (draws, columns) of `table` (n, columns) over n rows drawn with replacement: the paired bootstrap, when
    both models are columns of one table (Efron & Tibshirani 1993, chapter 6 and section 16.2)."""
    # Rows that are the same are drawn together: most images are simply right.
    rows, times = np.unique(np.asarray(table, dtype=np.float64), axis=0, return_counts=True)
    n, block = len(table), max(1, CELLS_MAX // len(rows))
    parts = [rng.multinomial(n, times / n, size=min(block, draws - done)) @ rows for done in range(0, draws, block)]
    return np.concatenate(parts)


def gain_low(
    candidate: NDArray[Any], current: NDArray[Any], draws: int, confidence: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Gain in F1 of counts (n, 3) over the same images, and the lower end of its one-sided percentile interval."""
    gain = float(f1_of(candidate.sum(axis=0)) - f1_of(current.sum(axis=0)))
    sums = resampled(np.hstack([candidate, current]), draws, rng)
    return gain, float(np.quantile(f1_of(sums[:, :3]) - f1_of(sums[:, 3:]), 1 - confidence))


def chance_of_gain(candidate: NDArray[Any], current: NDArray[Any], draws: int, rng: np.random.Generator) -> float:
    """The share of gains at least as large when each image's two results are swapped by a coin: how often a model that is
    no better would look this good. Exact for any number of images that differ, where the bootstrap is too sure of few.

    Approximate randomisation (Noreen 1989; for F1: Yeh 2000), counted as in Phipson & Smyth 2010.
    """
    new, old = np.asarray(candidate, np.float64), np.asarray(current, np.float64)
    both, gain = new.sum(axis=0) + old.sum(axis=0), float(f1_of(new.sum(axis=0)) - f1_of(old.sum(axis=0)))
    apart, times = np.unique(new - old, axis=0, return_counts=True)
    block, reached = max(1, CELLS_MAX // len(apart)), 0
    for done in range(0, draws, block):
        kept = rng.binomial(times, 0.5, size=(min(block, draws - done), len(times)))
        sums = old.sum(axis=0) + kept @ apart
        reached += int((f1_of(sums) - f1_of(both - sums) >= gain - 1e-12).sum())
    return (1 + reached) / (1 + draws)


def class_drops(
    candidate: NDArray[Any], current: NDArray[Any], draws: int, confidence: float, rng: np.random.Generator
) -> list[tuple[float, float, float]]:
    """Of each class the loss in F1, and the ends of its two one-sided intervals, from counts (n, classes, 3).

    Draws without an image of the class (nothing to find, nothing found) say nothing of it and are left out; NaN ends
    where all were.
    """
    n, classes = candidate.shape[:2]
    drops = f1_of(current.sum(axis=0)) - f1_of(candidate.sum(axis=0))
    table = np.hstack([candidate.reshape(n, -1), current.reshape(n, -1)])
    sums = resampled(table, draws, rng).reshape(draws, 2, classes, 3)
    drawn = f1_of(sums[:, 1]) - f1_of(sums[:, 0])
    seen = sums.sum(axis=(1, 3)) > 0
    found = []
    for index in range(classes):
        kept = drawn[seen[:, index], index]
        low, high = np.quantile(kept, [1 - confidence, confidence]) if len(kept) else (np.nan, np.nan)
        found.append((float(drops[index]), float(low), float(high)))
    return found
