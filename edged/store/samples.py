"""The samples of the store: captured, labelled, claimed, used; what is swept at start."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from edged.store.blobs import Blobs
from edged.store.database import Database, Row
from edged.store.outbox import Outbox, insert_message
from edged.store.records import (
    CORRECTIONS,
    IMPROVEMENTS,
    MOVES,
    VERDICTS,
    Announce,
    Json,
    Moved,
    NewSample,
    OutboxFull,
    OutboxMessage,
    Ruling,
    Sample,
    Status,
    StorageFull,
    StoreError,
    StoreLimits,
    SweepReport,
)
from edged.store.schema import rank

if TYPE_CHECKING:
    from sqlite_utils import Database as Tables

log = logging.getLogger(__name__)

_NEW = tuple(field.name for field in fields(NewSample))
_RANK = ("classes", "worth")  # what the order of giving up needs, see schema.rank
_INSERT = "INSERT INTO sample ({}) VALUES ({}) ON CONFLICT (id) DO NOTHING".format(
    ", ".join(f'"{name}"' for name in _NEW + _RANK), ", ".join("?" for _ in _NEW + _RANK)
)

# Of a sample about to be kept: whether it is, whether its image is, and how many bytes of images are.
_STANDING = (
    "SELECT EXISTS (SELECT 1 FROM sample WHERE id = ?), EXISTS (SELECT 1 FROM blob WHERE sha256 = ?),"
    " (SELECT bytes FROM total WHERE name = 'blob')"
)


def _sample(row: Row, changed: bool = False) -> Sample:
    values = dict(row)
    for name in _RANK:
        del values[name]
    for name in ("prediction", "label", "provenance", "opinions", "evidence"):
        values[name] = json.loads(values[name]) if values[name] is not None else None
    return Sample(**values, changed=changed)


def _find(tables: Tables, sample_id: str) -> Row | None:
    row: Row | None = tables.execute("SELECT * FROM sample WHERE id = ?", (sample_id,)).fetchone()
    return row


def _table(row: Row, provenance: Json, opinions: Sequence[Json]) -> Mapping[tuple[str, str], str]:
    """What a verdict of this origin may do to the sample in `row`."""
    if provenance.get("kind") == "person":
        return CORRECTIONS
    by_model = json.loads(row["provenance"] or "{}").get("kind") == "model"
    return IMPROVEMENTS if by_model and len(opinions) > len(json.loads(row["opinions"])) else VERDICTS


class Samples(Outbox):
    """Samples and their images. A state moves only along the tables in `records`."""

    def __init__(self, db: Database, blobs: Blobs, limits: StoreLimits) -> None:
        super().__init__(db, limits)
        self._blobs = blobs

    def capture(self, sample: NewSample, image: bytes, escalation: OutboxMessage | None = None) -> None:
        """Keep a sample with its image and, in the same transaction, the message that escalates it.

        When this returns, a power cut loses none of them. The same id again changes nothing. Raises StorageFull or
        OutboxFull, and then nothing was kept; ValueError when `image` is not what `sha256` and `bytes` say.
        """
        if len(image) != sample.bytes or hashlib.sha256(image).hexdigest() != sample.sha256:
            raise ValueError(f"sample {sample.id}: the image's {len(image)} bytes are not sha256 {sample.sha256}")
        try:
            with self._blobs.hold(sample.sha256):
                kept, has_blob, bytes_used = self._db.read(_STANDING, (sample.id, sample.sha256))[0]
                if kept:
                    return
                # By the row, not by the file: a file without a row may not be on the disk yet.
                if not has_blob or not self._blobs.path(sample.sha256).exists():
                    self._check_room(bytes_used, sample)
                    self._blobs.write(sample.sha256, image)
                self._insert(sample, escalation)
        except BaseException:
            with suppress(
                StoreError, OSError
            ):  # what stays is swept at the next start; the first error is the one to tell
                self._blobs.remove(sample.sha256, self._has_blob)
            raise

    def _has_blob(self, sha256: str) -> bool:
        return bool(self._db.read("SELECT 1 FROM blob WHERE sha256 = ?", (sha256,)))

    def _check_room(self, bytes_used: int, sample: NewSample) -> None:
        if bytes_used + sample.bytes > self._limits.blob_bytes_max:
            raise StorageFull(
                f"sample {sample.id}: {bytes_used} bytes of images are kept, {sample.bytes} more pass "
                f"blob_bytes_max={self._limits.blob_bytes_max}; evict samples or raise the limit"
            )

    def _insert(self, sample: NewSample, escalation: OutboxMessage | None) -> None:
        values = [getattr(sample, name) for name in _NEW]
        for name in ("prediction", "evidence"):
            values[_NEW.index(name)] = json.dumps(getattr(sample, name))
        values += rank(sample.state, sample.decision, sample.prediction, [])
        with self._db.write() as tables:
            if not tables.execute(_INSERT, values).rowcount:
                return
            bytes_used = tables.execute("SELECT bytes FROM total WHERE name = 'blob'").fetchone()[0]
            blob = (sample.sha256, sample.bytes)
            if tables.execute("INSERT INTO blob VALUES (?, ?) ON CONFLICT (sha256) DO NOTHING", blob).rowcount:
                self._check_room(bytes_used, sample)
            if escalation is not None:
                insert_message(tables, self._limits, escalation, sample.captured)

    def label(
        self,
        sample_id: str,
        status: Status,
        label: list[Json],
        confidence: float,
        provenance: Json,
        reason: str,
        now: float,
        announce: Announce | None = None,
        opinions: Sequence[Json] = (),
    ) -> Sample | None:
        """Apply a verdict; None when the sample is unknown. A repeated or late one that moves nothing: `changed` False.

        In one transaction the sample moves, its escalation leaves the outbox, and `announce` (made from the moved
        sample) enters it. A full outbox costs the announcement, never the label.
        """
        ruling = Ruling(sample_id, status, label, confidence, provenance, reason, opinions)
        return self.label_many([ruling], now, announce)[0]

    def label_many(
        self, rulings: Iterable[Ruling], now: float, announce: Announce | None = None
    ) -> list[Sample | None]:
        """The same for several verdicts, in their order, in one transaction: all of them, or the error and none."""
        with self._db.write() as tables:
            return [self._label(tables, ruling, now, announce) for ruling in rulings]

    def _label(self, tables: Tables, ruling: Ruling, now: float, announce: Announce | None) -> Sample | None:
        row = _find(tables, ruling.sample)
        if row is None:
            return None
        tables.execute("DELETE FROM outbox WHERE sample = ? AND keep = 'verdict'", (ruling.sample,))
        state = _table(row, ruling.provenance, ruling.opinions).get((row["state"], ruling.status))
        verdict = (json.dumps(ruling.label), json.dumps(ruling.provenance), ruling.confidence, ruling.reason)
        known = (row["label"], row["provenance"], row["label_confidence"], row["label_reason"])
        if state is None or (state == row["state"] and verdict == known):
            return _sample(row)
        opinions = json.dumps(list(ruling.opinions)) if ruling.opinions else row["opinions"]
        ranked = rank(state, row["decision"], json.loads(row["prediction"]), ruling.label)
        moved = tables.execute(
            "UPDATE sample SET state = ?, label = ?, provenance = ?, label_confidence = ?, label_reason = ?,"
            " classes = ?, worth = ?, labelled = ?, opinions = ? WHERE id = ? RETURNING *",
            (state, *verdict, *ranked, now, opinions, ruling.sample),
        ).fetchone()
        return self._moved(tables, moved, announce, now)

    def _moved(self, tables: Tables, row: Row, announce: Announce | None, now: float) -> Sample:
        """The sample in `row`, which has just been updated in this transaction; `announce` says so."""
        sample = _sample(row, changed=True)
        if announce is not None:
            try:
                message = announce(sample) if callable(announce) else announce
                insert_message(tables, self._limits, message, now)
            except OutboxFull as error:
                log.warning("sample %s: no catalogue entry: %s", sample.id, error)
                self.count("catalogue_dropped")
        return sample

    def expire(self, now: float, announce: Callable[[Sample], OutboxMessage] | None = None) -> list[Sample]:
        """Escalated samples past their `label_by` become unresolved and leave the outbox; those that did."""
        late = "state = 'escalated' AND label_by <= ?"
        if not self._db.read(f"SELECT 1 FROM sample WHERE {late} LIMIT 1", (now,)):
            return []
        with self._db.write() as tables:
            moved = (
                f"UPDATE sample SET state = 'unresolved', label_reason = 'no verdict in time' WHERE {late} RETURNING *"
            )
            rows = tables.execute(moved, (now,)).fetchall()
            values = [(row["id"],) for row in rows]
            tables.conn.executemany("DELETE FROM outbox WHERE sample = ? AND keep = 'verdict'", values)
            return [self._moved(tables, row, announce, now) for row in rows]

    def task(self, sample_id: str) -> str | None:
        """The task of a sample; None when it is unknown."""
        rows = self._db.read("SELECT task FROM sample WHERE id = ?", (sample_id,))
        return rows[0]["task"] if rows else None

    def sample(self, sample_id: str) -> Sample | None:
        """One sample; None when it is unknown."""
        rows = self._db.read("SELECT * FROM sample WHERE id = ?", (sample_id,))
        return _sample(rows[0]) if rows else None

    def samples(
        self, state: str | None = None, limit: int = 100, offset: int = 0, after: tuple[float, str] = (-math.inf, "")
    ) -> list[Sample]:
        """Samples in this state (None: in any), oldest first; `after` the (captured, id) of the last one of a page, the
        next page, however many were added or deleted in between."""
        where, values = ("state = ? AND ", [state]) if state is not None else ("", [])
        sql = f"SELECT * FROM sample WHERE {where}(captured, id) > (?, ?) ORDER BY captured, id LIMIT ? OFFSET ?"
        return list(self._whole(self._db.read(sql, [*values, *after, limit, offset])))

    def _whole(self, rows: Iterable[Row]) -> Iterator[Sample]:
        """One damaged row, which no check of SQLite's finds, does not hide the others."""
        for row in rows:
            try:
                yield _sample(row)
            except ValueError as error:
                self.count("samples_unreadable")
                log.error("sample %s: its row is damaged: %s", row["id"], error)

    def counts(self) -> dict[str, int]:
        """state -> number of samples."""
        return {row[0]: row[1] for row in self._db.read("SELECT state, count(*) FROM sample GROUP BY state")}

    def claim(self, ids: Iterable[str], job: str) -> Moved:
        """labelled -> claimed by this job; what it has already claimed counts as done."""
        return self._move("claim", ids, "job", job, job)

    def used(self, ids: Iterable[str], release: str) -> Moved:
        """claimed -> used: they trained this release."""
        return self._move("used", ids, "used_by", release, release)

    def unclaim(self, ids: Iterable[str], job: str) -> Moved:
        """claimed by this job -> labelled again: the training failed."""
        return self._move("unclaim", ids, "job", job, "")

    def archive(self, ids: Iterable[str]) -> Moved:
        """used -> archived."""
        return self._move("archive", ids, None, "", "")

    def _move(self, name: str, ids: Iterable[str], column: str | None, owner: str, value: str) -> Moved:
        """Move samples along one row of MOVES; `owner` must match `column` wherever the sample already has one."""
        source, target = MOVES[name]
        moved = Moved([])
        with self._db.write() as tables:
            for sample_id in dict.fromkeys(ids):
                row = _find(tables, sample_id)
                if row is None:
                    moved.unknown.append(sample_id)
                    continue
                held = row[column] if column else ""
                if row["state"] == target and held in (value, owner):
                    moved.samples.append(_sample(row))
                elif row["state"] == source and held in ("", owner):
                    sets = {"state": target, column: value} if column else {"state": target}
                    sql = f"UPDATE sample SET {', '.join(f'{name} = ?' for name in sets)} WHERE id = ? RETURNING *"
                    row = tables.execute(sql, (*sets.values(), sample_id)).fetchone()
                    moved.samples.append(_sample(row, changed=True))
                else:
                    moved.refused[sample_id] = f"{row['state']} ({held})" if held else row["state"]
        return moved

    def blob(self, sha256: str) -> Path | None:
        """The file of an image that a sample refers to; None when there is none."""
        path = self._blobs.path(sha256)
        return path if self._has_blob(sha256) and path.exists() else None

    def blob_bytes(self) -> int:
        """Bytes of images kept."""
        used: int = self._db.read("SELECT bytes FROM total WHERE name = 'blob'")[0]["bytes"]
        return used

    def sweep(self, aside: Path | None = None) -> SweepReport:
        """Repair what a crash left: call it at start, in the daemon only, before anything is captured. Blobs without a row
        are removed, or moved to the folder `aside`."""
        temporary = self._blobs.remove_temporary()
        sizes = self._blobs.sizes()
        known = {row["sha256"]: row["bytes"] for row in self._db.read("SELECT sha256, bytes FROM blob")}
        unknown = sizes.keys() - known.keys()
        if aside is not None:
            orphans = sum(self._blobs.move(sha256, aside) for sha256 in unknown)
        else:
            orphans = sum(self._blobs.remove(sha256, self._has_blob) for sha256 in unknown)
        lost = [sha256 for sha256, size in known.items() if sizes.get(sha256) != size]
        missing: list[str] = []
        if lost:
            with self._db.write() as tables:
                for sha256 in lost:
                    rows = tables.execute(
                        "UPDATE sample SET state = 'rejected', label_reason = 'blob missing' WHERE sha256 = ?"
                        " AND state NOT IN ('used', 'archived', 'rejected') RETURNING id",
                        (sha256,),
                    )
                    missing += [row["id"] for row in rows.fetchall()]
                    tables.execute("DELETE FROM blob WHERE sha256 = ?", (sha256,))
                values = [(sample_id,) for sample_id in missing]
                tables.conn.executemany("DELETE FROM outbox WHERE sample = ? AND keep = 'verdict'", values)
        for sha256 in lost:  # cut short by a broken disk: of no use to anybody
            self._blobs.remove(sha256, self._has_blob)
        self.count("sweep_temporary", temporary)
        self.count("sweep_orphans", orphans)
        self.count("sweep_missing", len(missing))
        return SweepReport(temporary, orphans, missing)
