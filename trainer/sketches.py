"""Thumbnails of images for `core.neighbours`, and the record of all that a model has ever been trained on.

Pixels leave this host when a job has ended (the devices keep them); their thumbnails stay, so that what is taken into a
holdout later can be compared with them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer.core.neighbours import SIDE, Sketches, stack
from trainer.core.provenance import taken_at
from trainer.files import write_whole

TRAINED_MAX = 1_000_000  # of the newest: a kilobyte each


class SketchError(ValueError):
    """An image or a record of sketches cannot be read; the message names it."""


class Item(Protocol):
    """An image file's bytes by their hash, with who labelled it: `trainer.datasets.LabelledImage`."""

    @property
    def sha256(self) -> str: ...
    @property
    def data(self) -> bytes: ...
    @property
    def provenance(self) -> dict[str, Any]: ...


def sketch(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The thumbnail (SIDE, SIDE) of an image (height, width, 3) BGR or (height, width): mean grey levels 0..255."""
    grey = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(grey.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32)


def sketch_file(name: str, data: bytes) -> NDArray[np.float32]:
    """The thumbnail of an image file's bytes; raises SketchError naming it when they do not decode."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    if image is None:
        raise SketchError(f"image {name[:12]}: its {len(data)} bytes do not decode")
    return sketch(np.asarray(image, np.uint8))


def sketches_of(items: Sequence[Item]) -> Sketches:
    """Sketches of images, in their order; raises SketchError. Decodes on all cores."""
    with ThreadPoolExecutor() as pool:
        return stack(list(pool.map(lambda item: sketch_file(item.sha256, item.data), items)))


@dataclass(frozen=True, slots=True)
class Trained:
    """What a model was trained on: hashes, thumbnails (n, SIDE, SIDE) as whole grey levels, devices and times."""

    sha256: tuple[str, ...]
    grey: NDArray[np.uint8]
    devices: tuple[str, ...]
    captured: tuple[float, ...]  # 0: not known

    def sketches(self) -> Sketches:
        """Ready to be compared."""
        return Sketches(self.grey.astype(np.float32))


def read_trained(path: Path) -> Trained:
    """The record at `path`, empty when there is none; raises SketchError when it cannot be read."""
    if not path.is_file():
        return Trained((), np.zeros((0, SIDE, SIDE), np.uint8), (), ())
    try:
        with np.load(path, allow_pickle=False) as held:
            found = Trained(
                tuple(held["sha256"].tolist()), held["grey"], tuple(held["devices"].tolist()),
                tuple(held["captured"].tolist()),
            )  # fmt: skip
        if not len(found.sha256) == len(found.grey) == len(found.devices) == len(found.captured):
            raise ValueError("its parts have different lengths")
    except Exception as error:  # zip, zlib, numpy and key errors: all say that the file is damaged
        raise SketchError(
            f"{path}: {error}; it says what was trained on: restore it, or remove it and begin the holdout anew"
        ) from None
    return found


def remember_trained(path: Path, items: Iterable[Item]) -> int:
    """Add images to the record at `path`, each once; how many were new. Raises SketchError, OSError."""
    before = read_trained(path)
    known, fresh = set(before.sha256), []
    for item in items:
        if item.sha256 not in known:
            known.add(item.sha256)
            fresh.append(item)
    if not fresh:
        return 0
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda item: sketch_file(item.sha256, item.data), fresh))
    taken = [taken_at(item.provenance) for item in fresh]
    rows = slice(-TRAINED_MAX, None)
    out = io.BytesIO()
    np.savez_compressed(
        out,
        sha256=np.array([*before.sha256, *(item.sha256 for item in fresh)][rows], dtype="U64"),
        grey=np.concatenate([before.grey, np.rint(np.stack(made)).astype(np.uint8)])[rows],
        devices=np.array([*before.devices, *(device for device, _ in taken)][rows], dtype=str),
        captured=np.array([*before.captured, *(captured or 0.0 for _, captured in taken)][rows], dtype=np.float64),
    )
    write_whole(path, out.getvalue())
    return len(fresh)
