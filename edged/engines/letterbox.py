"""Images into a detector's input: letterboxed, in the form that the model takes, in buffers that are used again."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edged.engines.base import EngineError, Image, ImageStats, Prepared

EXTREME = 0.002  # share of the pixels that are its darkest, lightest or sharpest
PAD_VALUE = 114  # grey of the letterbox's bars, as in training
BUFFERS_MAX = 6  # one being inferred, two ready or being made, and as many around a swap; more are not kept


@dataclass(frozen=True, slots=True)
class Letterbox:
    """Where an image lies inside a model's input, in pixels: `height` x `width`, `left` and `top` from the corner."""

    height: int
    width: int
    left: int
    top: int
    scale: float

    @classmethod
    def fit(cls, image: tuple[int, int], size: tuple[int, int]) -> Letterbox:
        """Centre an image of (height, width) pixels in an input of `size` (height, width), keeping its aspect.

        Rounds as training does: each side on its own, and an odd pixel of padding goes right or below.
        """
        scale = min(size[0] / image[0], size[1] / image[1])
        height, width = max(round(image[0] * scale), 1), max(round(image[1] * scale), 1)
        top, left = round((size[0] - height) / 2 - 0.1), round((size[1] - width) / 2 - 0.1)
        return cls(height, width, left, top, scale)

    @property
    def rows(self) -> slice:
        """The rows of the input that the image fills."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """The columns of the input that the image fills."""
        return slice(self.left, self.left + self.width)

    def restore(self, points: NDArray[Any], image: tuple[int, int]) -> NDArray[np.float32]:
        """Points (..., 2) x y in model pixels as pixels of the image (height, width), clipped to it.

        Boxes (n, 4) x1 y1 x2 y2 are two points each.
        """
        times = points.shape[-1] // 2
        gain = np.array([self.width / image[1], self.height / image[0]] * times, dtype=np.float32)
        offset = np.array([self.left, self.top] * times, dtype=np.float32)
        limit = np.array([image[1], image[0]] * times, dtype=np.float32)
        return np.asarray(np.clip((points - offset) / gain, 0, limit), dtype=np.float32)


def check_image(image: Image) -> None:
    """Refuse what is no picture as OpenCV decodes it; raises EngineError."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise EngineError(
            f"image of shape {image.shape} and type {image.dtype}: expected (height, width, 3) uint8, not empty"
        )


def image_stats(content: Image) -> ImageStats:
    """Statistics of the pixels that the model sees, BGR without padding; all scaled to 0..1 of the grey range."""
    grey = cv2.cvtColor(content, cv2.COLOR_BGR2GRAY)
    mean, deviation = cv2.meanStdDev(grey)
    edges = cv2.convertScaleAbs(cv2.Laplacian(grey, cv2.CV_16S))  # clipped at 255: sharper is not told apart
    low, high = _levels(grey, (EXTREME, 1 - EXTREME))
    (sharpness,) = _levels(edges, (1 - EXTREME,))
    return ImageStats(float(mean[0, 0]) / 255, float(deviation[0, 0]) / 255, sharpness, low, high)


def _levels(grey: Any, shares: Sequence[float]) -> list[float]:
    """The levels, scaled to 0..1, below which these shares of the pixels lie; from a histogram, one pass."""
    below = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel().cumsum()
    return [int(np.searchsorted(below, share * grey.size)) / 255 for share in shares]


class Ring:
    """Arrays of one shape and type that are used again once nobody but the ring refers to them.

    A `Prepared` that lives longer than usual, because its item waits or a swap came between, keeps its array: then a new
    one is made. Any thread may take one.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self._shape, self._dtype = shape, np.dtype(dtype)
        self._arrays: list[NDArray[Any]] = []
        self._bars: list[Letterbox | None] = []  # what each array's bars were written for
        self._lock = threading.Lock()
        held = [object()]
        self._alone = sys.getrefcount(held[0])  # of something that only a list refers to; counts the argument too

    def take(self) -> NDArray[Any]:
        """An array that nobody uses; what it holds is old."""
        with self._lock:
            return self._free()[0]

    def take_barred(self, place: Letterbox, bar: float) -> NDArray[Any]:
        """The same, with the value `bar` wherever `place` is not."""
        with self._lock:
            array, index = self._free()
            if index is None or self._bars[index] != place:
                array.fill(bar)
            if index is not None:
                self._bars[index] = place
            return array

    def _free(self) -> tuple[NDArray[Any], int | None]:
        for index in range(len(self._arrays)):
            # Views of an array hold a reference to it, so one number tells of every use. CPython counts at once.
            if sys.getrefcount(self._arrays[index]) == self._alone:
                return self._arrays[index], index
        array = np.empty(self._shape, self._dtype)
        if len(self._arrays) >= BUFFERS_MAX:
            return array, None
        self._arrays.append(array)
        self._bars.append(None)
        return array, len(self._arrays) - 1


class Letterboxer:
    """Makes a detector's inputs. `form` is what the model takes: `float32` (3, height, width) RGB in 0..1, or `uint8`
    (height, width, 3) BGR, with layout and normalisation inside the graph."""

    def __init__(self, size: tuple[int, int], form: str) -> None:
        self._size, self._form = size, form
        self.spec = (*size, form)
        self._ring = Ring((*size, 3) if form == "uint8" else (3, *size), form)

    def prepare(self, image: Image) -> Prepared:
        """Letterbox `image` (height, width, 3) BGR uint8; raises EngineError when it is something else."""
        check_image(image)
        place = Letterbox.fit((image.shape[0], image.shape[1]), self._size)
        if self._form == "uint8":
            tensor = self._ring.take_barred(place, PAD_VALUE)
            content = tensor[place.rows, place.columns]
            cv2.resize(image, (place.width, place.height), dst=content, interpolation=cv2.INTER_LINEAR)
        else:
            tensor = self._ring.take_barred(place, float(np.float32(PAD_VALUE) / np.float32(255)))
            content = _resized(image, place)
            to_planes(content, tensor[:, place.rows, place.columns])
        pad = (float(place.left), float(place.top))
        return Prepared(image, tensor, self.spec, place.scale, pad, image_stats(content))


def _resized(image: Image, place: Letterbox) -> Image:
    if image.shape[:2] == (place.height, place.width):
        return image
    return cv2.resize(image, (place.width, place.height), interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]


def to_planes(content: Image, planes: NDArray[np.float32]) -> None:
    """Write BGR pixels (height, width, 3) into `planes` (3, height, width), RGB in 0..1."""
    # Splitting first makes every division run over contiguous bytes: several times faster than a transpose.
    for plane, channel in zip(planes, reversed(cv2.split(content)), strict=True):
        np.divide(channel, np.float32(255), out=plane)
