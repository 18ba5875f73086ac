"""Near-duplicates of texts: the same question again, in other case, spacing or punctuation, with a typing error, with a
word more or less.

A text is the set of its runs of SHINGLE characters; two texts are alike when their sets are: at least RESEMBLANCE of all
runs that one of them has are in both (A. Z. Broder, "On the resemblance and containment of documents", 1997). That is
reckoned exactly for texts of up to RUNS_MAX runs; of longer ones the RUNS_MAX smallest hashes stand for the set, as
there. Numbers decide: "read a 7 with score 0.9" and "read a 1 with score 0.2" are two questions, however alike they look,
so texts whose numbers differ are never near-duplicates. docs/data.md has what was measured.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

SHINGLE = 5  # characters
RESEMBLANCE = 0.8
RUNS_MAX = 2048  # 8 KiB a text
_PUNCTUATION = re.compile(r"[.,;:!?\"'`´…„“”‚‘’«»()\[\]{}\s]+")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Sketch:
    """A text, ready to be compared: `runs` are the hashes of its runs (n,), rising; `numbers` its numbers in their order,
    as one hash (0: it has none)."""

    runs: NDArray[np.uint32]
    numbers: int

    @property
    def cut(self) -> bool:
        """Whether the runs are only the smallest ones of more."""
        return len(self.runs) >= RUNS_MAX


def plain(text: str) -> str:
    """The text as it is compared: compatibility forms folded, case, spaces and punctuation left out. Signs of mathematics
    and of programs stay: `a + b` is not `a - b`."""
    return _PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def sketch(text: str) -> Sketch:
    """The sketch of a text; one without a letter or sign has no runs, and is like nothing."""
    said = plain(text)
    found = {said[start : start + SHINGLE] for start in range(max(1, len(said) - SHINGLE + 1))} if said else set()
    runs = np.array(sorted(_hash(run) for run in found)[:RUNS_MAX], np.uint32)
    numbers = _NUMBER.findall(said)
    return Sketch(runs, _hash(" ".join(numbers)) if numbers else 0)


def resemblance(first: Sketch, second: Sketch) -> float:
    """The share of the runs of both that both have, 0..1: of the smallest RUNS_MAX where one of them is cut."""
    union = np.union1d(first.runs, second.runs)
    if first.cut or second.cut:
        union = union[:RUNS_MAX]
    if not len(union):
        return 0.0
    both = np.intersect1d(first.runs, second.runs, assume_unique=True)
    return float(np.isin(both, union, assume_unique=True).sum() / len(union))


def alike(first: Sketch, second: Sketch, least: float = RESEMBLANCE) -> bool:
    """Whether two texts are near-duplicates: they resemble each other by `least`."""
    return first.numbers == second.numbers and resemblance(first, second) >= least


class Known:
    """Texts that others are compared with. A pair that is alike shares one of its rarest runs (S. Chaudhuri, V. Ganti,
    R. Kaushik, "A primitive operator for similarity joins in data cleaning", 2006), so only those are looked up."""

    def __init__(self, sketches: Iterable[Sketch] = (), least: float = RESEMBLANCE) -> None:
        self._sketches, self._least = list(sketches), least
        self._runs = [frozenset(each.runs.tolist()) for each in self._sketches]
        self._often: dict[int, Counter[int]] = {}  # numbers -> run -> in how many texts of these numbers
        self._cut: dict[int, list[int]] = {}  # numbers -> texts that stand for more runs than they name
        self._by_run: dict[tuple[int, int], list[int]] = {}
        for each in self._sketches:
            self._often.setdefault(each.numbers, Counter()).update(each.runs.tolist())
        for place, each in enumerate(self._sketches):
            if each.cut:
                self._cut.setdefault(each.numbers, []).append(place)
            for run in self._rarest(each):
                self._by_run.setdefault((each.numbers, run), []).append(place)

    def __len__(self) -> int:
        return len(self._sketches)

    def near(self, other: Sketch) -> int:
        """The lowest place of a near-duplicate of `other`; -1: there is none."""
        if other.cut:  # its rarest runs are not known
            places = [place for place, each in enumerate(self._sketches) if each.numbers == other.numbers]
        else:
            found = {place for run in self._rarest(other) for place in self._by_run.get((other.numbers, run), ())}
            places = sorted(found.union(self._cut.get(other.numbers, ())))
        runs = frozenset(other.runs.tolist())
        return next((place for place in places if self._alike(place, other, runs)), -1)

    def _alike(self, place: int, other: Sketch, runs: frozenset[int]) -> bool:
        """`alike` of two texts with the same numbers; of whole sets without numpy, which takes ten times as long."""
        each = self._sketches[place]
        if each.cut or other.cut:
            return alike(each, other, self._least)
        both = len(self._runs[place] & runs)
        return both > 0 and both >= self._least * (len(each.runs) + len(runs) - both)

    def _rarest(self, each: Sketch) -> Sequence[int]:
        """So many runs that a text which has none of them lacks too many to be alike."""
        often = self._often.get(each.numbers, Counter())
        ordered = sorted(each.runs.tolist(), key=lambda run: (often[run], run))
        return ordered[: len(ordered) - math.ceil(self._least * len(ordered)) + 1]


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=4).digest(), "big")
