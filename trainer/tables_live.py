"""Tables of what devices answered and how right it was (trainer/live.py, trainer/drift.py)."""

from __future__ import annotations

from sqlalchemy import JSON, Boolean, Column, Float, Index, Integer, Table

from trainer.schema import String, metadata

measured = Table(  # windows added up by the hour (trainer/live.py): what outlives the windows
    "measured",
    metadata,
    Column("device", String, primary_key=True),
    Column("pipeline", String, primary_key=True),
    Column("release", String, primary_key=True),
    Column("start", Float, primary_key=True),  # of the hour, by the device's clock
    Column("model", String, nullable=False),
    Column("items", Integer, nullable=False),
    Column("audited", Integer, nullable=False),
    Column("escalated", Integer, nullable=False),
    Column("errors", Integer, nullable=False),
    Column("suppressed", Integer, nullable=False),
    Column("reasons", JSON, nullable=False),  # reason -> how many decisions
    Column("confidence", JSON, nullable=False),  # histograms, in the bins of edged.wire.measured
    Column("latency", JSON, nullable=False),
    Column("memory_mib_max", Float),
    Column("temperature_c_max", Float),
    Index("measured_by_release", "release", "start"),
)

judged = Table(  # answers that were to be checked, and whether they were right
    "judged",
    metadata,
    Column("id", String, primary_key=True),  # of the sample
    Column("device", String, nullable=False),
    Column("pipeline", String, nullable=False),
    Column("release", String, nullable=False),
    Column("decision", String, nullable=False),  # audit | escalate
    Column("inclusion", Float, nullable=False),
    Column("right", Boolean),  # null: nobody has said
    Column("confidence", Float, nullable=False),  # of whoever said so
    Column("said_by", JSON),  # provenance; who else said what is in `opinions`
    Column("captured", Float, nullable=False),
    Index("judged_by_release", "release", "captured"),
    Index("judged_by_device", "device", "captured"),
)

looks = Table(  # the last look at each stream for drift
    "looks",
    metadata,
    Column("release", String, primary_key=True),
    Column("scope", String, primary_key=True),  # "" is the fleet, else a group of devices
    Column("model", String, nullable=False),
    Column("at", Float, nullable=False),
    Column("found", JSON, nullable=False),  # as core.drift.Look, one a rule
)

detections = Table(
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
