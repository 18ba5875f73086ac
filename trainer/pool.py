"""The local pool: pixels and texts with everything that was said about them, whoever said it.

    DATA_DIR/pool/objects/SHA256   the bytes, written whole and durable, named by their hash, checked at every read
    table `pool`                   one row an opinion: what, who says so, how sure, where it came from

The index is in the trainer's database and not in a file of lines: a review or a pull changes it beside an import, the
filters are queries, and there is one file to back up. Laws: objects come before the rows that name them, so that a kill
leaves a file too many and never a row too few; a row's id follows from what it says, so that the same said twice is one
row; no opinion is ever changed or removed by another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from sqlalchemy import Connection, insert, select, update

from trainer.core.labels import Row, Task, canonical, choose, names
from trainer.database import Database
from trainer.database import pool as table
from trainer.files import write_whole

OBJECTS = "objects"
BATCH_MAX = 256  # records that are added with one commit: `trainer serve` writes beside us and must not wait for long
_HASHES_A_QUERY = 500  # SQLite limits the variables of a statement

Kind = Literal["person", "model"]
Verdict = Literal["labelled", "rejected"]


class PoolError(ValueError):
    """The pool cannot give or take something; the message names the record or file and the fix."""


@dataclass(frozen=True, slots=True)
class Record:
    """What somebody said about pixels (or a prompt's bytes) of this `sha256`; `label` as in `core.labels`.

    `verdict` `rejected`: this label is wrong for these pixels. `captured` in seconds since the epoch, 0: not known;
    `said`: when it was said last, set by the pool.
    """

    sha256: str
    model: str
    task: Task
    label: tuple[Row, ...]
    kind: Kind
    who: str
    release: str = ""
    confidence: float = 1.0
    device: str = ""
    captured: float = 0.0
    origin: str = ""
    verdict: Verdict = "labelled"
    said: float = 0.0

    @property
    def id(self) -> str:
        """The same for the same statement: who says what (to `core.labels.GRAIN_PX`) about which pixels, how surely."""
        said = [
            self.sha256, self.model, self.task, self.verdict, canonical(self.label), self.kind, self.who, self.release,
            f"{self.confidence:.6f}",
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]

    def provenance(self) -> dict[str, Any]:
        """Who says so, as training manifests and labelled folders carry it."""
        return {
            "kind": self.kind, "who": self.who, "release": self.release, "confidence": self.confidence,
            "device": self.device, "captured": self.captured, "origin": self.origin, "record": self.id,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records are meant; what is empty or None does not narrow. `label`: only labels that name this class."""

    model: str = ""
    task: str = ""
    device: str = ""
    label: str = ""
    kind: str = ""
    verdict: str = "labelled"
    confidence_min: float = 0.0
    confidence_max: float = 1.0
    ids: frozenset[str] | None = None
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Chosen:
    """One record an image, whose label counts (`core.labels.choose`), and why other images have none, counted."""

    records: list[Record]
    left_out: dict[str, int]


class Pool:
    """The pool in `folder`, indexed in `database`; several processes may use it at once."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self.objects = folder / OBJECTS

    def add(self, items: Sequence[tuple[Record, bytes | None]], now: float, *, renew: bool = False) -> list[bool]:
        """Keep records with their bytes (None: they are here already); for each whether it is new.

        One commit, after the bytes are durable. `renew`: what is known already counts as said now (a person's review).
        Raises PoolError when bytes are not what their hash says or are not here, OSError when they cannot be written.
        """
        for record, data in items:
            if data is not None:
                self._keep(record.sha256, data)
            elif not self.path(record.sha256).is_file():
                raise PoolError(f"record {record.id}: object {record.sha256} is not in {self.objects}: import it again")
        with self._database.write() as connection:
            return [self._note(connection, record, now, renew) for record, _ in items]

    def _keep(self, sha256: str, data: bytes) -> None:
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise PoolError(f"{len(data)} bytes have SHA-256 {found}, expected {sha256}: they are another sample's")
        path = self.path(sha256)
        if not path.is_file() or path.stat().st_size != len(data) or path.read_bytes() != data:
            write_whole(path, data)

    def _note(self, connection: Connection, record: Record, now: float, renew: bool) -> bool:
        key = record.id
        if connection.execute(select(table.c.id).where(table.c.id == key)).first() is not None:
            if renew:
                connection.execute(update(table).where(table.c.id == key).values(said=now))
            return False
        values = {
            name: getattr(record, name)
            for name in (
                "sha256", "model", "task", "verdict", "kind", "who", "release", "confidence", "device", "captured",
                "origin",
            )
        }  # fmt: skip
        size = self.path(record.sha256).stat().st_size
        row = {"id": key, **values, "label": list(record.label), "bytes": size, "added": now, "said": now}
        connection.execute(insert(table).values(**row))
        return True

    def path(self, sha256: str) -> Path:
        """Where the bytes of this hash lie, or would."""
        return self.objects / sha256

    def read(self, sha256: str) -> bytes:
        """The bytes of this hash; raises PoolError when they are not here, or not those any more."""
        path = self.path(sha256)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PoolError(f"{path}: {error.strerror}; import or pull the sample again") from None
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise PoolError(
                f"{path} has SHA-256 {found}: the file was changed or is damaged; "
                "remove it, and import or pull the sample again"
            )
        return data

    def records(self, wanted: Wanted = Wanted()) -> list[Record]:
        """Everything that was said, by time of capture, then by id."""
        query = select(table).order_by(table.c.captured, table.c.sha256, table.c.id)
        for name in ("model", "task", "device", "kind", "verdict", "sha256"):
            if value := getattr(wanted, name):
                query = query.where(table.c[name] == value)
        query = query.where(table.c.confidence.between(wanted.confidence_min, wanted.confidence_max))
        with self._database.read() as connection:
            found = [record_of(row) for row in connection.execute(query)]
        if wanted.label:
            found = [record for record in found if wanted.label in names(record.label)]
        return found if wanted.ids is None else [record for record in found if record.id in wanted.ids]

    def opinions(self, records: Iterable[Record]) -> dict[tuple[str, str, str], list[Record]]:
        """(sha256, model, task) of these records -> everything that was said of them, rejections too."""
        keys = dict.fromkeys((record.sha256, record.model, record.task) for record in records)
        found: dict[tuple[str, str, str], list[Record]] = {key: [] for key in keys}
        digests = list(dict.fromkeys(key[0] for key in keys))
        with self._database.read() as connection:
            for start in range(0, len(digests), _HASHES_A_QUERY):
                part = digests[start : start + _HASHES_A_QUERY]
                for row in connection.execute(select(table).where(table.c.sha256.in_(part)).order_by(table.c.id)):
                    key = (row.sha256, row.model, row.task)
                    if key in found:
                        found[key].append(record_of(row))
        return found

    def labelled(self, wanted: Wanted, *, confidence_floor: float = 0.0) -> Chosen:
        """The one label that counts of each image (or text) about which a wanted record says something.

        An image whose label turns out to be another than the wanted ones (a person has corrected it since) is left out as
        `not_wanted`.
        """
        narrowed = self.records(wanted)
        asked = {record.id for record in narrowed}
        records: list[Record] = []
        left_out: dict[str, int] = {}
        for (_sha256, model, _task), opinions in self.opinions(narrowed).items():
            index, reason = choose(opinions, model, confidence_floor)
            if index is not None and opinions[index].id not in asked:
                index, reason = None, "not_wanted"
            if index is None:
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                records.append(opinions[index])
        return Chosen(records, left_out)

    def verify(self) -> Iterator[PoolError]:
        """What is wrong with the objects that rows name: missing, or other bytes than their name says."""
        with self._database.read() as connection:
            digests = list(connection.execute(select(table.c.sha256).distinct().order_by(table.c.sha256)).scalars())
        for digest in digests:
            try:
                self.read(digest)
            except PoolError as error:
                yield error


def said_by(record: Record, who: str, *, verdict: Verdict = "labelled", label: Sequence[Row] | None = None) -> Record:
    """A person's word about a record: this label is right (or, with `label`, this one is), or it is wrong (`rejected`)."""
    return replace(
        record, kind="person", who=who, release="", confidence=1.0, verdict=verdict,
        label=record.label if label is None else tuple(label), origin=f"review of {record.id}",
    )  # fmt: skip


def record_of(row: Any) -> Record:
    """A row of the table `pool` as a record."""
    return Record(
        row.sha256, row.model, cast(Task, row.task), tuple(row.label), row.kind, row.who, row.release, row.confidence,
        row.device, row.captured, row.origin, row.verdict, row.said,
    )  # fmt: skip
