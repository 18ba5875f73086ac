"""The newest answers of each pipeline, in memory: what an agent of this device sees when it looks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edged.wire.messages import Box

KEPT_MAX = 50  # answers of one pipeline
PIPELINES_MAX = 256


@dataclass(frozen=True, slots=True)
class Seen:
    """One answered image: `at` in seconds since the epoch, boxes in pixels of the image that came."""

    item: str
    at: float
    found: Sequence[Box]
    confidence: float
    decision: str
    release: str

    def document(self) -> dict[str, Any]:
        """The answer as JSON-able values."""
        objects = [
            {"label": box.label, "score": round(box.score, 3), "box": [round(value, 1) for value in box.box]}
            for box in self.found
        ]
        return {
            "item": self.item, "at": self.at, "objects": objects, "confidence": round(self.confidence, 3),
            "decision": self.decision, "release": self.release,
        }  # fmt: skip


class Recent:
    """Workers add, agents look. Safe to use from any thread."""

    def __init__(self) -> None:
        self._kept: dict[str, deque[Seen]] = {}
        self._lock = threading.Lock()

    def add(self, pipeline: str, seen: Seen) -> None:
        """An image was answered."""
        with self._lock:
            kept = self._kept.get(pipeline)
            if kept is None and len(self._kept) < PIPELINES_MAX:
                kept = self._kept[pipeline] = deque(maxlen=KEPT_MAX)
            if kept is not None:
                kept.append(seen)

    def newest(self, pipeline: str, limit: int) -> list[Seen]:
        """The newest answers of a pipeline, newest first. Raises KeyError for one that has answered nothing."""
        with self._lock:
            return list(reversed(self._kept[pipeline]))[:limit]

    def pipelines(self) -> list[str]:
        """Those that have answered something."""
        with self._lock:
            return sorted(self._kept)
