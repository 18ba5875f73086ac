"""What the store gives up when it is full, too old or too much of one kind, and what it says when nothing is left.

Law of this file: only states in EVICTABLE are ever deleted, in that order, and one call deletes a bounded number, so that
no capture waits long for the write lock. Rows go first, then their blobs: a crash in between leaves orphans, which the next
start sweeps.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from edged.core.retention import Candidate, ClockPace, choose, excess, keep_pace, shortage, steady, too_old
from edged.store.blobs import Blobs
from edged.store.database import Database
from edged.store.records import EVICTABLE, Evicted, NewSample, Storage, StorageFull, StoreError, StoreLimits
from edged.store.samples import Samples

log = logging.getLogger(__name__)

EVICT_MAX = 64  # samples that one call of `evict` gives up
EVICT_MAX_SCARCE = 8  # the same when the disk has no room for a longer log of it
TEND_MAX = 256  # samples that one pass of `tend` gives up for one reason
TEND_S = 60.0  # between two passes, while there is nothing left over from the last
FULL_S = 1.0  # between two looks whether there is room again
RESUME_BYTES_MAX = 16 << 20  # capturing counts as possible again from this much room on, or from
RESUME_SHARE = 0.01  # this share of `blob_bytes_max`, and of the disk, whichever is less
RESERVE_BYTES = 1 << 20
# What a sample takes of the file system for each byte of its pixels, at most: the blob, and its question in the outbox, in
# base64, once in the database's log and once in the database.
DISK_FACTOR = 4

_STATES = ", ".join(f"'{state}'" for state in EVICTABLE)
# A sample whose pixels a sample that is not evictable also needs would free nothing.
_CANDIDATES = f"""
SELECT id, sha256, bytes, (SELECT count(*) FROM sample AS o WHERE o.sha256 = s.sha256) AS shared FROM sample AS s
WHERE state = ? AND NOT EXISTS (SELECT 1 FROM sample AS o WHERE o.sha256 = s.sha256 AND o.state NOT IN ({_STATES}))
ORDER BY worth, captured, rowid LIMIT ?
"""


class Reserve:
    """A file that holds some room on the disk. Deleting rows needs a little, and on a disk that somebody else has filled
    there would be none: then this file goes first."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def take(self) -> None:
        """Hold the room, as far as there is some."""
        if self._path.exists():
            return
        try:
            with self._path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError as error:
            log.warning("%s: %s: nothing is held back for a full disk", self._path, error.strerror)
            self.give()

    def give(self) -> bool:
        """Make the room free; false when it already was."""
        with suppress(OSError):
            self._path.unlink()
            return True
        return False


