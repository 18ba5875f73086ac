"""What the formats share: an example read or to be written, what is wrong with a record, and folders written whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from trainer.core.labels import IMAGE_TASKS, Row, Task, canonical, check
from trainer.files import make_folder, sync_folder, sync_tree

IMAGES = "images"
_KINDS = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"BM", ".bmp"), (b"II*\0", ".tif"), (b"MM\0*", ".tif"))
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
PICTURE_BYTES_MAX = 256 << 20  # of one picture or text
DATA_BYTES_MAX = 2 << 30  # of the one file that holds all labels of a data set
SIZE_SLACK_PX = 1  # between the size that an annotation file states and the picture's


class FormatError(ValueError):
    """A data set cannot be read or written as a whole; the message names the file, what is wrong and the fix."""


@dataclass(frozen=True, slots=True)
class Example:
    """Bytes with their label, as `core.labels` has it. `place` says where it stands, for people. `provenance` holds what
    the file says about the label, as far as it still is the label that was written with it."""

    data: bytes
    task: Task
    label: tuple[Row, ...]
    place: str
    captured: float = 0.0
    device: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """The hash of the bytes."""
        return sha256(self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class Problem:
    """A record that was left out, or a part of one: `kind` for counting, `place` and `reason` for people."""

    kind: str
    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class Asked:
    """How a data set is to be read. `task` None: what it holds; `known`: the classes allowed, None: all; `rename`: another
    name for a class; `images`: the pictures' folder, None: where the format has it; `incomplete`: take a picture of which
    some rows cannot be used with those that can."""

    task: Task | None
    known: Collection[str] | None
    rename: Mapping[str, str]
    images: Path | None = None
    incomplete: bool = False


@dataclass(slots=True)
class Reading:
    """A data set being read: `items` yields examples and problems; `total` of them are examples or could have been."""

    total: int
    items: Iterator[Example | Problem]
    task: Task
    skipped: dict[str, int] = field(default_factory=dict)  # what the format says to leave out, such as crowds


def size_of(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a picture as it is decoded (turned as its EXIF data says); None when it cannot be."""
    if not data:
        return None
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return None if image is None else (image.shape[1], image.shape[0])


def suffix(data: bytes) -> str:
    """The file name's end for these bytes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((end for start, end in _KINDS if data.startswith(start)), ".png")


def examine(
    data: bytes,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    asked: Asked,
    place: str,
    numbered: str = "annotation",
    *,
    spoilt: int = 0,
    **fields: Any,
) -> Iterator[Example | Problem]:
    """A problem for each row that cannot be used, then the example, unless the picture or one of its rows cannot be: what
    a label does not name counts as not there, so that one without all its rows teaches what is wrong. `spoilt`: of the
    picture's rows, those that could not even be read."""
    size = (0, 0)
    if task in IMAGE_TASKS:
        found = size_of(data)
        if found is None:
            yield Problem("image_unreadable", place, f"{len(data)} bytes that do not decode as a picture")
            return
        size = found
    checked = check(task, rows, size, asked.known)
    for bad in checked.bad:
        yield Problem(f"{numbered}_bad", f"{place}, {numbered} {bad.number}", bad.reason)
    if task in ("classify", "text") and not checked.rows:
        if not checked.bad:
            yield Problem("label_missing", place, f"no {task} label")
        return
    lost = spoilt + len(checked.bad)
    if lost and not asked.incomplete:
        reason = (
            f"{lost} of {spoilt + len(rows)} {numbered}s cannot be used, so it is left out whole; mend them, name classes "
            "anew with --rename, or take the rest as all there is with --allow-incomplete"
        )
        yield Problem("label_incomplete", place, reason)
        return
    if checked.clipped:
        yield Problem("clipped", place, f"{checked.clipped} boxes reached over the border and were cut there")
    yield Example(data, task, tuple(checked.rows), place, **fields)


def read_inside(folder: Path, name: str) -> bytes:
    """A file's bytes, only from below `folder`; raises FormatError."""
    # By its words: a link inside the folder was put there by whoever owns the data.
    plain = os.path.normpath(name.replace("\\", "/"))
    if os.path.isabs(plain) or plain.split("/")[0] == "..":
        raise FormatError(f"{name!r} leads out of {folder}: use names below it, or name the folder with --images")
    path = folder / plain
    try:
        return read_bounded(path, PICTURE_BYTES_MAX)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise FormatError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def read_bounded(path: Path, most: int) -> bytes:
    """A file's bytes; raises FormatError for more than `most`, and OSError."""
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FormatError(f"{path}: larger than {most} bytes; take it out, or split the data set")
    return data


def read_json(path: Path) -> Any:
    """A JSON file's value; raises FormatError."""
    try:
        return json.loads(read_bounded(path, DATA_BYTES_MAX).decode("utf-8-sig"))
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: no JSON: {error}") from None


def put(path: Path, data: bytes) -> None:
    """Write a file of a `whole_folder`, which makes it durable at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when all is written; raises FormatError when that is taken."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FormatError(f"{folder} is there and not empty: give a new folder")
    make_folder(folder.parent)
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        sync_tree(beside)  # once, when all are written
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def mark(label: Iterable[Row]) -> str:
    """What a label is recognised by, whatever tool has had the file in between."""
    return sha256(canonical(list(label)).encode()).hexdigest()[:16]


def share_of(sha256: str) -> float:
    """A number in [0, 1) that follows from a hash: the same picture falls on the same side in every export."""
    return int(sha256[:8], 16) / 2**32
