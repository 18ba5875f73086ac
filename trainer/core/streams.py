"""A release's live stream as blocks of counts and single verdicts: which of it is the baseline, which the window. Pure.

A block is what one pipeline of a device counted in a stretch of time. Items of one place and time are alike, so blocks are
the clusters by which chance is measured: the design effect says how many times more the blocks differ than independent
items would.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edged.wire.measured import added
from trainer.core.accuracy import Checked, Totals

CLUSTERS_MIN = 10  # more blocks than places, before their differences can be told from chance


class Block(NamedTuple):
    """What was counted at one place (a pipeline of a device) in the block of time that begins at `start` (seconds since the
    epoch). `confidence`: of all items, in the bins of `wire.measured`."""

    place: str
    start: float
    items: int
    escalated: int
    confidence: tuple[int, ...] = ()


class Verdict(NamedTuple):
    """One answer that was checked: where and when it was given, and what `core.accuracy` takes."""

    place: str
    at: float
    checked: Checked


@dataclass(frozen=True, slots=True)
class Period:
    """A part of a release's stream."""

    blocks: list[Block] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def totals(self) -> Totals:
        """How many were accepted and escalated."""
        escalated = sum(block.escalated for block in self.blocks)
        return Totals(self.items - escalated, escalated)

    @property
    def items(self) -> int:
        """All answers."""
        return sum(block.items for block in self.blocks)

    @property
    def span(self) -> tuple[float, float]:
        """Start of the first and of the last block; zeros without one."""
        starts = [block.start for block in self.blocks]
        return (min(starts), max(starts)) if starts else (0.0, 0.0)

    @property
    def confidence(self) -> list[int]:
        """The blocks' histograms added up."""
        total: list[int] = []
        for block in self.blocks:
            total = added(total, block.confidence)
        return total

    def by_place(self) -> dict[str, tuple[int, int]]:
        """Place -> (items, escalated)."""
        found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for block in self.blocks:
            items, escalated = found[block.place]
            found[block.place] = items + block.items, escalated + block.escalated
        return dict(found)

    def only(self, places: Iterable[str]) -> Period:
        """What was counted at these places."""
        some = frozenset(places)
        blocks = [block for block in self.blocks if block.place in some]
        return Period(blocks, [verdict for verdict in self.verdicts if verdict.place in some])


def split(
    blocks: Sequence[Block], verdicts: Sequence[Verdict], baseline_s: float, since: float
) -> tuple[Period, Period]:
    """(baseline, window): each place's first `baseline_s` on this release, and what came after it and after `since`.

    The baseline is each place's own, because a rollout reaches them one after the other.
    """
    first: dict[str, float] = {}
    for block in blocks:
        first[block.place] = min(block.start, first.get(block.place, block.start))
    ends = {place: start + baseline_s for place, start in first.items()}

    def of(place: str, at: float) -> bool | None:
        end = ends.get(place)
        if end is None:
            return None
        return True if at < end else False if at >= since else None

    parts: dict[bool, Period] = {True: Period(), False: Period()}
    for block in blocks:
        where = of(block.place, block.start)
        if where is not None:
            parts[where].blocks.append(block)
    for verdict in verdicts:
        where = of(verdict.place, verdict.at)
        if where is not None:
            parts[where].verdicts.append(verdict)
    return parts[True], parts[False]


def design_effect(clusters: Iterable[tuple[str, int, int]]) -> float:
    """How many times more the clusters (stratum, size, hits) vary around their stratum's share than independent items would;
    at least 1, and 1 where there are too few to tell.

    Rao and Scott, "A simple method for the analysis of clustered binary data" (Biometrics 48, 1992); within strata.
    """
    sized = [each for each in clusters if each[1]]
    size: defaultdict[str, int] = defaultdict(int)
    hits: defaultdict[str, int] = defaultdict(int)
    for stratum, n, x in sized:
        size[stratum] += n
        hits[stratum] += x
    free = len(sized) - len(size)
    share = {stratum: hits[stratum] / n for stratum, n in size.items()}
    expected = sum(n * share[stratum] * (1 - share[stratum]) for stratum, n, _ in sized)
    if free < CLUSTERS_MIN or expected <= 0:
        return 1.0
    seen = sum((x - n * share[stratum]) ** 2 for stratum, n, x in sized)
    return max(1.0, seen / expected * len(sized) / free)
