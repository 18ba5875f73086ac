"""Thumbnails of images for `core.neighbours`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer.core.neighbours import SIDE, Sketches, stack


class SketchError(ValueError):
    """An image cannot be read; the message names it."""


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
