"""Tables of what devices answered and how right it was."""

from __future__ import annotations

from sqlalchemy import JSON, Column, Float, Index, Table

from trainer.schema import String, metadata

detections = Table(  # of drift; what calls for a training (trainer/ready.py)
    "detections",
    metadata,
    Column("id", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("release", String, nullable=False),
    Column("scope", String, nullable=False),
    Column("rule", String, nullable=False),
    Column("text", String, nullable=False),
    Column("found_at", Float, nullable=False),
    Column("evidence", JSON, nullable=False),
    Index("detections_by_model", "model", "found_at"),
)
