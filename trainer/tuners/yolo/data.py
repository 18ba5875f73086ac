"""Data sets as ultralytics reads them from files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")


def write_yolo_dataset(
    folder: Path,
    items: Iterable[tuple[str, bytes | NDArray[np.uint8], ArrayLike, ArrayLike]],
    labels: Iterable[str],
) -> Path:
    """Write (name, PNG bytes or BGR array, boxes (n, 4) xyxy in pixels, classes (n,)) as YOLO's files; return the yaml.

    Bytes are written as they are and arrays as PNG, so training sees exactly these pixels. Raises ValueError for a
    folder in use, a name that is unfit or twice, an image that does not decode, boxes and classes of unequal number,
    a class without a label, a set without an image.
    """
    names = list(labels)
    images, texts = folder / "images" / "train", folder / "labels" / "train"
    if images.exists() and any(images.iterdir()):
        raise ValueError(f"dataset folder {folder} already holds images; use an empty one")
    images.mkdir(parents=True, exist_ok=True)
    texts.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for name, source, boxes, classes in items:
        if not _NAME.match(name) or name in seen:
            raise ValueError(f"dataset item {name!r}: names must differ and use letters, digits, '.', '_' and '-'")
        seen.add(name)
        data, height, width = _as_png(name, source)
        lines = _yolo_lines(name, boxes, classes, height, width, len(names))
        (images / f"{name}.png").write_bytes(data)
        (texts / f"{name}.txt").write_text("".join(lines))
    if not seen:
        raise ValueError(f"dataset {folder} has no image; training needs at least one")
    listing = "".join(f"  {index}: {_quoted(label)}\n" for index, label in enumerate(names))
    path = folder / "dataset.yaml"
    # Train and val are the same: these runs judge nothing, the gate does, on other data.
    path.write_text(
        f"path: {_quoted(str(folder.resolve()))}\ntrain: images/train\nval: images/train\nnames:\n{listing}"
    )
    return path


def read_dataset(dataset: Path) -> dict[str, Any]:
    """What ultralytics calls the data dictionary, read from what `write_yolo_dataset` wrote."""
    import yaml

    path = dataset / "dataset.yaml" if dataset.is_dir() else dataset
    if not path.is_file():
        raise FileNotFoundError(f"dataset {path} does not exist; write one with write_yolo_dataset")
    content = yaml.safe_load(path.read_text())
    root = Path(content["path"])
    if not root.is_dir():  # the folder was moved after it was written
        root = path.parent
    names = {int(index): str(label) for index, label in content["names"].items()}
    images = str(root / content["train"])
    return {"path": root, "train": images, "val": images, "names": names, "nc": len(names), "channels": 3}


def _as_png(name: str, source: bytes | NDArray[np.uint8]) -> tuple[bytes, int, int]:
    if isinstance(source, bytes):
        image = cv2.imdecode(np.frombuffer(source, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError(f"dataset item {name!r}: {len(source)} bytes are not an image that can be decoded")
        return source, image.shape[0], image.shape[1]
    done, encoded = cv2.imencode(".png", source)
    if not done:
        raise ValueError(f"dataset item {name!r}: an array of shape {source.shape} cannot be written as PNG")
    return encoded.tobytes(), source.shape[0], source.shape[1]


def _yolo_lines(
    name: str, boxes: ArrayLike, classes: ArrayLike, height: int, width: int, label_count: int
) -> list[str]:
    """One line a box: class, centre x, centre y, width, height as shares of the image, cut to its edges."""
    corners = np.asarray(boxes, np.float64).reshape(-1, 4)
    indices = np.asarray(classes, np.int64).reshape(-1)
    if len(corners) != len(indices):
        raise ValueError(f"dataset item {name!r}: {len(corners)} boxes but {len(indices)} classes")
    if len(indices) and (indices.min() < 0 or indices.max() >= label_count):
        raise ValueError(f"dataset item {name!r}: classes {sorted(set(indices.tolist()))}, but {label_count} labels")
    corners = np.clip(corners, 0, [width, height, width, height]) / [width, height, width, height]
    lines = []
    for index, (x1, y1, x2, y2) in zip(indices.tolist(), corners.tolist(), strict=True):
        if x2 > x1 and y2 > y1 and math.isfinite(x1 + y1 + x2 + y2):
            lines.append(f"{index} {(x1 + x2) / 2:.9g} {(y1 + y2) / 2:.9g} {x2 - x1:.9g} {y2 - y1:.9g}\n")
    return lines


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
