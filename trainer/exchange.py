"""Own data into the pool, and the pool out of here: `trainer samples import|export`.

One bad record never ends a run: it is counted and named. A killed import is started again: what is in the pool already
changes nothing. An export appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from trainer.core.labels import Task
from trainer.formats import coco, jsonl, yolo
from trainer.formats.base import Asked, Example, FormatError, Problem, Reading
from trainer.pool import BATCH_MAX, Kind, Pool, PoolError, Record, Wanted

READERS: dict[str, Callable[[Path, Asked], Reading]] = {"coco": coco.read, "yolo": yolo.read, "jsonl": jsonl.read}
HOLD: dict[str, tuple[Task, ...]] = {"coco": coco.TASKS, "yolo": yolo.TASKS, "jsonl": jsonl.TASKS}
FORMATS = tuple(READERS)
KINDS = ("person", "model")
PROBLEMS_MAX = 10_000  # that are kept to be shown; all are counted
BATCH_BYTES_MAX = 256 << 20  # of one commit: what is held in memory
Step = Callable[[int], None]  # told of each record that is done with: for a progress bar


@dataclass(frozen=True, slots=True)
class Source:
    """Whose labels are imported where the file does not say so itself."""

    model: str
    kind: Kind
    who: str
    release: str = ""
    confidence: float = 1.0
    device: str = ""


@dataclass(slots=True)
class Summary:
    """What an import or export did, counted: nothing is lost silently."""

    read: int = 0  # pictures or texts
    added: int = 0
    known: int = 0  # said before: nothing changed
    boxes: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)  # left out because the format says so
    problems: dict[str, int] = field(default_factory=dict)  # by kind
    named: list[Problem] = field(default_factory=list)  # the first PROBLEMS_MAX of them

    def note(self, problem: Problem) -> None:
        """Count a problem."""
        self.problems[problem.kind] = self.problems.get(problem.kind, 0) + 1
        if len(self.named) < PROBLEMS_MAX:
            self.named.append(problem)

    def count(self, example: Example) -> None:
        """Count what an example says."""
        self.read += 1
        for row in example.label:
            self.boxes += "box" in row
            if "label" in row:
                self.classes[row["label"]] = self.classes.get(row["label"], 0) + 1

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        named = [{"kind": each.kind, "place": each.place, "reason": each.reason} for each in self.named]
        counts = {name: getattr(self, name) for name in ("read", "added", "known", "boxes")}
        return {
            **counts, "classes": dict(sorted(self.classes.items())), "skipped": self.skipped,
            "problems": self.problems, "named": named,
        }  # fmt: skip


def read(
    format_: str, path: Path, *, task: Task | None, known: Collection[str] | None, rename: Mapping[str, str],
    images: Path | None = None, incomplete: bool = False,
) -> Reading:  # fmt: skip
    """A data set in one of FORMATS, as Asked has it; raises FormatError."""
    if format_ not in READERS:
        raise FormatError(f"--format {format_}: use one of {', '.join(FORMATS)}")
    if task is not None and task not in HOLD[format_]:
        raise FormatError(f"--format {format_} cannot hold task {task!r}: it holds {', '.join(HOLD[format_])}")
    return READERS[format_](path, Asked(task, known, rename, images, incomplete))


def import_all(pool: Pool, reading: Reading, source: Source, now: float, step: Step = lambda _n: None) -> Summary:
    """Take everything in; raises OSError when the disk does not (what is in by then stays: start it again)."""
    summary = Summary()
    batch: list[tuple[Record, bytes]] = []
    held = 0
    for record, item in _taken(reading, source, summary, step):
        batch.append((record, item.data))
        held += len(item.data)
        if len(batch) >= BATCH_MAX or held >= BATCH_BYTES_MAX:
            _put(pool, batch, now, summary, step)
            held = 0
    _put(pool, batch, now, summary, step)
    return summary


def convert(reading: Reading, source: Source, folder: Path, step: Step = lambda _n: None) -> Summary:
    """Write everything into a new labelled folder instead, each picture once; raises FormatError, OSError."""
    summary = Summary()
    jsonl.write(folder, _told(reading, source, summary, step))
    return summary


def _told(reading: Reading, source: Source, summary: Summary, step: Step) -> Iterator[Example]:
    seen: set[str] = set()
    for record, item in _taken(reading, source, summary, step):
        step(1)
        if record.sha256 in seen:
            summary.known += 1
            continue
        seen.add(record.sha256)
        summary.added += 1
        yield replace(item, device=record.device, provenance=_said(record))


def _taken(reading: Reading, source: Source, summary: Summary, step: Step) -> Iterator[tuple[Record, Example]]:
    """What can be used of a data set; the rest is counted and named."""
    for item in reading.items:
        if isinstance(item, Problem):
            summary.note(item)
            if item.kind in _WHOLE:
                step(1)
            continue
        try:
            record = record_of(item, source)
        except PoolError as error:
            summary.note(Problem("provenance_bad", item.place, str(error)))
            step(1)
            continue
        summary.count(item)
        yield record, item
    summary.skipped = reading.skipped


_WHOLE = frozenset(
    {"image_bad", "image_missing", "image_unreadable", "label_incomplete", "label_missing"}
)  # no example follows these


def _put(pool: Pool, batch: list[tuple[Record, bytes]], now: float, summary: Summary, step: Step) -> None:
    new = pool.add(batch, now)
    summary.added += sum(new)
    summary.known += len(new) - sum(new)
    step(len(batch))
    batch.clear()


def record_of(example: Example, source: Source) -> Record:
    """What the pool keeps of an example: whose label it is as its file says, else as `source` does; raises PoolError."""
    said = example.provenance
    own = said.get("kind") in KINDS and isinstance(said.get("who"), str) and bool(said["who"])
    kind, who = (cast(Kind, said["kind"]), str(said["who"])) if own else (source.kind, source.who)
    release = said.get("release", "") if own else source.release
    confidence = said.get("confidence", 1.0) if own else source.confidence
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        raise PoolError(f"provenance: confidence {confidence!r} is no share: use 0 to 1")
    if not isinstance(release, str):
        raise PoolError(f"provenance: release {release!r} is no name")
    origin = str(said.get("origin") or example.place) if own else example.place
    return Record(
        example.sha256, source.model, example.task, example.label, kind, who, release, float(confidence),
        example.device or source.device, example.captured, origin,
    )  # fmt: skip


def export_all(
    pool: Pool, wanted: Wanted, format_: str, folder: Path, labels: Sequence[str], *, val_share: float = 0.1,
    confidence_floor: float = 0.0, step: Step = lambda _n: None,
) -> Summary:  # fmt: skip
    """Write the labels that count into a new folder; raises FormatError, OSError."""
    chosen = pool.labelled(wanted, confidence_floor=confidence_floor)
    summary = Summary(skipped=dict(chosen.left_out))
    examples = _examples(pool, chosen.records, summary, step)
    if format_ == "coco":
        problems = coco.write(folder, examples, labels)
    elif format_ == "yolo":
        problems = yolo.write(folder, examples, labels, val_share=val_share)
    elif format_ == "jsonl":
        problems = jsonl.write(folder, examples, labels)
    else:
        raise FormatError(f"--format {format_}: use one of {', '.join(FORMATS)}")
    for problem in problems:
        summary.note(problem)
    return summary


def _examples(pool: Pool, records: Iterable[Record], summary: Summary, step: Step) -> Iterator[Example]:
    for record in records:
        try:
            example = example_of(pool, record)
        except PoolError as error:
            summary.note(Problem("object_bad", f"record {record.id}", str(error)))
        else:
            summary.count(example)
            yield example
        step(1)


def example_of(pool: Pool, record: Record) -> Example:
    """A record with its bytes, as formats write it; raises PoolError."""
    data, place = pool.read(record.sha256), f"record {record.id}"
    return Example(data, record.task, record.label, place, record.captured, record.device, _said(record))


def _said(record: Record) -> dict[str, Any]:
    """Whose label it is, as a labelled folder has it beside the device and the time."""
    return {key: value for key, value in record.provenance().items() if key not in ("device", "captured", "record")}
