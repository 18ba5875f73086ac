"""The device's memory: samples with their images, the outbox, counters and update state, in one folder.

`state_dir` holds `edged.db` (SQLite, WAL, synchronous=FULL) and `blobs/ab/<sha256>`. Time is an argument everywhere.
"""

from __future__ import annotations

from pathlib import Path

from edged.store.blobs import Blobs
from edged.store.database import Database
from edged.store.records import (
    Announce,
    BrokenStore,
    DeadLetter,
    Evicted,
    LanguageRequest,
    Moved,
    NewSample,
    OutboxFull,
    OutboxMessage,
    OutboxRow,
    Sample,
    StorageFull,
    StoreError,
    StoreLimits,
    SweepReport,
)
from edged.store.samples import Samples

__all__ = [
    "Announce",
    "BrokenStore",
    "DeadLetter",
    "Evicted",
    "LanguageRequest",
    "Moved",
    "NewSample",
    "OutboxFull",
    "OutboxMessage",
    "OutboxRow",
    "Sample",
    "StorageFull",
    "Store",
    "StoreError",
    "StoreLimits",
    "SweepReport",
]


class Store(Samples):
    """Everything a device remembers; safe to use from any thread. Raises BrokenStore when the file is damaged."""

    def __init__(self, folder: Path, limits: StoreLimits | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(Database(folder / "edged.db"), Blobs(folder / "blobs"), limits or StoreLimits())

    def close(self) -> None:
        """Keep the counters and close the file."""
        try:
            self.flush_counters()
        finally:
            self._db.close()
