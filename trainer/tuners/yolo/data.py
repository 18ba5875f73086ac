"""What the vision tuner reads: labelled images, the share of the base's data among them, and ultralytics' files."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.tuners.yolo.settings import Task

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
_BACKGROUND = -1  # the class of an image without an object
_CACHES = {".cache", ".npy"}  # what ultralytics puts beside the images


@dataclass(frozen=True, slots=True)
class Example:
    """A labelled image. `image`: a file's bytes, or (height, width, 3) BGR pixels. `classes` (n,) are indices of labels.

    `boxes` (n, 4): x1 y1 x2 y2 in pixels, for a detector; `outlines`: n polygons (k, 2), x y in pixels, for a segmenter
    (`outline_of` makes one from a mask); a classifier's example has one class and neither. `replay`: it is of the data
    that the base has learned from.
    """

    name: str
    image: bytes | NDArray[np.uint8]
    classes: ArrayLike
    boxes: ArrayLike | None = None
    outlines: Sequence[ArrayLike] | None = None
    replay: bool = False


@dataclass(frozen=True, slots=True)
class Mixed:
    """What is trained on: `examples`, the new ones first, and how many old ones of each class were asked for and taken."""

    examples: list[Example]
    asked: int
    taken: int
    by_class: dict[int, int] = field(default_factory=dict)  # replayed images that show the class; -1: no object


def mix(examples: Iterable[Example], ratio: float, seed: int) -> Mixed:
    """The new examples, and `ratio` times as many of those to replay (all, when there are fewer), balanced by class.

    One after the other an old example is taken that shows the class shown least so far; images without an object count
    as a class of their own. The same arguments, in whatever order, give the same choice.
    Raises ValueError when no example is new.
    """
    given = list(examples)
    new = [example for example in given if not example.replay]
    if not new:
        raise ValueError(f"nothing to train on: {len(given)} examples, none of them new (replay alone teaches nothing)")
    asked = round(ratio * len(new))
    waiting = sorted((example for example in given if example.replay), key=lambda example: example.name)
    random.Random(seed).shuffle(waiting)
    shown = [_shown(example) for example in waiting]
    queues: dict[int, list[int]] = {}
    for number, classes in enumerate(shown):
        for index in classes:
            queues.setdefault(index, []).append(number)
    for queue in queues.values():
        queue.reverse()  # taken from the end
    taken: set[int] = set()
    counts = dict.fromkeys(sorted(queues), 0)
    while queues and len(taken) < asked:
        rarest = min(queues, key=lambda index: (counts[index], index))
        number = queues[rarest].pop()
        if not queues[rarest]:
            del queues[rarest]
        if number not in taken:
            taken.add(number)
            for index in shown[number]:
                counts[index] += 1
    return Mixed([*new, *(waiting[number] for number in sorted(taken))], asked, len(taken), counts)


def _shown(example: Example) -> list[int]:
    return sorted(set(np.asarray(example.classes, np.int64).reshape(-1).tolist())) or [_BACKGROUND]


def outline_of(mask: NDArray[Any]) -> NDArray[np.float32]:
    """The outline (k, 2), x y in pixels, of a mask (height, width) that is true on the object; (0, 2) for an empty one.

    Parts that do not touch are joined by lines of no width, as ultralytics does with COCO's; holes are filled.
    """
    found, _ = cv2.findContours(np.ascontiguousarray(mask, np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    parts = [part.reshape(-1, 2) for part in found if len(part) >= 3]
    if not parts:
        return np.zeros((0, 2), np.float32)
    if len(parts) == 1:
        return parts[0].astype(np.float32)
    from trainer.tuners.yolo.process import prepare_process

    prepare_process()
    from ultralytics.data.converter import merge_multi_segment

    return np.concatenate(merge_multi_segment([part.tolist() for part in parts])).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Files:
    """A data set in files: what ultralytics calls its data dictionary, its hash, and how many objects were left out
    because nothing of them lies in the image."""

    data: dict[str, Any]
    sha256: str
    left_out: int


def write_examples(
    folder: Path, task: Task, labels: Sequence[str], examples: Iterable[Example], held_out: Iterable[Example] = ()
) -> Files:
    """Write the examples as ultralytics reads them in an empty `folder`.

    Bytes are written as they are and arrays as PNG, so training sees exactly these pixels. Raises ValueError for a
    folder in use, a name that is unfit or twice, an image that does not decode, labels that do not fit the task, a class
    without a label, a set without an image.
    """
    left_out = _write_split(folder, "train", task, labels, examples)
    others = list(held_out)
    if others:
        left_out += _write_split(folder, "val", task, labels, others)
    return Files(_data(folder, task, labels, held_out=bool(others)), _sha256_of(folder), left_out)


def read_dataset(dataset: Path) -> Files:
    """What `write_yolo_dataset` wrote, by its folder or its yaml; raises FileNotFoundError."""
    import yaml

    path = dataset / "dataset.yaml" if dataset.is_dir() else dataset
    if not path.is_file():
        raise FileNotFoundError(f"dataset {path} does not exist; write one with write_yolo_dataset")
    content = yaml.safe_load(path.read_text())
    root = Path(content["path"])
    if not root.is_dir():  # the folder was moved after it was written
        root = path.parent
    names = {int(index): str(label) for index, label in content["names"].items()}
    return Files(_data(root, "detect", [names[index] for index in sorted(names)]), _sha256_of(root), 0)


def write_yolo_dataset(
    folder: Path,
    items: Iterable[tuple[str, bytes | NDArray[np.uint8], ArrayLike, ArrayLike]],
    labels: Iterable[str],
) -> Path:
    """Write (name, PNG bytes or BGR array, boxes (n, 4) xyxy in pixels, classes (n,)) as YOLO's files; return the yaml.

    Raises as `write_examples`.
    """
    names = list(labels)
    examples = (Example(name, image, classes, boxes) for name, image, boxes, classes in items)
    write_examples(folder, "detect", names, examples)
    listing = "".join(f"  {index}: {_quoted(label)}\n" for index, label in enumerate(names))
    path = folder / "dataset.yaml"
    # Train and val are the same: these runs judge nothing, the gate does, on other data.
    path.write_text(
        f"path: {_quoted(str(folder.resolve()))}\ntrain: images/train\nval: images/train\nnames:\n{listing}"
    )
    return path


def class_folder(index: int) -> str:
    """The folder of a class's images: ultralytics numbers classes in the order of these names."""
    return f"class-{index:06d}"