class Retention(Samples):
    """Samples that end somewhere."""

    def __init__(self, db: Database, blobs: Blobs, limits: StoreLimits) -> None:
        super().__init__(db, blobs, limits)
        self._full = ""
        self._bytes = 0
        self._refused = 0  # bytes of the largest sample that there was no room for, since it is full
        self._due = 0.0  # by the monotonic clock: when `tend` looks next
        self._pace: ClockPace | None = None
        self._reserve: Reserve | None = None  # the daemon's alone, see `hold_reserve`

    @property
    def full(self) -> str:
        """Why nothing more can be captured and nothing more be given up, or empty."""
        return self._full

    def blob_bytes(self) -> int:
        """Bytes of images kept; as they were last, where a damaged database no longer tells."""
        try:
            self._bytes = super().blob_bytes()
        except StoreError as error:
            log.debug("%s", error)
        return self._bytes

    def storage(self) -> Storage:
        """How full it is."""
        limits = self._limits
        return Storage(
            self.blob_bytes(), limits.blob_bytes_max, self._free(), limits.free_bytes_min, self._full, self._db.broken
        )

    def hold_reserve(self, path: Path) -> None:
        """Keep some room on the disk for deleting when it is full. In the daemon only: one process, one file."""
        self._reserve = Reserve(path)
        self._reserve.take()

    def evict(self, bytes_wanted: int) -> Evicted:
        """Give up samples, in the order of EVICTABLE, what is worth least first and of equals the oldest, until that many
        bytes fit; at most EVICT_MAX samples. With nothing left to give up, `full` says so. Raises StorageFull when the
        disk is too full even to delete."""
        target = max(bytes_wanted, self._shortage(bytes_wanted, DISK_FACTOR * bytes_wanted))
        try:
            done, more = self._evict(target, EVICT_MAX)
        except StorageFull as error:
            if self._reserve is None or not self._reserve.give():
                self._note_full(str(error), bytes_wanted)
                raise
            done, more = self._evict(target, EVICT_MAX_SCARCE)
        if done.bytes < target and not more:
            self._note_full(f"{self._fill()}; nothing is left that may be given up", bytes_wanted)
        return done

    def _evict(self, bytes_wanted: int, samples_max: int) -> tuple[Evicted, bool]:
        """What was given up, and whether there is more."""
        chosen, _ = choose(self._candidates(samples_max), bytes_wanted)
        return self._give_up([candidate.id for candidate in chosen]), len(chosen) == samples_max

    def _candidates(self, samples_max: int) -> Iterable[Candidate]:
        left = samples_max
        for state in EVICTABLE:
            rows = self._db.read(_CANDIDATES, (state, left)) if left else ()
            for row in rows:
                yield Candidate(row["id"], row["sha256"], row["bytes"], row["shared"])
            left -= len(rows)

    def _give_up(self, ids: Sequence[str]) -> Evicted:
        """Delete these samples, unless somebody has just moved them to a state in which they must stay."""
        if not ids:
            return Evicted(0, 0)
        gone: list[str] = []
        samples = freed = 0
        with self._db.write() as tables:
            for sample_id in ids:
                row = tables.execute(
                    f"DELETE FROM sample WHERE id = ? AND state IN ({_STATES}) RETURNING sha256, bytes", (sample_id,)
                ).fetchone()
                if row is None:
                    continue
                samples += 1
                if not tables.execute("SELECT 1 FROM sample WHERE sha256 = ?", (row["sha256"],)).fetchone():
                    tables.execute("DELETE FROM blob WHERE sha256 = ?", (row["sha256"],))
                    gone.append(row["sha256"])
                    freed += row["bytes"]
        for sha256 in gone:
            try:
                self._blobs.remove(sha256, self._has_blob)
            except OSError as error:  # swept at the next start
                self.count("blobs_not_removed")
                log.error("blob %s: %s", sha256, error)
        self.count("samples_evicted", samples)
        return Evicted(samples, freed)

    def tend(self, now: float, monotonic: float) -> None:
        """Apply the limits of age and class, make room where the disk ran short, and find out whether a full store has room
        again. Call it on every tick: it looks once in TEND_S, gives up at most TEND_MAX samples a reason, and goes on at
        the next tick where more is due."""
        self._pace = keep_pace(self._pace, now, monotonic)
        if monotonic < self._due:
            return
        behind = self._tend_age(now, monotonic) | self._tend_classes() | self._tend_room()
        if self._reserve is not None and not self._full:
            self._reserve.take()
        self._due = monotonic + (0.0 if behind else FULL_S if self._full else TEND_S)

    def _tend_age(self, now: float, monotonic: float) -> bool:
        assert self._pace is not None
        before = too_old(self._limits.age_days, now)
        if not before or not steady(self._pace, monotonic):
            return False
        ids: list[str] = []
        for state in EVICTABLE:
            if state in before:
                sql = "SELECT id FROM sample WHERE state = ? AND captured < ? ORDER BY captured LIMIT ?"
                rows = self._db.read(sql, (state, before[state], TEND_MAX - len(ids)))
                ids += [row["id"] for row in rows]
        self.count("samples_too_old", self._give_up(ids).samples)
        return len(ids) == TEND_MAX

    def _tend_classes(self) -> bool:
        if not self._limits.class_max:
            return False
        sql = f"SELECT classes, count(*) AS n FROM sample WHERE state IN ({_STATES}) GROUP BY classes"
        counts = {row["classes"]: row["n"] for row in self._db.read(sql)}
        ids: list[str] = []
        sql = "SELECT id FROM sample WHERE state = ? AND classes = ? ORDER BY worth, captured, rowid LIMIT ?"
        for about, n in excess(counts, self._limits.class_max).items():
            left = min(n, TEND_MAX - len(ids))
            for state in EVICTABLE:
                rows = self._db.read(sql, (state, about, left)) if left else ()
                ids += [row["id"] for row in rows]
                left -= len(rows)
        self.count("samples_over_class_max", self._give_up(ids).samples)
        return len(ids) == TEND_MAX

    def _tend_room(self) -> bool:
        limits = self._limits
        if self._full:  # a little more than the next sample takes, so that it is not full again with that one
            kept = max(self._refused, min(int(limits.blob_bytes_max * RESUME_SHARE), RESUME_BYTES_MAX))
            disk = max(DISK_FACTOR * self._refused, min(int(self._disk()[1] * RESUME_SHARE), RESUME_BYTES_MAX))
            short = self._shortage(min(kept, limits.blob_bytes_max), disk)
        else:
            short = self._shortage(0, 0)
        done, more = self._evict(short, TEND_MAX) if short else (Evicted(0, 0), False)
        if done.bytes >= short:
            self._full, self._refused = "", 0
            return False
        if not more and self._free() < limits.free_bytes_min:
            self._note_full(f"{self._fill()}; nothing is left that may be given up", 0)
        return more

    def _note_full(self, why: str, refused: int) -> None:
        self._refused = max(self._refused, refused)
        self._full = self._full or why
        self._due = 0.0

    def _shortage(self, kept: int, disk: int) -> int:
        """Bytes to free before so many more fit under the limit of the blobs, and onto the disk."""
        limits = self._limits
        return max(
            shortage(kept, self.blob_bytes(), limits.blob_bytes_max),
            shortage(disk, limits.free_bytes_min, self._free()),
        )

    def _fill(self) -> str:
        limits = self._limits
        return (
            f"{self.blob_bytes()} bytes of samples are kept (blob_bytes_max={limits.blob_bytes_max}), "
            f"{self._free()} bytes are free on the disk (free_bytes_min={limits.free_bytes_min})"
        )

    def _free(self) -> int:
        return self._disk()[0]

    def _disk(self) -> tuple[int, int]:
        """Bytes of the file system that this user may still write, and all there are."""
        try:
            told = os.statvfs(self._blobs.folder)
        except OSError as error:
            raise StoreError(f"{self._blobs.folder}: {error.strerror}") from error
        return told.f_bavail * told.f_frsize, told.f_blocks * told.f_frsize

    def _check_room(self, bytes_used: int, sample: NewSample) -> None:
        super()._check_room(bytes_used, sample)
        if self._limits.free_bytes_min and self._free() - DISK_FACTOR * sample.bytes < self._limits.free_bytes_min:
            raise StorageFull(
                f"sample {sample.id}: {self._free()} bytes are free at {self._blobs.folder}, its {sample.bytes} could leave "
                f"less than free_bytes_min={self._limits.free_bytes_min}; free some or lower the limit"
            )
