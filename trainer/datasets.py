"""Labelled images: the folders that replay, holdouts and calibration lie in, and what a job makes of its samples.

A labelled folder holds `images/` and `labels.jsonl`, one JSON object a line:
`{"file": "0001.png", "sha256": "...", "boxes": [{"label": "7", "box": [x1, y1, x2, y2]}, ...], "provenance": {...}}`
with corners in pixels, `sha256` of the image file's bytes, and whatever says who labelled it. For a segmenter each row of
`boxes` has `"polygons": [[x1, y1, x2, y2, ...], ...]`, the parts of the object, and its box is what encloses them; for a
classifier `"class": "7"` may stand instead of `boxes`, or a single box around anything (docs/decisions/0009).
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edged.wire.manifest import Kind, TrainingManifest, TrainingSample
from trainer.core.labels import best
from trainer.core.neighbours import groups, members, near
from trainer.core.provenance import is_disputed, is_own, sureness, taken_at
from trainer.core.split import SplitRules, Times, held_back, side, unit
from trainer.evaluate import Labelled
from trainer.files import write_whole
from trainer.shapes import outline, shape, whole
from trainer.sketches import sketches_of

log = logging.getLogger(__name__)

IMAGES, LABELS = "images", "labels.jsonl"


class DatasetError(ValueError):
    """A data set cannot be used; the message names the folder, the line or file, and the fix."""


@dataclass(frozen=True, slots=True)
class LabelledBox:
    """A labelled box: `box` is x1 y1 x2 y2 in pixels; `polygons`, where there are some, are the parts of the object's
    outline, x1 y1 x2 y2 ... each."""

    label: str
    box: tuple[float, float, float, float]
    polygons: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image file's bytes with its boxes; `sha256` is the hash of the bytes."""

    sha256: str
    data: bytes
    boxes: tuple[LabelledBox, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def decode(self, labels: Sequence[str], kind: Kind = "detect") -> Labelled:
        """The pixels with the truth that a model of this kind is held against: boxes (n, 4) and class indices (n,), for a
        segmenter an outline of each, for a classifier one box around the whole. Raises DatasetError."""
        image = cv2.imdecode(np.frombuffer(self.data, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise DatasetError(f"image {self.sha256[:12]}: its {len(self.data)} bytes do not decode")
        unknown = sorted({box.label for box in self.boxes} - set(labels))
        if unknown:
            raise DatasetError(f"image {self.sha256[:12]}: label {unknown[0]!r} is none of {', '.join(labels)}")
        corners = np.array([box.box for box in self.boxes], np.float32).reshape(-1, 4)
        classes = np.array([labels.index(box.label) for box in self.boxes], np.int64)
        height, width = image.shape[:2]
        outlines = None
        if kind == "classify":
            if len(classes) != 1:
                raise DatasetError(
                    f"image {self.sha256[:12]}: {len(classes)} labels; a classifier's image has exactly one"
                )
            corners = np.array([[0, 0, width, height]], np.float32)
        elif kind == "segment":
            bare = sum(not box.polygons for box in self.boxes)
            if bare:
                raise DatasetError(
                    f"image {self.sha256[:12]}: {bare} of {len(classes)} boxes have no polygon; a segmenter learns and is "
                    "judged by outlines: label them too"
                )
            outlines = tuple(outline(box.polygons, (height, width)) for box in self.boxes)
        return Labelled(np.asarray(image, np.uint8), corners, classes, outlines)


def read_folder(folder: Path) -> list[LabelledImage]:
    """Every image of a labelled folder in the order of its lines; raises DatasetError naming the line."""
    path = folder / LABELS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}; a labelled folder holds {LABELS} and {IMAGES}/") from None
    return list(_read_lines(folder, lines))


def _read_lines(folder: Path, lines: Iterable[str]) -> Iterator[LabelledImage]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{folder / LABELS}, line {number}"
        try:
            row = json.loads(line)
            path = folder / IMAGES / Path(row["file"]).name
            data = path.read_bytes()
            rows = row["boxes"] if "class" not in row else [whole(row["class"], data)]
            boxes = tuple(LabelledBox(*shape(each)) for each in rows)
            expected = row["sha256"]
        except OSError as error:
            raise DatasetError(f"{where}: {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{where}: {type(error).__name__}: {error}") from None
        found = sha256(data).hexdigest()
        if found != expected:
            raise DatasetError(f"{where}: {path} has SHA-256 {found}, the line says {expected}: the image was changed")
        yield LabelledImage(found, data, boxes, row.get("provenance") or {})


def write_folder(folder: Path, items: Iterable[LabelledImage]) -> None:
    """Write a labelled folder; the images are PNG, JPEG or whatever their bytes are, named by order."""
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, item in enumerate(items):
        name = f"{number:06d}{_suffix(item.data)}"
        (folder / IMAGES / name).write_bytes(item.data)
        lines.append(_line(name, item))
    write_whole(folder / LABELS, "".join(f"{line}\n" for line in lines).encode())


def append_folder(folder: Path, items: Sequence[LabelledImage]) -> None:
    """Add images to a labelled folder, which is made where it is missing; they appear in it all at once."""
    if not items:
        return
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    lines = []
    for item in items:
        name = f"{item.sha256}{_suffix(item.data)}"
        write_whole(folder / IMAGES / name, item.data)
        lines.append(_line(name, item))
    path = folder / LABELS
    before = path.read_bytes() if path.is_file() else b""
    joint = b"\n" if before and not before.endswith(b"\n") else b""
    write_whole(path, before + joint + "".join(f"{line}\n" for line in lines).encode())


def _line(name: str, item: LabelledImage) -> str:
    boxes = [
        {"label": box.label, "box": list(box.box), **({"polygons": box.polygons} if box.polygons else {})}
        for box in item.boxes
    ]
    row = {"file": name, "sha256": item.sha256, "boxes": boxes, "provenance": item.provenance}
    return json.dumps(row, ensure_ascii=False)


def _suffix(data: bytes) -> str:
    return ".jpg" if data.startswith(b"\xff\xd8") else ".png"


def frozen_hash(items: Sequence[LabelledImage]) -> str:
    """The identity of a set, labels included, whatever the order of its lines."""
    rows = sorted(f"{item.sha256} {sorted(_said(box) for box in item.boxes)}" for item in items)
    return sha256("\n".join(rows).encode()).hexdigest()


def _said(box: LabelledBox) -> tuple[Any, ...]:
    return (box.label, box.box, box.polygons) if box.polygons else (box.label, box.box)


@dataclass(frozen=True, slots=True)
class Selected:
    """What a job trains and calibrates on, how many samples were left out, by reason, and how many of the training images
    are near-duplicates of another one of them."""

    training: list[LabelledImage]
    calibration: list[LabelledImage]
    left_out: dict[str, int]
    near_duplicates: int = 0


@dataclass(frozen=True, slots=True)
class Apart:
    """What must stay apart from training: `judges` are the images of the holdouts, `calibrates` those of the calibration's
    folder. What a device took less than `guard_s` from one that judges is left out too."""

    judges: Sequence[LabelledImage] = ()
    calibrates: Sequence[LabelledImage] = ()
    guard_s: float = 0.0


def select_samples(
    manifest: TrainingManifest,
    folder: Path,
    *,
    labels: Sequence[str],
    confidence_min: float,
    held_out: frozenset[str],
    calibration_share: float,
    apart: Apart | None = None,
    split: SplitRules | None = None,
    thin: bool = False,
    kind: Kind = "detect",
) -> Selected:
    """The samples of a manifest whose pixels lie in `folder` by hash, each image once, split by device and time (by its
    hash where those are not known).

    Left out and counted: labels below the confidence floor, the model's own predictions, labels that are disputed, boxes
    without an outline where `kind` is a segmenter's, pixels that are missing or do not decode, labels that the model does
    not have, images of `held_out` (hashes of the holdouts'
    files), near-duplicates of what judges or calibrates (`apart`, and what calibrates of these samples), what was taken
    beside what judges, what the split keeps for the holdouts, and what lies between two of its sides. `thin` leaves out
    near-duplicates within the training images too.
    """
    left_out: dict[str, int] = {}
    usable: list[LabelledImage] = []
    seen: set[str] = set()
    for sample in manifest.samples:
        item: LabelledImage | None = None
        path = folder / sample.sha256
        reason = may_not_train(manifest.model, sample, confidence_min, kind)
        if reason:
            pass
        elif sample.sha256 in held_out:
            reason = "in_holdout"
        elif sample.sha256 in seen:
            reason = "duplicate"
        elif not path.is_file():
            reason = "no_pixels"
        else:
            reason = "unusable"
            provenance = {**sample.provenance, "device": sample.device, "sample": sample.id}
            item = _usable(path, sample.label, provenance, labels, kind)
        if item is None:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        seen.add(item.sha256)
        usable.append(item)
    rules = split or SplitRules(calibration=calibration_share)
    return _keep_apart(usable, apart or Apart(guard_s=rules.guard_s), rules, thin, left_out)


def may_not_train(model: str, sample: TrainingSample, confidence_min: float, kind: Kind) -> str:
    """Why a label may not train, whatever its pixels; "" when it may."""
    told = sample.label.get("confidence", 0.0)
    confidence = sureness(told)
    if (
        confidence < confidence_min or confidence != told
    ):  # what is no number from 0 to 1 is no word, also at a floor of 0
        return "below_label_confidence"
    if is_own(model, sample.provenance, sample.device):
        return "own_prediction"
    rows = sample.label.get("boxes")
    if isinstance(rows, list) and is_disputed(rows, sample.provenance, confidence, confidence_min):
        return "disputed"
    if kind == "segment" and isinstance(rows, list) and any("polygons" not in row for row in rows):
        return "no_outline"
    return ""


def _keep_apart(
    items: Sequence[LabelledImage], apart: Apart, rules: SplitRules, thin: bool, left_out: dict[str, int]
) -> Selected:
    """`items` on the sides of the split, without what is too near to what judges or calibrates; adds to `left_out`."""

    def leave_out(reason: str) -> None:
        left_out[reason] = left_out.get(reason, 0) + 1

    sketches = sketches_of(items)
    near_judge = near(sketches, sketches_of(apart.judges)) >= 0
    near_calibrating = near(sketches, sketches_of(apart.calibrates)) >= 0
    times = Times(taken_at(item.provenance) for item in apart.judges)
    training: list[int] = []
    calibration: list[int] = []
    for index, item in enumerate(items):
        device, captured = taken_at(item.provenance)
        if near_judge[index]:
            leave_out("near_holdout")
            continue
        if times.beside(device, captured, apart.guard_s):
            leave_out("beside_holdout")
            continue
        falls = side(rules, item.sha256, device, captured)
        if falls == "calibration":
            calibration.append(index)
        elif falls is None:
            leave_out("between_sides")
        elif falls != "training":
            leave_out(f"kept_for_{falls}")
        elif near_calibrating[index]:
            leave_out("near_holdout")
        else:
            training.append(index)
    rows, calibrating = np.array(training, np.int64), np.array(calibration, np.int64)
    fresh = near(sketches[rows], sketches[calibrating]) < 0
    for _ in range(int((~fresh).sum())):
        leave_out("near_holdout")
    rows = rows[fresh]
    again = [index for group in members(groups(sketches[rows])) for index in group[1:]]
    if thin:
        for _ in again:
            leave_out("near_duplicate")
        rows = np.delete(rows, again)
    return Selected(
        [items[index] for index in rows], [items[index] for index in calibrating], left_out, 0 if thin else len(again)
    )


def _usable(
    path: Path, label: dict[str, Any], provenance: dict[str, Any], labels: Sequence[str], kind: Kind
) -> LabelledImage | None:
    data = path.read_bytes()
    if sha256(data).hexdigest() != path.name:
        return None
    try:
        rows = label["boxes"]
        if kind == "classify":  # a teacher's answer lists its runners-up
            rows = [whole(row["label"], data) for row in best(rows)]
        item = LabelledImage(path.name, data, tuple(LabelledBox(*shape(row)) for row in rows), provenance)
        item.decode(labels, kind)
    except (DatasetError, ValueError, KeyError, TypeError) as error:
        log.warning("sample %s is left out: %s", path.name, error)
        return None
    return item


def hold_back(
    items: Sequence[LabelledImage], share: float, rules: SplitRules
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """What trains of `items`, and what only says when to stop: `share` of them, by device and time (by hash where those
    are not known), the same for the same items in any order. What is nearly an image that trains, trains too: there may
    be less to stop by than asked for, or nothing."""
    units = [unit(rules, item.sha256, *taken_at(item.provenance)) for item in items]
    held = np.array(held_back(units, share), np.int64)
    moved, sketches = np.delete(np.arange(len(items)), held), sketches_of(items)
    while len(held) and len(moved):  # what is nearly one that has just moved follows it
        again = near(sketches[held], sketches[moved]) >= 0
        moved, held = held[again], held[~again]
    kept = set(held.tolist())
    return (
        [item for row, item in enumerate(items) if row not in kept],
        [item for row, item in enumerate(items) if row in kept],
    )


def choose_replay(
    items: Sequence[LabelledImage],
    count: int,
    seed: int,
    excluded: frozenset[str],
    apart: Sequence[LabelledImage] = (),
) -> list[LabelledImage]:
    """`count` images (all, when there are fewer) drawn by `seed`, none of `excluded`, no near-duplicate of `apart`."""
    allowed = [item for item in items if item.sha256 not in excluded]
    if apart and allowed:
        fresh = near(sketches_of(allowed), sketches_of(apart)) < 0
        allowed = [item for item, free in zip(allowed, fresh, strict=True) if free]
    return random.Random(seed).sample(allowed, min(count, len(allowed)))


def shuffle_labels(items: Sequence[LabelledImage], seed: int) -> list[LabelledImage]:
    """The same images, each with another image's label: what a gate must refuse to ship."""
    boxes = [item.boxes for item in items]
    random.Random(seed).shuffle(boxes)
    return [replace(item, boxes=other) for item, other in zip(items, boxes, strict=True)]