def _data(folder: Path, task: Task, labels: Sequence[str], *, held_out: bool = False) -> dict[str, Any]:
    root = folder.resolve()
    images = root if task == "classify" else root / "images"
    val = str(images / ("val" if held_out else "train"))
    names = dict(enumerate(labels))
    return {
        "path": root, "train": str(images / "train"), "val": val, "names": names, "nc": len(names), "channels": 3,
        "held_out": held_out,
    }  # fmt: skip


def _write_split(folder: Path, split: str, task: Task, labels: Sequence[str], examples: Iterable[Example]) -> int:
    images = folder / split if task == "classify" else folder / "images" / split
    if images.exists() and any(images.iterdir()):
        raise ValueError(f"dataset folder {folder} already holds images; use an empty one")
    texts = folder / "labels" / split
    for made in [images / class_folder(i) for i in range(len(labels))] if task == "classify" else [images, texts]:
        made.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    left_out = 0
    for example in examples:
        name = example.name
        if not _NAME.match(name) or name in seen:
            raise ValueError(f"dataset item {name!r}: names must differ and use letters, digits, '.', '_' and '-'")
        seen.add(name)
        data, height, width = _as_image(name, example.image)
        classes = _classes(example, len(labels))
        suffix = ".jpg" if data.startswith(b"\xff\xd8") else ".png"
        if task == "classify":
            if len(classes) != 1:
                raise ValueError(f"dataset item {name!r}: {len(classes)} classes; a classifier's image has exactly one")
            (images / class_folder(classes[0]) / f"{name}{suffix}").write_bytes(data)
            continue
        draw = _outline_lines if task == "segment" else _box_lines
        lines = draw(example, classes, height, width)
        left_out += len(classes) - len(lines)
        (images / f"{name}{suffix}").write_bytes(data)
        (texts / f"{name}.txt").write_text("".join(lines))
    if not seen:
        raise ValueError(f"dataset {folder} has no image; training needs at least one")
    return left_out


def _as_image(name: str, source: bytes | NDArray[np.uint8]) -> tuple[bytes, int, int]:
    if isinstance(source, bytes):
        image = cv2.imdecode(np.frombuffer(source, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError(f"dataset item {name!r}: {len(source)} bytes are not an image that can be decoded")
        return source, image.shape[0], image.shape[1]
    done, encoded = cv2.imencode(".png", source)
    if not done:
        raise ValueError(f"dataset item {name!r}: an array of shape {source.shape} cannot be written as PNG")
    return encoded.tobytes(), source.shape[0], source.shape[1]


def _classes(example: Example, label_count: int) -> list[int]:
    indices = np.asarray(example.classes, np.int64).reshape(-1).tolist()
    if indices and (min(indices) < 0 or max(indices) >= label_count):
        raise ValueError(f"dataset item {example.name!r}: classes {sorted(set(indices))}, but {label_count} labels")
    return [int(index) for index in indices]


def _box_lines(example: Example, classes: list[int], height: int, width: int) -> list[str]:
    """One line a box: class, centre x, centre y, width, height as shares of the image, cut to its edges."""
    corners = np.asarray([] if example.boxes is None else example.boxes, np.float64).reshape(-1, 4)
    if len(corners) != len(classes):
        raise ValueError(f"dataset item {example.name!r}: {len(corners)} boxes but {len(classes)} classes")
    corners = np.clip(corners, 0, [width, height, width, height]) / [width, height, width, height]
    lines = []
    for index, (x1, y1, x2, y2) in zip(classes, corners.tolist(), strict=True):
        if x2 > x1 and y2 > y1 and math.isfinite(x1 + y1 + x2 + y2):
            lines.append(f"{index} {(x1 + x2) / 2:.9g} {(y1 + y2) / 2:.9g} {x2 - x1:.9g} {y2 - y1:.9g}\n")
    return lines


def _outline_lines(example: Example, classes: list[int], height: int, width: int) -> list[str]:
    """One line an object: class, then x y of each corner as shares of the image, cut to its edges."""
    outlines = [np.asarray(each, np.float64).reshape(-1, 2) for each in example.outlines or ()]
    if len(outlines) != len(classes):
        raise ValueError(f"dataset item {example.name!r}: {len(outlines)} outlines but {len(classes)} classes")
    lines = []
    for index, outline in zip(classes, outlines, strict=True):
        shares = np.clip(outline, 0, [width, height]) / [width, height]
        if len(shares) >= 3 and np.isfinite(shares).all() and np.ptp(shares, axis=0).min() > 0:
            lines.append(" ".join([str(index), *(f"{value:.9g}" for value in shares.reshape(-1))]) + "\n")
    return lines


def _sha256_of(folder: Path) -> str:
    """The identity of a data set: every file that is not a cache, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in _CACHES):
        if path.name != "dataset.yaml":  # it names the folder, which may move
            digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
