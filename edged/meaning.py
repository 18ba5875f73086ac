"""What parts of a configuration mean to the parts that they are for."""

from __future__ import annotations

from edged.config import Pipeline, Responder, Settings
from edged.config_sources import MqttSource
from edged.store import StoreLimits


def store_limits(settings: Settings) -> StoreLimits:
    """The store's limits as they are configured."""
    limits = settings.store
    return StoreLimits(
        blob_bytes_max=limits.blob_bytes_max,
        outbox_rows_max=limits.outbox_rows_max,
        outbox_bytes_max=limits.outbox_bytes_max,
        free_bytes_min=limits.free_bytes_min,
        age_days=limits.ages(),
        class_max=limits.class_max,
    )


def responding(responder: Responder) -> Pipeline:
    """A responder is a pipeline whose items are other devices' questions."""
    return Pipeline(
        slot=responder.slot, source=MqttSource(), task=responder.task, queue_max=responder.queue_max,
        policy=responder.policy, escalate_to=responder.escalate_to,
    )  # fmt: skip
