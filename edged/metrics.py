"""Counters of closed windows, one a pipeline and release."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any

LATENCIES_MAX = 4096  # of one window; later ones still count in everything else


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
    histogram: list[int] = field(default_factory=lambda: [0] * 10)
    latencies: list[float] = field(default_factory=list)


class Window:
    """The open window. Workers add, the control loop closes it."""

    def __init__(self, start: float) -> None:
        self._start = start
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
            row.reasons[reason] = row.reasons.get(reason, 0) + 1
            if suppressed:
                row.suppressed[suppressed] = row.suppressed.get(suppressed, 0) + 1
            row.unheard += unheard
            row.histogram[min(9, int(p * 10))] += 1
            if len(row.latencies) < LATENCIES_MAX:
                row.latencies.append(latency_ms)

    def error(self, pipeline: str, release: str) -> None:
        """Count one item that could not be answered."""
        with self._lock:
            self._rows.setdefault((pipeline, release), _Row()).errors += 1

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
            }
            for (pipeline, release), row in rows.items()
        ]


def _quantile(values: list[float], share: float) -> float:
    """Nearest-rank quantile; 0 without values."""
    if not values:
        return 0.0
    return sorted(values)[math.ceil(share * len(values)) - 1]
