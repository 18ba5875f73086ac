"""A tool for agents of a device with eyes, `edged.agents.sight:last_detections`: what its pipelines have seen last."""

from __future__ import annotations

from typing import Any

from edged.recent import Recent

LIMIT_MAX = 20
_offered: list[Recent] = []  # of the daemon that hosts this process's agents; one at most


def offer_sight(recent: Recent | None) -> None:
    """The daemon offers what its pipelines see; None takes it back."""
    _offered[:] = [] if recent is None else [recent]


def last_detections(pipeline: str, limit: int = 5) -> list[dict[str, Any]]:
    """What a camera pipeline of this device has detected in its newest images, the newest first.

    Args:
        pipeline: name of the pipeline
        limit: how many images, 1 to 20
    """
    if not _offered:
        raise LookupError("no daemon runs here: nothing is seen")
    if not 1 <= limit <= LIMIT_MAX:
        raise ValueError(f"limit {limit}: use 1 to {LIMIT_MAX}")
    try:
        return [seen.document() for seen in _offered[0].newest(pipeline, limit)]
    except KeyError:
        known = ", ".join(_offered[0].pipelines()) or "none yet"
        raise LookupError(f"pipeline {pipeline!r} has detected nothing; those that have: {known}") from None
