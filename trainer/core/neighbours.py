"""Near-duplicates of pictures: the same view again, re-encoded, darker, noisier, or moved by a pixel or two.

A picture is a grey thumbnail of SIDE x SIDE cells (`trainer.sketches`), made comparable by subtracting its mean and
dividing by its standard deviation, so that light does not count. Two pictures are near-duplicates when the whole is
nearly the same (`whole`) and no place differs much (`place`). The second rule is what a hash of 64 bits cannot say: under
a fixed camera the background is always the same, and another object on it is another picture. docs/data.md has what was
measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE = 32  # cells of a thumbnail, height and width
COARSE = 16  # of the thumbnail that is compared first
PLACE = 4  # cells, height and width of a place
FLAT = 1.0  # grey levels: with a smaller standard deviation over the cells there is nothing to compare
LENGTH_MIN = 0.1  # of the coarse thumbnail, where one without averaging out has COARSE
LEVEL = 0.5  # grey levels: flat pictures whose means differ by less are the same
BLOCK = 256  # pictures whose similarities are reckoned at once: BLOCK x n float32
CHUNK = 2048  # pictures that `groups` takes up at once
PAIRS = 65536  # pairs compared by the means of their places at once
FINE_PAIRS = 8192  # pairs compared cell by cell at once
MANY = 512  # alike wholes of one picture: with more, its most unusual places are looked at first
UNUSUAL = 4  # such places
SAMPLE = 1024  # pictures that say what is usual
ROUNDING = 0.01  # of float16, in standard deviations

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Limits:
    """How far two near-duplicates may be apart. `whole`: 1 minus the correlation of the coarse thumbnails. `place`: root
    mean square difference over any PLACE x PLACE cells, in standard deviations of the thumbnail."""

    whole: float = 0.03
    place: float = 0.8


LIMITS = Limits()


class Sketches:
    """Thumbnails that are ready to be compared: `grey` (n, SIDE, SIDE) mean grey levels of the cells, 0..255.

    Raises ValueError for another shape, or a level that is not finite.
    """

    def __init__(self, grey: NDArray[np.float32]) -> None:
        grey = (
            np.asarray(grey, np.float32).reshape(-1, SIDE, SIDE) if np.size(grey) else np.zeros((0, SIDE, SIDE), "f4")
        )
        if not np.isfinite(grey).all():
            raise ValueError("a thumbnail holds levels that are not finite")
        self.level = grey.mean(axis=(1, 2), dtype=np.float64)
        spread = grey.std(axis=(1, 2), dtype=np.float64)
        self.flat = spread < FLAT
        scale = np.where(self.flat, 0.0, 1.0 / np.maximum(spread, FLAT))
        fine = (grey - self.level[:, None, None]) * scale[:, None, None]
        self.fine = fine.astype(np.float16)
        places = SIDE // PLACE
        means = fine.reshape(-1, places, PLACE, places, PLACE).mean(axis=(2, 4)).reshape(-1, places * places)
        self.means = means.astype(np.float32)
        cells = SIDE // COARSE
        coarse = fine.reshape(-1, COARSE, cells, COARSE, cells).mean(axis=(2, 4)).reshape(-1, COARSE * COARSE)
        length = np.linalg.norm(coarse, axis=1, keepdims=True)
        # A picture whose structure is all finer than a coarse cell is compared with others of its kind, by places.
        fine_only = length < LENGTH_MIN
        coarse = np.where(fine_only, 0.0, coarse / np.maximum(length, LENGTH_MIN))
        self.coarse = np.hstack([coarse, fine_only]).astype(np.float32)

    def __len__(self) -> int:
        return len(self.level)

    def __getitem__(self, rows: Indices) -> Sketches:
        part = object.__new__(Sketches)
        part.level, part.flat = self.level[rows], self.flat[rows]
        part.fine, part.coarse, part.means = self.fine[rows], self.coarse[rows], self.means[rows]
        return part


def near(first: Sketches, second: Sketches, limits: Limits = LIMITS) -> Indices:
    """For each of `first` the lowest index in `second` of a near-duplicate, or -1: (n,)."""
    found = np.full(len(first), -1, np.int64)
    if not len(second):
        return found
    columns_of = _Columns(second)
    for start in range(0, len(first), BLOCK):
        block = first[np.arange(start, min(start + BLOCK, len(first)))]
        for all_rows, all_columns in columns_of.alike(block, limits):
            # Pairs come by row, lowest column first: of a row that is found already nothing more is compared.
            wanted = found[start + all_rows] < 0
            rows, columns = all_rows[wanted], all_columns[wanted]
            good = _same_places(block, rows, second, columns, limits)
            first_of, at = np.unique(rows[good], return_index=True)
            found[start + first_of] = columns[good][at]
    return found


def groups(sketches: Sketches, limits: Limits = LIMITS) -> Indices:
    """For each picture the index of its group's first one, its own when it is the first: (n,).

    Every member is a near-duplicate of the first, never of another member alone: a stream that changes slowly does not
    become one group. Members follow from the order given.
    """
    leader = np.arange(len(sketches), dtype=np.int64)
    leaders = np.zeros(0, np.int64)
    for start in range(0, len(sketches), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(sketches)))
        known = near(sketches[rows], sketches[leaders], limits)
        leader[rows[known >= 0]] = leaders[known[known >= 0]]
        fresh = rows[known < 0]
        taken = _within(sketches[fresh], limits)
        leader[fresh] = fresh[taken]
        leaders = np.append(leaders, fresh[taken == np.arange(len(fresh))])
    return leader


def _within(block: Sketches, limits: Limits) -> Indices:
    """`groups` of a few pictures: each one that is in no group yet takes up those after it."""
    leader = np.arange(len(block), dtype=np.int64)
    free = np.ones(len(block), bool)
    alike = np.zeros((len(block), len(block)), bool)
    for rows, columns in _Columns(block).alike(block, limits):
        alike[rows, columns] = True
    for first in range(len(block)):
        if not free[first]:
            continue
        after = first + 1 + np.flatnonzero(alike[first, first + 1 :] & free[first + 1 :])
        if len(after):
            found = after[_same_places(block, after, block, np.full(len(after), first), limits)]
            leader[found], free[found] = first, False
    return leader


class _Columns:
    """The pictures that others are compared with."""

    def __init__(self, sketches: Sketches) -> None:
        self._sketches = sketches
        self._means = np.ascontiguousarray(sketches.means.T)
        step = max(1, len(sketches) // SAMPLE)
        self._usual = np.median(sketches.means[::step], axis=0) if len(sketches) else np.zeros(len(self._means))

    def alike(self, block: Sketches, limits: Limits) -> Iterator[tuple[Indices, Indices]]:
        """(rows, columns) of pairs that may be near-duplicates, by row, lowest column first, at most PAIRS at once."""
        others = self._sketches
        alike = block.coarse @ others.coarse.T >= 1.0 - limits.whole
        if block.flat.any():
            alike[block.flat] = others.flat & (np.abs(block.level[block.flat, None] - others.level) < LEVEL)
        for row in np.flatnonzero(alike.sum(axis=1) > MANY):
            self._narrow(alike[row], block.means[row], limits)
        rows, columns = np.nonzero(alike)
        for start in range(0, len(rows), PAIRS):
            part = slice(start, start + PAIRS)
            apart = np.abs(block.means[rows[part]] - others.means[columns[part]]).max(axis=1)
            close = apart <= limits.place + ROUNDING
            yield rows[part][close], columns[part][close]

    def _narrow(self, alike: NDArray[np.bool_], means: NDArray[np.float32], limits: Limits) -> None:
        """Under a fixed camera every whole is alike: where this picture is unlike the others, those that are unlike it go.

        The mean of a place differs by no more than its root mean square does, so nothing is lost.
        """
        for place in np.argsort(-np.abs(means - self._usual), kind="stable")[:UNUSUAL]:
            alike &= np.abs(self._means[place] - means[place]) <= limits.place + ROUNDING


def _same_places(
    first: Sketches, rows: Indices, second: Sketches, columns: Indices, limits: Limits
) -> NDArray[np.bool_]:
    """Whether no place differs by more than `limits.place`: (pairs,). Two flat pictures have no places."""
    good = np.asarray(first.flat[rows] == second.flat[columns])
    for start in range(0, len(rows), FINE_PAIRS):
        part = slice(start, start + FINE_PAIRS)
        squares = (first.fine[rows[part]].astype(np.float32) - second.fine[columns[part]].astype(np.float32)) ** 2
        worst = _runs(_runs(squares, 1), 2).max(axis=(1, 2), initial=0.0) / (PLACE * PLACE)
        good[part] &= worst <= limits.place**2
    return good


def _runs(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Sums over every PLACE neighbours along an axis."""
    count = values.shape[axis] - PLACE + 1
    parts = [np.take(values, range(shift, shift + count), axis) for shift in range(PLACE)]
    return np.asarray(sum(parts[1:], parts[0]), np.float32)


def members(leader: Indices) -> list[list[int]]:
    """The groups of two and more, as indices in their order, from what `groups` gives."""
    found: dict[int, list[int]] = {}
    for index, first in enumerate(leader.tolist()):
        found.setdefault(first, []).append(index)
    return [group for group in found.values() if len(group) > 1]


def stack(thumbnails: Sequence[NDArray[np.float32]]) -> Sketches:
    """Sketches of single thumbnails (SIDE, SIDE)."""
    return Sketches(np.stack(thumbnails) if thumbnails else np.zeros((0, SIDE, SIDE), np.float32))
