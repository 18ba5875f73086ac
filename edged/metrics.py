"""What was answered: counters of windows, one a pipeline and release, which start at zero; and totals of each pipeline
since the start, which never do."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edged.wire.measured import CONFIDENCE_BINS, LATENCY_BINS, confidence_bin, latency_bin

LATENCIES_MAX = 4096  # of one window; later ones still count in everything else
# Upper bounds of the totals' histograms: a small detector takes milliseconds, a language model minutes.
LATENCY_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
CONFIDENCE_BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
REASONS_MAX = 32  # different reasons that a pipeline's totals tell apart; the rest are one more
OTHER = "other"


@dataclass(slots=True)
class _Row:
    items: int = 0
    accepted: int = 0
    audited: int = 0
    escalated: int = 0
    errors: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    suppressed: dict[str, int] = field(default_factory=dict)
    unheard: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * CONFIDENCE_BINS)
    latencies: list[float] = field(default_factory=list)
    latency_histogram: list[int] = field(default_factory=lambda: [0] * LATENCY_BINS)


class Histogram:
    """How many values were at most each bound, of all that ever came. Not safe to use from several threads."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """One more value; NaN counts above every bound and adds nothing to the sum."""
        above = math.isnan(value)
        self._counts[-1 if above else bisect_left(self._bounds, value)] += 1
        self._sum += 0.0 if above else value

    def document(self) -> dict[str, Any]:
        """`bounds`, `counts` between them (one more: above the last) and the `sum`."""
        return {"bounds": list(self._bounds), "counts": list(self._counts), "sum": self._sum}


@dataclass(slots=True)
class _Total:
    answers: dict[tuple[str, str], int] = field(default_factory=dict)  # (action, reason)
    suppressed: dict[str, int] = field(default_factory=dict)
    unheard: int = 0
    errors: int = 0
    latency_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_BOUNDS_S))
    confidence: Histogram = field(default_factory=lambda: Histogram(CONFIDENCE_BOUNDS))

    def document(self) -> dict[str, Any]:
        decisions: dict[str, dict[str, int]] = {}
        for (action, reason), count in self.answers.items():
            decisions.setdefault(action, {})[reason] = count
        return {
            "items": sum(self.answers.values()),
            "decisions": decisions,
            "suppressed": dict(self.suppressed),
            "unheard": self.unheard,
            "errors": self.errors,
            "latency_s": self.latency_s.document(),
            "confidence": self.confidence.document(),
        }


def _one_of_few(known: dict[Any, int], key: Any, rest: Any) -> Any:
    return key if key in known or len(known) < REASONS_MAX else rest


class Window:
    """The open window, and the totals of all. Workers add, the control loop closes the window."""

    def __init__(self, start: float) -> None:
        self._start = start
        self._totals: dict[str, _Total] = {}
        self._rows: dict[tuple[str, str], _Row] = {}
        self._lock = threading.Lock()

    def answer(
        self, pipeline: str, release: str, action: str, reason: str, p: float, latency_ms: float, *,
        suppressed: str = "", unheard: bool = False,
    ) -> None:  # fmt: skip
        """Count one answered item; an escalation counts when the policy wants it, before any limit holds it back
        (`suppressed`: which)."""
        with self._lock:
            row = self._rows.setdefault((pipeline, release), _Row())
            row.items += 1
            row.accepted += action == "accept"
            row.audited += action == "audit"
            row.escalated += action == "escalate"
            why = _one_of_few(row.reasons, reason, OTHER)
            row.reasons[why] = row.reasons.get(why, 0) + 1
            if suppressed:
                limit = _one_of_few(row.suppressed, suppressed, OTHER)
                row.suppressed[limit] = row.suppressed.get(limit, 0) + 1
            row.unheard += unheard
            row.histogram[confidence_bin(p)] += 1
            row.latency_histogram[latency_bin(latency_ms)] += 1
            if len(row.latencies) < LATENCIES_MAX:
                row.latencies.append(latency_ms)
            total = self._totals.setdefault(pipeline, _Total())
            key = _one_of_few(total.answers, (action, reason), (action, OTHER))
            total.answers[key] = total.answers.get(key, 0) + 1
            if suppressed:
                limit = _one_of_few(total.suppressed, suppressed, OTHER)
                total.suppressed[limit] = total.suppressed.get(limit, 0) + 1
            total.unheard += unheard
            total.latency_s.add(latency_ms / 1000)
            total.confidence.add(p)

    def error(self, pipeline: str, release: str) -> None:
        """Count one item that could not be answered."""
        with self._lock:
            self._rows.setdefault((pipeline, release), _Row()).errors += 1
            self._totals.setdefault(pipeline, _Total()).errors += 1

    def totals(self, pipeline: str) -> dict[str, Any]:
        """What this pipeline answered since the start: items, decisions (action -> reason -> count), suppressed, unheard,
        errors, and the histograms `latency_s` and `confidence`."""
        with self._lock:
            return self._totals.get(pipeline, _Total()).document()

    def close(self, now: float) -> list[dict[str, Any]]:
        """The fields of one `Metrics` message a pipeline and release, and a new window."""
        with self._lock:
            rows, self._rows = self._rows, {}
            start, self._start = self._start, now
        return [
            {
                "start": start,
                "end": now,
                "pipeline": pipeline,
                "release": release,
                "items": row.items,
                "accepted": row.accepted,
                "audited": row.audited,
                "escalated": row.escalated,
                "errors": row.errors,
                "reasons": row.reasons,
                "suppressed": row.suppressed,
                "unheard": row.unheard,
                "confidence_histogram": row.histogram,
                "latency_ms_p50": _quantile(row.latencies, 0.5),
                "latency_ms_p95": _quantile(row.latencies, 0.95),
                "latency_histogram": _without_end(row.latency_histogram),
            }
            for (pipeline, release), row in rows.items()
        ]


def _without_end(histogram: list[int]) -> list[int]:
    """Without the zeros at its end: most models use a few of many bins."""
    return histogram[: max((index + 1 for index, count in enumerate(histogram) if count), default=0)]


def _quantile(values: list[float], share: float) -> float:
    """Nearest-rank quantile; 0 without values."""
    if not values:
        return 0.0
    return sorted(values)[math.ceil(share * len(values)) - 1]
