"""JSONL: our own labelled folder, `labels.jsonl` with a line for each picture, and `images/`. Nothing is lost in it.

Pictures: `{"file", "sha256", "boxes": [...], "task"?, "provenance"?, "captured"?, "device"?}`; `boxes` are the rows of the
label (trainer/core/labels.py), for a segment with `polygons`; `{"class": NAME}` instead of `boxes` for a classification.
A line's `mark` is its label's: where the label was changed since, `provenance` is no longer whose label it is.
Boxes alone are what `trainer.datasets` reads. Texts: `{"prompt", "text"}`, or the lines of `dataset.jsonl` (`goal` ...
`summary`), whose `summary` is the answer; a folder is not needed for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from trainer.core.labels import IMAGE_TASKS, Row, Task
from trainer.core.labels import TASKS as ALL_TASKS
from trainer.formats.base import (
    DATA_BYTES_MAX,
    IMAGES,
    Asked,
    Example,
    FormatError,
    Problem,
    Reading,
    examine,
    mark,
    put,
    read_bounded,
    read_inside,
    suffix,
    whole_folder,
)

TASKS = ALL_TASKS
LABELS = "labels.jsonl"
EPISODE = ("goal", "context_summary", "plan", "execution")  # of dataset.jsonl, without its answer
ANSWER = "summary"


def read(path: Path, asked: Asked) -> Reading:
    """A data set: a folder that holds labels.jsonl, or a file of lines. Raises FormatError."""
    file = path / LABELS if path.is_dir() else path
    try:
        data = read_bounded(file, DATA_BYTES_MAX)
    except OSError as error:
        raise FormatError(
            f"{file}: {error.strerror}; give a labelled folder ({LABELS}, {IMAGES}/) or a .jsonl"
        ) from None
    # Bytes: other ends of line that Unicode has are part of a text.
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    return Reading(len(lines), _items(file, lines, asked), asked.task or "detect")


def _items(file: Path, lines: list[tuple[int, bytes]], asked: Asked) -> Iterator[Example | Problem]:
    folder = asked.images or file.parent / IMAGES
    for number, line in lines:
        place = f"{file.name}, line {number}"
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise FormatError("an object is wanted")
            data, found, label = _parts(row, folder, asked)
        except FormatError as error:
            yield Problem("line_bad", place, str(error))
            continue
        except (ValueError, RecursionError) as error:
            yield Problem("line_bad", place, f"no JSON: {error}")
            continue
        provenance = row.get("provenance")
        fields: dict[str, Any] = {
            "captured": _seconds(row.get("captured")),
            "device": row["device"] if isinstance(row.get("device"), str) else "",
            "provenance": provenance if isinstance(provenance, dict) else {},
        }
        for item in examine(data, found, label, asked, place, "box", **fields):
            changed = isinstance(item, Example) and "mark" in row and row["mark"] != mark(item.label)
            yield replace(item, provenance={}) if changed and isinstance(item, Example) else item


def _parts(row: dict[str, Any], folder: Path, asked: Asked) -> tuple[bytes, Task, list[Row]]:
    """The bytes, the task and the rows of a line; raises FormatError."""
    task = asked.task
    if "file" not in row:
        data, label = _text(row)
        found: Task = "text"
    else:
        if not isinstance(row["file"], str):
            raise FormatError(f"file {row['file']!r} is no name")
        data = read_inside(folder, row["file"])
        found, label = _label(row, asked.rename)
    if task is not None and found != task and not (found == "segment" and task == "detect"):
        raise FormatError(f"a {found} label, {task} was asked for")
    if task == "detect" and found == "segment":
        found, label = "detect", [{k: v for k, v in each.items() if k != "polygons"} for each in label]
    stated = row.get("sha256")
    real = sha256(data).hexdigest()
    if stated is not None and stated != real:
        raise FormatError(f"its bytes have SHA-256 {real}, the line says {stated}: they were changed")
    return data, found, label


def _text(row: dict[str, Any]) -> tuple[bytes, list[Row]]:
    if isinstance(row.get("prompt"), str) and row["prompt"]:
        return row["prompt"].encode("utf-8", "surrogatepass"), [{"text": row.get("text")}]
    if isinstance(row.get("goal"), str) and row["goal"]:
        asked = {key: row[key] for key in EPISODE if key in row}
        return json.dumps(asked, sort_keys=True).encode(), [{"text": row.get(ANSWER)}]
    raise FormatError("none of `file`, `prompt` and `goal`: a picture, or a text with its answer, is wanted")


def _label(row: dict[str, Any], rename: Mapping[str, str]) -> tuple[Task, list[Row]]:
    if "class" in row:
        return "classify", [_renamed({"label": row["class"], "score": row.get("score")}, rename)]
    boxes = row.get("boxes")
    if not isinstance(boxes, list) or not all(isinstance(each, dict) for each in boxes):
        raise FormatError("`boxes` is no list of objects")
    rows = [_renamed(each, rename) for each in boxes]
    stated = row.get("task")
    if stated is not None and stated not in IMAGE_TASKS:
        raise FormatError(f"task {stated!r} is none of {', '.join(IMAGE_TASKS)}")
    several = stated == "segment" or (stated is None and any("polygons" in each for each in rows))
    return "segment" if several else "detect", rows


def _renamed(row: Row, rename: Mapping[str, str]) -> Row:
    label = row.get("label")
    return {**row, "label": rename.get(label, label)} if isinstance(label, str) else row


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12 else 0.0


def write(folder: Path, examples: Iterable[Example], labels: Iterable[str] = ()) -> list[Problem]:
    """Write a labelled folder into a new folder. Raises FormatError and OSError."""
    with whole_folder(folder) as beside:
        lines = []
        for example in examples:
            if example.task != "text":
                put(beside / IMAGES / _name(example), example.data)
            # ASCII only: a line separator of Unicode in a name would end the line for some readers.
            lines.append(json.dumps(_row(example)) + "\n")
        put(beside / LABELS, "".join(lines).encode())
    return []


def _name(example: Example) -> str:
    return f"{example.sha256}{suffix(example.data)}"


def _row(example: Example) -> dict[str, Any]:
    who = {
        "captured": example.captured, "device": example.device, "provenance": dict(example.provenance),
        "mark": mark(example.label),
    }  # fmt: skip
    if example.task == "text":
        text = example.data.decode("utf-8", "surrogatepass")
        asked = _episode(text)
        if asked is None:
            return {"prompt": text, "text": example.label[0]["text"], "sha256": example.sha256, **who}
        return {**asked, ANSWER: example.label[0]["text"], "sha256": example.sha256, **who}
    row: dict[str, Any] = {"file": _name(example), "sha256": example.sha256, "task": example.task}
    if example.task == "classify":
        return {**row, "class": example.label[0]["label"], "score": example.label[0].get("score"), **who}
    return {**row, "boxes": list(example.label), **who}


def _episode(text: str) -> dict[str, Any] | None:
    """The line of dataset.jsonl that these bytes were made of; None for a plain prompt."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(value, dict) and "goal" in value and set(value) <= set(EPISODE)
    return value if ours and json.dumps(value, sort_keys=True) == text else None
