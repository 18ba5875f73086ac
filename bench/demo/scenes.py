"""The demo's world: real handwritten digits on real photos, and the ways in which the camera's picture goes bad.

Digits are scikit-learn's `load_digits`, photos its `load_sample_images`: real pixels that ship with a package. Splits
share no digit instance and no photo region, so what a model learned on one split cannot be recognised in another.
Everything follows from an integer seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (height, width, 3), BGR
Floats = NDArray[np.float32]

SIZE = 160  # pixels, height and width of a scene
LABELS: tuple[str, ...] = tuple("0123456789")
DIGITS = (2, 4)  # at least and at most, in a scene

# Shares of the digit instances, in twentieths (an instance belongs to the slot `index % 20`), and of every photo's
# width: one vertical band a split. The line goes on looking at the same place: `after` has the stream's band, but digits
# of its own, so that what was learned from the stream's digits is scored on others.
_SLOTS = {
    "train": range(13),
    "holdout": range(13, 15),
    "calibration": range(15, 17),
    "stream": range(17, 19),
    "after": range(19, 20),
}
_BANDS = {
    "train": (0.0, 0.43),
    "holdout": (0.43, 0.62),
    "calibration": (0.62, 0.81),
    "stream": (0.81, 1.0),
    "after": (0.81, 1.0),
}
SPLITS: tuple[str, ...] = tuple(_SLOTS)

_HEIGHT_MIN, _HEIGHT_MAX = 33.0, 48.0  # pixels, a digit's cell before its rotation
_DARK_INK = 0.1  # share of the digits that are dark on light
_GAP = 4.0  # pixels, the least distance of two digits' boxes
_PLACE_TRIES = 60
_SHIFT_STREAM = 1  # second word of a scene's seed: pixels' shift draws from its own stream, so truth never moves


@dataclass(frozen=True, slots=True)
class Scene:
    """One image with its truth: `boxes` (n, 4) float32 x1 y1 x2 y2 in pixels, `classes` (n,) int64 into LABELS."""

    image: Image
    boxes: Floats
    classes: NDArray[np.int64]


def digit_indices(split: str) -> list[int]:
    """The indices into `load_digits` that belong to `split`; raises ValueError for an unknown split."""
    slots = _SLOTS[_known_split(split)]
    return [index for index in range(len(_digits()[1])) if index % 20 in slots]


def photo_band(split: str, width: int) -> tuple[int, int]:
    """First and one-past-last column of `split` in a photo `width` pixels wide; ValueError for an unknown split."""
    low, high = _BANDS[_known_split(split)]
    return round(low * width), round(high * width)


def make_scenes(
    split: str, count: int, seed: int, shift: str | None = None, digits: tuple[int, int] = DIGITS
) -> list[Scene]:
    """`count` scenes of `split`; the same seed gives the same truth with every `shift` (a key of SHIFTS, or None).

    `digits` bounds how many a scene holds. Raises ValueError for an unknown split or shift.
    """
    number = SPLITS.index(_known_split(split))
    if shift is not None and shift not in SHIFTS:
        raise ValueError(f"shift {shift!r} is unknown; use one of {', '.join(SHIFTS)}, or None for clean scenes")
    scenes = []
    for index in range(count):
        scene = _draw_scene(split, digits, np.random.default_rng([seed, 0, number, index]))
        if shift is not None:
            image = SHIFTS[shift](scene.image, np.random.default_rng([seed, _SHIFT_STREAM, number, index]))
            scene = Scene(image, scene.boxes, scene.classes)
        scenes.append(scene)
    return scenes


def encode_png(image: Image) -> bytes:
    """`image` as PNG, which gives back exactly these pixels."""
    done, data = cv2.imencode(".png", image)
    if not done:
        raise ValueError(f"image of shape {image.shape} and type {image.dtype} cannot be encoded as PNG")
    return data.tobytes()


def decode_png(data: bytes) -> Image:
    """The pixels of a PNG (BGR); raises ValueError when `data` is not an image."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{len(data)} bytes are not an image that can be decoded")
    return np.asarray(image, np.uint8)


def _known_split(split: str) -> str:
    if split not in _SLOTS:
        raise ValueError(f"split {split!r} is unknown; use one of {', '.join(_SLOTS)}")
    return split


