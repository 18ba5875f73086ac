"""Labels before a person's eyes, and what the person says taken back as a label of its own.

A review folder: `images/`, `review.csv` (a row a label; the person fills `verdict`: accept, correct after changing `label`,
or reject; an empty one is not judged yet), and for Label Studio `tasks.json` and `labels.xml`.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.core.labels import canonical, check, names
from trainer.formats.base import IMAGES, FormatError, Problem, put, read_json, size_of, suffix, whole_folder
from trainer.formats.labelstudio import Judged, configuration, judged
from trainer.formats.labelstudio import task as studio_task
from trainer.pool import Pool, PoolError, Record, Wanted, said_by

CSV, STUDIO_TASKS, STUDIO = "review.csv", "tasks.json", "labels.xml"
COLUMNS = ("id", "file", "task", "who", "confidence", "label", "verdict")
VERDICTS = ("accept", "correct", "reject")
IMAGE_URL = "/data/local-files/?d=images/"  # as Label Studio serves files beside it
CELL_CHARS_MAX = 16 << 20  # of a label in review.csv
FORMULAS = ("=", "+", "-", "@")


@dataclass(slots=True)
class Reviewed:
    """What a person said, counted, and what could not be taken."""

    accepted: int = 0
    corrected: int = 0
    rejected: int = 0
    open: int = 0  # not judged yet
    problems: list[Problem] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        named = [{"place": each.place, "reason": each.reason} for each in self.problems]
        counts = {name: getattr(self, name) for name in ("accepted", "corrected", "rejected", "open")}
        return {**counts, "problems": len(self.problems), "named": named}


def write_review(
    pool: Pool, wanted: Wanted, folder: Path, labels: Sequence[str] = (), *, limit: int, image_url: str = IMAGE_URL
) -> int:
    """Write the labels that count now into a new folder, the least sure first; how many. Raises FormatError, PoolError and
    OSError."""
    records = sorted(pool.labelled(wanted).records, key=lambda record: (record.confidence, record.id))[:limit]
    if not records:
        raise FormatError("the pool has no such label: import or pull some, or ask for others")
    tasks = sorted({record.task for record in records})
    if len(tasks) > 1:
        raise FormatError(f"{' and '.join(tasks)} cannot be reviewed in one folder: give --task")
    known = list(dict.fromkeys([*labels, *sorted({name for record in records for name in names(record.label)})]))
    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS)
    rows.writeheader()
    studio = []
    with whole_folder(folder) as beside:
        for record in records:
            data = pool.read(record.sha256)
            name = "" if record.task == "text" else f"{record.id}{suffix(data)}"
            shown = {"text": data.decode("utf-8", "replace")} if not name else {"image": image_url + name}
            if name:
                put(beside / IMAGES / name, data)
            size = (size_of(data) or (1, 1)) if name else (1, 1)
            label = json.dumps(list(record.label), ensure_ascii=False)
            values = (record.id, name or shown["text"], record.task, record.who, record.confidence, label, "")
            # A text that begins like a formula is one to a spreadsheet.
            safe = [f"'{each}" if isinstance(each, str) and each.startswith(FORMULAS) else each for each in values]
            rows.writerow(dict(zip(COLUMNS, safe, strict=True)))
            studio.append(studio_task(record.id, record.task, shown, record.label, size, record.who, record.confidence))
        put(beside / CSV, text.getvalue().encode("utf-8"))
        put(beside / STUDIO_TASKS, json.dumps(studio).encode())
        put(beside / STUDIO, configuration(records[0].task, known).encode())
    return len(records)


def judge(pool: Pool, accept: Iterable[str], reject: Iterable[str], who: str, now: float) -> Reviewed:
    """Accept and reject labels by the ids of their records: all of them, or none and PoolError."""
    accepted, rejected = list(dict.fromkeys(accept)), list(dict.fromkeys(reject))
    found = _by_id(pool, [*accepted, *rejected])
    unknown = [each for each in (*accepted, *rejected) if each not in found]
    if unknown:
        raise PoolError(f"label {unknown[0]!r} is not in the pool: `trainer samples list --pool` shows the ids")
    both = set(accepted) & set(rejected)
    if both:
        raise PoolError(f"label {min(both)!r} is accepted and rejected: decide")
    words = [said_by(found[each], who) for each in accepted]
    words += [said_by(found[each], who, verdict="rejected") for each in rejected]
    pool.add([(word, None) for word in words], now, renew=True)
    return Reviewed(accepted=len(accepted), rejected=len(rejected))


def take_review(
    pool: Pool, path: Path, who: str, *, known: Sequence[str] | None = None, clock: Callable[[], float] = time.time
) -> Reviewed:
    """Take a review back: a folder, its review.csv, or a JSON export of Label Studio. Everything that can be read counts,
    in one commit; the rest is named. Raises FormatError."""
    file = path / CSV if path.is_dir() else path
    reviewed, words = Reviewed(), []
    records = {record.id: record for record in pool.records(Wanted(verdict=""))}
    rows = _csv_rows(file, who) if file.suffix.lower() == ".csv" else _studio_rows(pool, records, file, who)
    for place, said in rows:
        if isinstance(said, str):
            reviewed.problems.append(Problem("row_bad", place, said))
        elif said is None:
            reviewed.open += 1
        elif said.record not in records:
            reviewed.problems.append(Problem("row_bad", place, f"label {said.record!r} is not in the pool"))
        else:
            try:
                words.append(_word(pool, records[said.record], said, known, reviewed))
            except (PoolError, FormatError) as error:
                reviewed.problems.append(Problem("row_bad", place, str(error)))
    pool.add([(word, None) for word in words], clock(), renew=True)
    return reviewed


def _word(pool: Pool, record: Record, said: Judged, known: Sequence[str] | None, reviewed: Reviewed) -> Record:
    """What the person says of a record; raises FormatError when a row of a corrected label cannot be used."""
    if said.label is None:
        reviewed.rejected += 1
        return said_by(record, said.who, verdict="rejected")
    size = (size_of(pool.read(record.sha256)) or (0, 0)) if record.task != "text" else (0, 0)
    checked = check(record.task, said.label, size, known)
    if checked.bad:
        raise FormatError(f"box {checked.bad[0].number}: {checked.bad[0].reason}; the whole label is left out")
    if record.task in ("classify", "text") and not checked.rows:
        raise FormatError(f"no {record.task} label: give one, or reject it")
    same = canonical(checked.rows) == canonical(record.label)
    if said.unchanged and not same:
        raise FormatError("verdict accept, but its label was changed: say correct, or take the change back")
    if same:
        reviewed.accepted += 1
        return said_by(record, said.who)
    reviewed.corrected += 1
    return said_by(record, said.who, label=checked.rows)


Said = Judged | str | None  # a judgement, why there is none, or none yet


def _csv_rows(file: Path, who: str) -> Iterator[tuple[str, Said]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise FormatError(f"{file}: {error}") from None
    csv.field_size_limit(CELL_CHARS_MAX)
    rows = csv.DictReader(io.StringIO(text, newline=""))
    missing = {"id", "label", "verdict"} - set(rows.fieldnames or ())
    if missing:
        raise FormatError(f"{file}: column {min(missing)} is missing: take the {CSV} that a review wrote")
    try:
        for row in rows:
            yield f"{file.name}, line {rows.line_num}", _csv_said(row, who)
    except csv.Error as error:
        yield f"{file.name}, line {rows.line_num}", f"no CSV from here on: {error}"


def _csv_said(row: dict[str, str | None], who: str) -> Said:
    verdict = (row["verdict"] or "").strip().lower()
    key = row["id"] or ""
    if not verdict:
        return None
    if verdict not in VERDICTS:
        return f"verdict {verdict!r}: use {', '.join(VERDICTS)}, or leave it empty"
    if verdict == "reject":
        return Judged(key, who, None)
    try:
        label = json.loads(row["label"] or "")
        if not isinstance(label, list) or not all(isinstance(each, dict) for each in label):
            raise ValueError("a list of objects is wanted")
    except (ValueError, RecursionError) as error:
        return f"label: {error}"
    return Judged(key, who, tuple(label), verdict == "accept")


def _studio_rows(pool: Pool, records: dict[str, Record], file: Path, who: str) -> Iterator[tuple[str, Said]]:
    value = read_json(file)
    if not isinstance(value, list):
        raise FormatError(f"{file}: a list of tasks is wanted, as Label Studio exports it as JSON")
    for number, row in enumerate(value, start=1):
        place = f"{file.name}, task {number}"
        data = row.get("data") if isinstance(row, dict) else None
        key = data.get("record") if isinstance(data, dict) else None
        record = records.get(key) if isinstance(key, str) else None
        try:
            found = judged(row, {record.id: (record.task, _size(pool, record))} if record else {}, who)
        except (FormatError, PoolError) as error:
            yield place, str(error)
            continue
        if not found:
            yield place, None
        for each in found:
            yield place, each


def _size(pool: Pool, record: Record) -> tuple[int, int]:
    return (1, 1) if record.task == "text" else size_of(pool.read(record.sha256)) or (1, 1)


def _by_id(pool: Pool, ids: Iterable[str]) -> dict[str, Record]:
    return {record.id: record for record in pool.records(Wanted(verdict="", ids=frozenset(ids)))}
