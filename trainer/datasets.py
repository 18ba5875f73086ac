"""Labelled images: the folders that replay, holdouts and calibration lie in, and what a job makes of its samples.

A labelled folder holds `images/` and `labels.jsonl`, one JSON object a line:
`{"file": "0001.png", "sha256": "...", "boxes": [{"label": "7", "box": [x1, y1, x2, y2]}, ...], "provenance": {...}}`
with corners in pixels, `sha256` of the image file's bytes, and whatever says who labelled it.
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

from edged.wire.manifest import TrainingManifest
from trainer.evaluate import Labelled
from trainer.files import write_json, write_whole

log = logging.getLogger(__name__)

IMAGES, LABELS = "images", "labels.jsonl"


class DatasetError(ValueError):
    """A data set cannot be used; the message names the folder, the line or file, and the fix."""


@dataclass(frozen=True, slots=True)
class LabelledBox:
    """A labelled box: `box` is x1 y1 x2 y2 in pixels."""

    label: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image file's bytes with its boxes; `sha256` is the hash of the bytes."""

    sha256: str
    data: bytes
    boxes: tuple[LabelledBox, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def decode(self, labels: Sequence[str]) -> Labelled:
        """The pixels with boxes (n, 4) and class indices (n,); raises DatasetError."""
        image = cv2.imdecode(np.frombuffer(self.data, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise DatasetError(f"image {self.sha256[:12]}: its {len(self.data)} bytes do not decode")
        unknown = sorted({box.label for box in self.boxes} - set(labels))
        if unknown:
            raise DatasetError(f"image {self.sha256[:12]}: label {unknown[0]!r} is none of {', '.join(labels)}")
        corners = np.array([box.box for box in self.boxes], np.float32).reshape(-1, 4)
        classes = np.array([labels.index(box.label) for box in self.boxes], np.int64)
        return Labelled(np.asarray(image, np.uint8), corners, classes)


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
            boxes = tuple(_box(each) for each in row["boxes"])
            path = folder / IMAGES / Path(row["file"]).name
            data = path.read_bytes()
            expected = row["sha256"]
        except OSError as error:
            raise DatasetError(f"{where}: {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{where}: {type(error).__name__}: {error}") from None
        found = sha256(data).hexdigest()
        if found != expected:
            raise DatasetError(f"{where}: {path} has SHA-256 {found}, the line says {expected}: the image was changed")
        yield LabelledImage(found, data, boxes, row.get("provenance") or {})


def _box(row: dict[str, Any]) -> LabelledBox:
    x1, y1, x2, y2 = (float(value) for value in row["box"])
    if not (np.isfinite([x1, y1, x2, y2]).all() and x2 > x1 and y2 > y1):
        raise ValueError(f"box {row['box']} has no area; corners are x1 y1 x2 y2 in pixels")
    return LabelledBox(str(row["label"]), (x1, y1, x2, y2))


def write_folder(folder: Path, items: Iterable[LabelledImage]) -> None:
    """Write a labelled folder; the images are PNG, JPEG or whatever their bytes are, named by order."""
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, item in enumerate(items):
        name = f"{number:06d}{_suffix(item.data)}"
        (folder / IMAGES / name).write_bytes(item.data)
        boxes = [{"label": box.label, "box": list(box.box)} for box in item.boxes]
        row = {"file": name, "sha256": item.sha256, "boxes": boxes, "provenance": item.provenance}
        lines.append(json.dumps(row, ensure_ascii=False))
    write_whole(folder / LABELS, "".join(f"{line}\n" for line in lines).encode())


def _suffix(data: bytes) -> str:
    return ".jpg" if data.startswith(b"\xff\xd8") else ".png"


def frozen_hash(items: Sequence[LabelledImage]) -> str:
    """The identity of a set, labels included, whatever the order of its lines."""
    rows = sorted(f"{item.sha256} {sorted((box.label, box.box) for box in item.boxes)}" for item in items)
    return sha256("\n".join(rows).encode()).hexdigest()


def check_frozen(record: Path, name: str, items: Sequence[LabelledImage]) -> str:
    """The hash of a holdout, remembered in the file `record` at its first use; raises DatasetError when it changed."""
    found = frozen_hash(items)
    known: dict[str, str] = json.loads(record.read_text()) if record.is_file() else {}
    if known.get(name, found) != found:
        raise DatasetError(
            f"holdout {name} has changed since it was first used ({known[name][:12]} -> {found[:12]}): "
            f"a gate that moves judges nothing; restore its files, or remove {name!r} from {record} "
            "to begin a new series of comparisons"
        )
    if name not in known:
        write_json(record, {**known, name: found})
    return found


@dataclass(frozen=True, slots=True)
class Selected:
    """What a job trains and calibrates on, and how many samples were left out, by reason."""

    training: list[LabelledImage]
    calibration: list[LabelledImage]
    left_out: dict[str, int]


def select_samples(
    manifest: TrainingManifest,
    folder: Path,
    *,
    labels: Sequence[str],
    confidence_min: float,
    held_out: frozenset[str],
    calibration_share: float,
) -> Selected:
    """The samples of a manifest whose pixels lie in `folder` by hash, each image once, split by its hash.

    Left out and counted: labels below the confidence floor, pixels that are missing or do not decode, labels that the
    model does not have, and images of `held_out` (hashes of the holdouts' files).
    """
    training: list[LabelledImage] = []
    calibration: list[LabelledImage] = []
    left_out: dict[str, int] = {}
    seen: set[str] = set()
    for sample in manifest.samples:
        item: LabelledImage | None = None
        path = folder / sample.sha256
        if sample.label.get("confidence", 0.0) < confidence_min:
            reason = "below_label_confidence"
        elif sample.sha256 in held_out:
            reason = "in_holdout"
        elif sample.sha256 in seen:
            reason = "duplicate"
        elif not path.is_file():
            reason = "no_pixels"
        else:
            reason = "unusable"
            item = _usable(
                path, sample.label, {**sample.provenance, "device": sample.device, "sample": sample.id}, labels
            )
        if item is None:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        seen.add(item.sha256)
        # By hash: the same image falls on the same side in every job, so what once calibrated never trains.
        calibrates = int(item.sha256[:8], 16) / 2**32 < calibration_share
        (calibration if calibrates else training).append(item)
    return Selected(training, calibration, left_out)


def _usable(
    path: Path, label: dict[str, Any], provenance: dict[str, Any], labels: Sequence[str]
) -> LabelledImage | None:
    data = path.read_bytes()
    if sha256(data).hexdigest() != path.name:
        return None
    try:
        item = LabelledImage(path.name, data, tuple(_box(box) for box in label["boxes"]), provenance)
        item.decode(labels)
    except (DatasetError, ValueError, KeyError, TypeError) as error:
        log.warning("sample %s is left out: %s", path.name, error)
        return None
    return item


def choose_replay(
    items: Sequence[LabelledImage], count: int, seed: int, excluded: frozenset[str]
) -> list[LabelledImage]:
    """`count` images (all, when there are fewer) drawn by `seed`, none of `excluded`."""
    allowed = [item for item in items if item.sha256 not in excluded]
    return random.Random(seed).sample(allowed, min(count, len(allowed)))


def shuffle_labels(items: Sequence[LabelledImage], seed: int) -> list[LabelledImage]:
    """The same images, each with another image's boxes: what a gate must refuse to ship."""
    boxes = [item.boxes for item in items]
    random.Random(seed).shuffle(boxes)
    return [replace(item, boxes=other) for item, other in zip(items, boxes, strict=True)]