@lru_cache(maxsize=1)
def _digits() -> tuple[Floats, NDArray[np.int64]]:
    """Ink of every digit (n, 8, 8) in 0..1, and its class."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return (bunch.images / 16.0).astype(np.float32), bunch.target.astype(np.int64)


@lru_cache(maxsize=1)
def _photos() -> tuple[Image, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(np.ascontiguousarray(photo[:, :, ::-1]) for photo in load_sample_images().images)


@lru_cache(maxsize=len(_SLOTS))
def _pool(split: str) -> list[int]:
    return digit_indices(split)


def _background(split: str, rng: np.random.Generator) -> Floats:
    """A crop of one photo's band, zoomed to the scene's size, (SIZE, SIZE, 3) in 0..255."""
    photos = _photos()
    photo = photos[int(rng.integers(len(photos)))]
    low, high = photo_band(split, photo.shape[1])
    side = int(rng.integers(80, min(high - low, 120) + 1))
    left = int(rng.integers(low, high - side + 1))
    top = int(rng.integers(0, photo.shape[0] - side + 1))
    crop = cv2.resize(photo[top : top + side, left : left + side], (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return crop.astype(np.float32)


def _ink(digit: Floats, rng: np.random.Generator) -> Floats:
    """One digit enlarged, stretched and slightly rotated, cut to its ink: opacity in 0..1, (height, width)."""
    height = float(rng.uniform(_HEIGHT_MIN, _HEIGHT_MAX))
    width = height * float(rng.uniform(0.9, 1.1))
    angle = float(rng.uniform(-5, 5))
    side = int(np.ceil(1.5 * max(height, width)))
    turn = cv2.getRotationMatrix2D((3.5, 3.5), angle, 1.0)
    stretch = np.array([[width / 8, 0, side / 2 - 3.5 * width / 8], [0, height / 8, side / 2 - 3.5 * height / 8]])
    matrix = stretch[:, :2] @ turn
    matrix[:, 2] += stretch[:, 2]
    ink = cv2.warpAffine(digit, matrix, (side, side), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT)
    ink = np.clip((ink - 0.2) / 0.6, 0, 1).astype(np.float32)  # opens the small loops that 8 x 8 pixels half fill
    rows, columns = np.nonzero(ink.max(1) > 0.25)[0], np.nonzero(ink.max(0) > 0.25)[0]
    return np.ascontiguousarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _place(height: int, width: int, taken: list[Floats], rng: np.random.Generator) -> Floats | None:
    """A free box of this size, or None when the scene is too full."""
    for _ in range(_PLACE_TRIES):
        left, top = float(rng.integers(2, SIZE - width - 1)), float(rng.integers(2, SIZE - height - 1))
        box = np.array([left, top, left + width, top + height], np.float32)
        if all(
            box[0] > other[2] + _GAP or other[0] > box[2] + _GAP or box[1] > other[3] + _GAP or other[1] > box[3] + _GAP
            for other in taken
        ):
            return box
    return None


def _draw_scene(split: str, digits: tuple[int, int], rng: np.random.Generator) -> Scene:
    images, targets = _digits()
    canvas = _background(split, rng)
    boxes: list[Floats] = []
    classes: list[int] = []
    for _ in range(int(rng.integers(digits[0], digits[1] + 1))):
        index = int(rng.choice(_pool(split)))
        ink = _ink(images[index], rng)
        box = _place(ink.shape[0], ink.shape[1], boxes, rng)
        if box is None:
            continue
        _paint(canvas, ink, box, rng)
        boxes.append(box)
        classes.append(int(targets[index]))
    image = np.clip(np.rint(canvas * float(rng.uniform(0.55, 1.0))), 0, 255).astype(np.uint8)  # the day's light
    return Scene(image, np.stack(boxes), np.array(classes, np.int64))


def _paint(canvas: Floats, ink: Floats, box: Floats, rng: np.random.Generator) -> None:
    """Draw light ink over a soft shadow that keeps it readable on every photo, or seldom dark ink over a soft glow."""
    x1, y1, x2, y2 = (int(value) for value in box)
    shadow = np.zeros((SIZE, SIZE), np.float32)
    shadow[y1:y2, x1:x2] = ink
    around = cv2.GaussianBlur(cv2.dilate(shadow, np.ones((5, 5), np.uint8)), (0, 0), 2.5)[:, :, None] * 0.75
    colour, ground = rng.uniform(190, 255, 3), np.zeros(3)
    if rng.random() < _DARK_INK:
        colour, ground = 255 - colour, 255 - ground
    canvas += (ground.astype(np.float32) - canvas) * around
    opacity = ink[:, :, None]
    canvas[y1:y2, x1:x2] += (colour.astype(np.float32) - canvas[y1:y2, x1:x2]) * opacity


def _dark(image: Image, rng: np.random.Generator) -> Image:
    """Little light: dim, with the sensor's noise."""
    dim = image.astype(np.float32) * float(rng.uniform(0.3, 0.4))
    return np.clip(np.rint(dim + rng.normal(0, 8, image.shape)), 0, 255).astype(np.uint8)


def _blur(image: Image, rng: np.random.Generator) -> Image:
    """A lens out of focus."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), float(rng.uniform(2.3, 2.8))), np.uint8)


def _invert(image: Image, rng: np.random.Generator) -> Image:
    """Faded dark print on light parts where it was light print on dark ones."""
    return np.asarray(np.rint(255 - image.astype(np.float32) * float(rng.uniform(0.36, 0.5))), np.uint8)


def _mix(image: Image, rng: np.random.Generator) -> Image:
    return (_dark, _blur, _invert)[int(rng.integers(3))](image, rng)


# Each changes pixels only: the truth of a shifted scene is that of the clean one.
SHIFTS: dict[str, Callable[[Image, np.random.Generator], Image]] = {
    "dark": _dark,
    "blur": _blur,
    "invert": _invert,
    "mix": _mix,
}
