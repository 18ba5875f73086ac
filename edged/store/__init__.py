"""The device's memory: samples with their images, the outbox, counters and update state, in one folder.

`state_dir` holds `edged.db` (SQLite, WAL, synchronous=FULL) and `blobs/ab/<sha256>`. Time is an argument everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from edged.store.agents import Conversations, Runs
from edged.store.blobs import Blobs
from edged.store.database import Check, Database
from edged.store.records import (
    AgentRun,
    Announce,
    BrokenStore,
    DeadLetter,
    Evicted,
    KnownBad,
    LanguageRequest,
    Moved,
    NewSample,
    OutboxFull,
    OutboxMessage,
    OutboxRow,
    Recovered,
    Ruling,
    Sample,
    Storage,
    StorageFull,
    StoreError,
    StoreLimits,
    SweepReport,
    Verified,
)
from edged.store.retention import Retention

__all__ = [
    "AgentRun",
    "Announce",
    "BrokenStore",
    "Conversations",
    "DeadLetter",
    "Evicted",
    "KnownBad",
    "LanguageRequest",
    "Moved",
    "NewSample",
    "OutboxFull",
    "OutboxMessage",
    "OutboxRow",
    "Recovered",
    "Ruling",
    "Runs",
    "Sample",
    "Storage",
    "StorageFull",
    "Store",
    "StoreError",
    "StoreLimits",
    "SweepReport",
    "Verified",
]

WALL = "wall"  # key of the wall time when this was looked at last


class Store(Retention):
    """Everything a device remembers; safe to use from any thread. Raises BrokenStore when the file is damaged."""

    def __init__(self, folder: Path, limits: StoreLimits | None = None, check: Check | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(Database(folder / "edged.db", check), Blobs(folder / "blobs"), limits or StoreLimits())
        self.folder, self.conversations = folder, Conversations(self._db)
        self.runs = Runs(self._db, self._limits)
        self._mark: Callable[[bool], None] = lambda _damaged: None

    def marks_with(self, mark: Callable[[bool], None]) -> None:
        """Call `mark` when the store is closed in order, with whether damage was met since it was opened."""
        self._mark = mark

    def suspect(self) -> None:
        """Damage was met: whatever comes now, the next start looks at everything."""
        self._mark(True)

    @property
    def broken(self) -> str:
        """The damage that was met since the store was opened, or empty."""
        return self._db.broken

    def recover(self, file: Path, now: float) -> Recovered:
        """Take over what can be read of a database that was set aside; nothing else may use the store meanwhile."""
        from edged.store import recover

        return recover.recover(file, self._db, self._blobs, self._limits, now)

    def verify(self) -> Verified:
        """Read every page and every blob. Raises BrokenStore when the database is damaged."""
        from edged.files import sha256_of

        self._db.verify("full")
        rows = self._db.read("SELECT sha256, bytes FROM blob ORDER BY sha256")
        bad = []
        for row in rows:
            path = self._blobs.path(row["sha256"])
            if not path.is_file() or sha256_of(path) != row["sha256"]:
                bad.append(row["sha256"])
        return Verified(sum(self.counts().values()), len(rows), bad)

    def last_wall(self) -> float | None:
        """The wall time that was kept last; None before the first."""
        kept = self.value(WALL)
        return None if kept is None else float(kept)

    def keep_wall(self, now: float) -> None:
        """Keep the wall time, as far as nothing newer is lost with it."""
        self.set_value(WALL, now, durable=False)

    def clock_stepped(self, by_s: float, now: float, within_s: float) -> None:
        """The wall clock was set by `by_s`, at most `within_s` ago, and shows `now`: messages and questions keep the time
        that they had left. What was put in since then has its time by the new clock already. In one transaction with the
        time, so that a crash does it once."""
        fresh = (now - within_s, now + within_s)
        with self._db.write() as tables:
            tables.execute(
                "UPDATE outbox SET expires = expires + ?, enqueued = enqueued + ? WHERE enqueued NOT BETWEEN ? AND ?",
                (by_s, by_s, *fresh),
            )
            tables.execute("UPDATE outbox SET due = ? WHERE due > ?", (now, now))
            tables.execute(
                "UPDATE sample SET label_by = label_by + ?, answer_by = answer_by + ?"
                " WHERE state = 'escalated' AND captured NOT BETWEEN ? AND ?",
                (by_s, by_s, *fresh),
            )
            tables.execute(
                "INSERT INTO value VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET json = excluded.json",
                (WALL, json.dumps(now)),
            )

    def close(self) -> None:
        """Keep the counters and close the file."""
        try:
            self.flush_counters()
        finally:
            self._db.close()
            self._mark(bool(self._db.broken))
