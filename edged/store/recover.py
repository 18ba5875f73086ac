"""Takes over what can still be read of a database that was set aside: samples whose pixels are there, their questions, and
language requests.

Law of this file: the broken file is only read, a sample that the store has already is left as it is, and a blob leaves the
folder beside the broken file only after its row was committed. So it may be run again after whatever happened.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edged.core.update import State
from edged.files import sha256_of, sync
from edged.store.blobs import Blobs
from edged.store.database import Database
from edged.store.integrity import blobs_of, set_asides
from edged.store.outbox import insert_message
from edged.store.pages import Pages, Value
from edged.store.records import (
    EVICTABLE,
    Json,
    LanguageRequest,
    OutboxFull,
    OutboxMessage,
    Recovered,
    StoreLimits,
)
from edged.store.schema import rank

if TYPE_CHECKING:
    from sqlite_utils import Database as Tables

BATCH = 200  # samples of one transaction
LOST_IDS_MAX = 1000  # that a report names
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STATES = (*EVICTABLE, "escalated", "labelled", "claimed")
# The columns in the order in which the migrations added them; a row has as many as there were when it was written.
_SAMPLE = (
    "id", "pipeline", "task", "model", "release", "state", "reason", "decision", "confidence", "inclusion_probability",
    "sha256", "bytes", "prediction", "item", "captured", "answer_by", "label_by", "label", "label_confidence", "provenance",
    "label_reason", "labelled", "job", "used_by", "opinions", "evidence", "classes", "worth",
)  # fmt: skip
_SAMPLE_MIN = _SAMPLE.index("opinions")
_REALS = ("confidence", "inclusion_probability", "captured", "answer_by", "label_by", "label_confidence", "labelled")
_JSONS = ("prediction", "label", "opinions", "evidence")
_REQUEST = (
    "seq", "id", "pipeline", "release", "adapter", "prompt", "answer", "confidence", "outcome", "ts", "messages", "options",
    "reason", "finish_reason", "prompt_tokens", "answer_tokens", "latency_ms", "bytes",
)  # fmt: skip
_OUTCOMES = ("ok", "truncated", "cancelled", "deadline", "error")
_OUTBOX = ("seq", "id", "topic", "qos", "retain", "expires", "payload", "keep", "sample", "correlation")
_OUTBOX_COLUMNS = 15


class _Unreadable(Exception):
    """The row is one of a sample, but not whole."""


def recover(file: Path, db: Database, blobs: Blobs, limits: StoreLimits, now: float) -> Recovered:
    """Take over from `file`, and its -wal, into the store of `db` and `blobs`. Raises OSError when it cannot be read at
    all, StoreError when the store fails."""
    report = Recovered(str(file))
    folders = [blobs.folder, blobs_of(file), *(blobs_of(other) for other in set_asides(file.parent) if other != file)]
    samples: dict[str, Json] = {}
    questions: dict[str, OutboxMessage] = {}
    requests: dict[str, LanguageRequest] = {}
    with Pages(file) as pages:
        for values in pages.rows():
            try:
                if (sample := _sample(values)) is not None:
                    samples[sample["id"]] = sample
                elif (question := _question(values)) is not None:
                    questions[str(question.sample)] = question
                elif (request := _request(values)) is not None:
                    requests[request.id] = request
            except _Unreadable as error:
                _lose(report, str(values[0]), str(error))
        report.damaged = pages.damaged
    ids = sorted(samples, key=lambda key: (samples[key]["captured"], key))
    for first in range(0, len(ids), BATCH):
        _take_over(
            [samples[key] for key in ids[first : first + BATCH]], questions, folders, db, blobs, limits, now, report
        )
    _add_requests(requests.values(), db, limits, report)
    return report


def facts(file: Path) -> tuple[dict[str, Json], list[tuple[str, str, str, float]]]:
    """The state of each update, target -> record, and the releases that must not run, as `remember_bad` takes them."""
    updates: dict[str, Json] = {}
    bad: list[tuple[str, str, str, float]] = []
    states = {state.value for state in State}
    with Pages(file) as pages:
        for values in pages.rows():
            match values:
                case [str() as target, str() as text]:
                    with suppress(ValueError):
                        found = json.loads(text)
                        if isinstance(found, dict) and found.get("target") == target and found.get("state") in states:
                            updates[target] = found
                case [str() as sha256, str() as release, str() as reason, (int() | float()) as at]:
                    if _SHA256.fullmatch(sha256):
                        bad.append((release, sha256, reason, float(at)))
    return updates, bad


def _lose(report: Recovered, sample_id: str, reason: str) -> None:
    report.lost[reason] = report.lost.get(reason, 0) + 1
    if len(report.lost_ids) < LOST_IDS_MAX:
        report.lost_ids.append(sample_id)


def _sample(values: Sequence[Value]) -> Json | None:
    """The row of a sample; None when it is of another table."""
    if not _SAMPLE_MIN <= len(values) <= len(_SAMPLE) or values[5] not in _STATES:
        return None
    row = dict(zip(_SAMPLE, values, strict=False))
    if not isinstance(row["id"], str) or not _SHA256.fullmatch(str(row["sha256"])):
        return None
    try:
        for name in _REALS:  # a whole number is stored as an integer
            row[name] = None if row[name] is None else float(row[name])  # type: ignore[arg-type]
        for name in _JSONS:
            json.loads(row.setdefault(name, "{}" if name == "evidence" else "[]"))  # type: ignore[arg-type]
        json.loads(row["provenance"] or "null")  # type: ignore[arg-type]
        row["classes"], row["worth"] = rank(
            str(row["state"]), str(row["decision"]), json.loads(str(row["prediction"])), json.loads(str(row["label"]))
        )
    except (TypeError, ValueError):
        raise _Unreadable("its row is damaged") from None
    return row


def _question(values: Sequence[Value]) -> OutboxMessage | None:
    """What waits for the verdict on a sample; None when the row is something else."""
    if len(values) != _OUTBOX_COLUMNS or values[7] != "verdict" or not isinstance(values[8], str):
        return None
    row: dict[str, Any] = dict(zip(_OUTBOX, values, strict=False))
    del row["seq"]
    row["retain"] = bool(row["retain"])
    row["expires"] = None if row["expires"] is None else float(row["expires"])
    return OutboxMessage(**row)


def _request(values: Sequence[Value]) -> LanguageRequest | None:
    if not 10 <= len(values) <= len(_REQUEST) or values[8] not in _OUTCOMES or not isinstance(values[9], int | float):
        return None
    row: dict[str, Any] = dict(zip(_REQUEST, values, strict=False))
    names = {field.name for field in fields(LanguageRequest)}
    try:
        for name in ("messages", "options"):
            if name in row:
                row[name] = json.loads(row[name])
    except (TypeError, ValueError):
        return None
    return LanguageRequest(**{name: value for name, value in row.items() if name in names})


def _take_over(
    batch: list[Json], questions: dict[str, OutboxMessage], folders: list[Path], db: Database, blobs: Blobs,
    limits: StoreLimits, now: float, report: Recovered,
) -> None:  # fmt: skip
    """Put the samples of one batch into the store, as far as their pixels are there."""
    wanted: list[tuple[Json, Path | None]] = []
    changed: set[Path] = set()
    for row in batch:
        if db.read("SELECT 1 FROM sample WHERE id = ?", (row["id"],)):
            report.already += 1
            continue
        found = _blob(row, folders)
        if isinstance(found, str):
            _lose(report, row["id"], found)
            continue
        target = blobs.path(row["sha256"])
        if found != target:
            _copy(found, target)
            changed.add(target.parent)
        wanted.append((row, None if found == target else found))
    for folder in sorted(changed):
        sync(folder)
    if not wanted:
        return
    with db.write() as tables:
        for row, _ in wanted:
            _insert(tables, row, questions.get(row["id"]), limits, now)
    for row, source in wanted:
        report.samples += 1
        report.states[row["state"]] = report.states.get(row["state"], 0) + 1
        if source is not None:  # else evicting the sample later would free nothing
            source.unlink(missing_ok=True)


def _blob(row: Json, folders: Iterable[Path]) -> Path | str:
    """Where the sample's pixels are, or why it is lost."""
    why = "its pixels are gone"
    for folder in folders:
        path: Path = folder / row["sha256"][:2] / row["sha256"]
        if path.is_file():
            if path.stat().st_size == row["bytes"] and sha256_of(path) == row["sha256"]:
                return path
            why = "its pixels are damaged"
    return why


