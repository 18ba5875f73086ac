"""What a device reported of a stretch of its life, taken in as `trainer serve` does."""

from __future__ import annotations

from sqlalchemy import Connection

from edged.wire.messages import Box, Metrics, Provenance, SampleEntry
from trainer import fleet
from trainer.host import new_id

BOX = Box(label="1", box=(0, 0, 5, 5))
TEACHER = Provenance(kind="model", who="big", release="teacher@1.0")


def lived(connection: Connection, device: str, at: float, *, items: int, audits: int, right: int) -> None:
    """A window of `digits@1.0` that began `at` (seconds since the epoch), and its audits with their verdicts."""
    envelope = {"ts": at, "boot": "b", "seq": 1}
    window = Metrics(
        id=new_id(), **envelope, start=at, end=at + 60, pipeline="line", release="digits@1.0", items=items,
        accepted=items - audits, audited=audits,
    )  # fmt: skip
    fleet.take_metrics(connection, device, window)
    for number in range(audits):
        entry = SampleEntry(
            id=new_id(), **envelope, sample=new_id(), pipeline="line", task="detect", model="digits",
            release="digits@1.0", state="labelled", sha256="0" * 64, bytes=1, decision="audit", label=[BOX],
            prediction=[BOX] if number < right else [], inclusion_probability=audits / items, label_confidence=0.9,
            provenance=TEACHER, captured=at + number / audits,
        )  # fmt: skip
        fleet.take_sample(connection, device, entry)
