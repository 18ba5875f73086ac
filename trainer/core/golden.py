"""Which images prove an exported model, and which others shape it: what set the ranges of int8 proves little of them.

The golden images are spread evenly over what is given, which may be sorted by class or by time. Of the others those that
show nearly the same (`core.neighbours`) set no ranges either, as long as there are enough without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.core.neighbours import Sketches, near


@dataclass(frozen=True, slots=True)
class Draw:
    """Rows of images. `ranges` show the activations' ranges, on `golden` parity is judged; no picture is in both. `near`:
    how many of the golden ones show nearly what one of the ranges shows, because too few others were there."""

    ranges: tuple[int, ...]
    golden: tuple[int, ...]
    near: int = 0


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` rows, evenly spread, the first among them."""
    taken = min(count, most)
    return [number * count // taken for number in range(taken)]


def draw(identities: Sequence[str], sketches: Sketches, *, ranges_min: int, golden_max: int) -> Draw:
    """Part images with these `identities` (of their pixels) and `sketches`, at least `ranges_min` of them for the ranges.

    Every picture counts once. Raises ValueError when that leaves none to be golden.
    """
    first: dict[str, int] = {}
    for row, name in enumerate(identities):
        first.setdefault(name, row)
    rows = list(first.values())
    if len(rows) <= ranges_min:
        raise ValueError(
            f"{len(rows)} different calibration images: int8 needs {ranges_min + 1} or more, {ranges_min} that set its "
            "ranges and others on which parity is proven; give more"
        )
    places = set(spread(len(rows), min(golden_max, len(rows) - ranges_min)))
    golden = [row for place, row in enumerate(rows) if place in places]
    others = np.array([row for place, row in enumerate(rows) if place not in places])
    alike = near(sketches[others], sketches[np.array(golden)]) >= 0
    ranges, again = others[~alike].tolist(), others[alike].tolist()
    wanted = again[: max(0, ranges_min - len(ranges))]
    seen = near(sketches[np.array(golden)], sketches[np.array(wanted, int)]) >= 0
    return Draw(tuple(sorted([*ranges, *wanted])), tuple(golden), int(seen.sum()))