def _copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)  # what is there is not what its name says
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        beside = target.with_name(f"{target.name}.recovered.tmp")
        shutil.copyfile(source, beside)
        sync(beside)
        beside.replace(target)


def _insert(tables: Tables, row: Json, question: OutboxMessage | None, limits: StoreLimits, now: float) -> None:
    reason = ""
    if row["state"] == "escalated":
        try:
            if row["label_by"] is None or row["label_by"] <= now:
                reason = "no verdict in time"
            elif question is None:
                reason = "its question was lost with the database"
            else:
                insert_message(tables, limits, question, now)
        except OutboxFull:
            reason = "the outbox had no room for its question"
        if reason:
            row["state"], row["label_reason"] = "unresolved", reason
    names, marks = ", ".join(f'"{name}"' for name in _SAMPLE), ", ".join("?" * len(_SAMPLE))
    tables.execute(f"INSERT INTO sample ({names}) VALUES ({marks})", [row[name] for name in _SAMPLE])
    tables.execute("INSERT OR IGNORE INTO blob VALUES (?, ?)", (row["sha256"], row["bytes"]))


def _add_requests(
    requests: Iterable[LanguageRequest], db: Database, limits: StoreLimits, report: Recovered
) -> None:  # fmt: skip
    """Language requests that are not there yet, while there is room for them."""
    from edged.store.ledger import Ledger

    ledger = Ledger(db, limits)
    for request in sorted(requests, key=lambda each: each.ts):
        if db.read("SELECT 1 FROM request WHERE id = ?", (request.id,)):
            continue
        if db.read("SELECT n FROM total WHERE name = 'request'")[0]["n"] >= limits.requests_max:
            return
        ledger.record_request(request)
        report.requests += 1


def wanted(folder: Path, file: Path | None) -> Iterator[Path]:
    """The database to recover: `file`, or every one that was set aside in this folder, the newest first."""
    yield from [file] if file is not None else [path for path in set_asides(folder) if path.exists()]
