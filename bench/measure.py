"""What every benchmark shares: targets, the median of alternating runs, how results are shown."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Target:
    """What a key must reach: `at` least or at most."""

    sense: Literal[">=", "<="]
    value: float

    def met(self, measured: float) -> bool:
        """Whether the measured value is good enough; NaN is not."""
        return measured >= self.value if self.sense == ">=" else measured <= self.value


@dataclass(frozen=True, slots=True)
class Result:
    """What a benchmark measured: `keys` are judged against its targets, `facts` (name -> value) explain them."""

    keys: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One row of docs/benchmarks.md. `run(quick, say)` measures; `quick` is for trying the benchmark itself: fewer
    rounds, figures that mean little."""

    name: str
    text: str
    targets: dict[str, Target]
    run: Callable[[bool, Say], Result]


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Median of `first[i] / second[i]`, the two sides of round i: what drifts on a noisy machine hits both."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def alternate(rounds: int, *sides: Callable[[], float], say: Say, names: Sequence[str]) -> list[list[float]]:
    """Call every side once a round, in turn, first in one order and then in the other; values by side."""
    values: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for index in order:
            values[index].append(sides[index]())
        say(f"round {number + 1}/{rounds}: " + ", ".join(
            f"{name} {side[-1]:.4g}" for name, side in zip(names, values, strict=True)))  # fmt: skip
    return values


def to_stderr(text: str) -> None:
    """Progress, out of the way of the result."""
    print(text, file=sys.stderr, flush=True)
