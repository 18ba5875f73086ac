"""Samples and messages for the tests of the store."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from edged.store import NewSample, OutboxMessage, Sample, Store

MODEL = {"kind": "model", "who": "teacher", "release": "t@1"}
PERSON = {"kind": "person", "who": "ada"}
SEVEN = [{"label": "7", "box": [1.0, 2.0, 3.0, 4.0], "score": 1.0}]


def image_of(n: int | str) -> bytes:
    return f"pixels {n} ".encode() * 50


def new_sample(sample_id: str, image: bytes | None = None, state: Any = "escalated", **changes: Any) -> NewSample:
    image = image_of(sample_id) if image is None else image
    values: dict[str, Any] = {
        "id": sample_id, "pipeline": "line", "task": "digits", "model": "vision", "release": "d@1.0", "state": state,
        "reason": "low_confidence", "decision": "escalate", "confidence": 0.25, "inclusion_probability": 1.0,
        "sha256": hashlib.sha256(image).hexdigest(), "bytes": len(image), "prediction": SEVEN, "item": "a.jpg",
        "captured": 100.0, "answer_by": 105.0, "label_by": 1000.0,
    }  # fmt: skip
    return NewSample(**(values | changes))


def escalation_of(sample_id: str, **changes: Any) -> OutboxMessage:
    values: dict[str, Any] = {
        "id": f"m-{sample_id}", "topic": "t/esc", "qos": 1, "retain": False, "expires": 1000.0, "payload": b"{}",
        "keep": "verdict", "sample": sample_id, "correlation": b"dev/" + sample_id.encode(),
    }  # fmt: skip
    return OutboxMessage(**(values | changes))


def message(message_id: str, **changes: Any) -> OutboxMessage:
    return escalation_of("x", **({"id": message_id, "keep": "ack", "sample": None, "expires": None} | changes))


def escalate(store: Store, sample_id: str, **changes: Any) -> None:
    store.capture(new_sample(sample_id, **changes), image_of(sample_id), escalation_of(sample_id))


def label(store: Store, sample_id: str, status: Any = "labelled", boxes: Any = SEVEN, by: Any = MODEL) -> Sample:
    sample = store.label(sample_id, status, boxes, 0.9, by, "", 200.0)
    assert sample is not None
    return sample


def due_ids(store: Store, now: float, limit: int = 100) -> list[str]:
    return [row.message.id for row in store.due(now, limit)]


def files(store_folder: Path) -> list[Path]:
    return [path for path in (store_folder / "blobs").rglob("*") if path.is_file()]
