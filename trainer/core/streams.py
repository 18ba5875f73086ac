"""A release's live stream as blocks of counts and single verdicts: which of it is the baseline, which the window. Pure.

A block is what one device counted in a stretch of time. Items of one place and time are alike, so blocks are the clusters
by which chance is measured: the design effect says how many times more the blocks differ than independent items would.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edged.wire.measured import added
from trainer.core.accuracy import Checked, Totals

CLUSTERS_MIN = 10  # more blocks than devices, before their differences can be told from chance


class Block(NamedTuple):
    """What a device counted in the block of time that begins at `start` (seconds since the epoch). `confidence`: of all
    items, in the bins of `wire.measured`."""

    device: str
    start: float
    items: int
    escalated: int
    confidence: tuple[int, ...] = ()


class Verdict(NamedTuple):
    """One answer that was checked: when the device gave it, and what `core.accuracy` takes."""

    device: str
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

    def by_device(self) -> dict[str, tuple[int, int]]:
        """Device -> (items, escalated)."""
        found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for block in self.blocks:
            items, escalated = found[block.device]
            found[block.device] = items + block.items, escalated + block.escalated
        return dict(found)

    def only(self, devices: Iterable[str]) -> Period:
        """What these devices did."""
        some = frozenset(devices)
        blocks = [block for block in self.blocks if block.device in some]
        return Period(blocks, [verdict for verdict in self.verdicts if verdict.device in some])


def split(
    blocks: Sequence[Block], verdicts: Sequence[Verdict], baseline_s: float, since: float
) -> tuple[Period, Period]:
    """(baseline, window): each device's first `baseline_s` on this release, and what came after it and after `since`.

    The baseline is each device's own, because a rollout reaches them one after the other.
    """
    first: dict[str, float] = {}
    for block in blocks:
        first[block.device] = min(block.start, first.get(block.device, block.start))
    ends = {device: start + baseline_s for device, start in first.items()}

    def of(device: str, at: float) -> bool | None:
        end = ends.get(device)
        if end is None:
            return None
        return True if at < end else False if at >= since else None

    parts: dict[bool, Period] = {True: Period(), False: Period()}
    for block in blocks:
        where = of(block.device, block.start)
        if where is not None:
            parts[where].blocks.append(block)
    for verdict in verdicts:
        where = of(verdict.device, verdict.at)
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
