"""A part of the frame that is a pipeline's whole world, and what a crop looks like to the de-duplication."""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np

from edged.config import WHOLE, Roi
from edged.core.dedupe import NOBODY, Look
from edged.engines.base import Detections, Image

HASH_SIDE = 8  # gradients a row, and rows
GRADIENT_MIN = 2  # grey levels of 255: less is noise, and noise has no look


def cut(image: Image, roi: Roi) -> tuple[Image, tuple[int, int]]:
    """The part of the image inside `roi`, at least one pixel, and its (left, top) corner in pixels of the image."""
    if roi == WHOLE:
        return image, (0, 0)
    height, width = image.shape[:2]
    left, top = math.floor(roi[0] * width), math.floor(roi[1] * height)
    right, bottom = math.ceil(roi[2] * width), math.ceil(roi[3] * height)
    return np.ascontiguousarray(image[top:bottom, left:right]), (left, top)


def shifted(found: Detections, corner: tuple[int, int]) -> Detections:
    """Detections in pixels of a part, in pixels of the whole image: `corner` is where the part lies in it."""
    if corner == (0, 0):
        return found
    offset = np.array(corner, np.float32)
    outlines = None if found.outlines is None else tuple(outline + offset for outline in found.outlines)
    return replace(found, boxes=found.boxes + np.tile(offset, 2), outlines=outlines)


def looks(image: Image, answered: Detections) -> list[Look]:
    """What each box of an answer looks like, best first; without any, what the whole image looks like."""
    height, width = image.shape[:2]
    if not len(answered):
        return [_look(image, NOBODY)]
    out = []
    for (x1, y1, x2, y2), label in zip(answered.boxes.tolist(), answered.classes.tolist(), strict=True):
        left, top = min(max(math.floor(x1), 0), width - 1), min(max(math.floor(y1), 0), height - 1)
        right, bottom = max(math.ceil(x2), left + 1), max(math.ceil(y2), top + 1)
        out.append(_look(image[top:bottom, left:right], label))
    return out


def _look(crop: Image, label: int) -> Look:
    """dHash (N. Krawetz, "Kind of like that", 2013): which of 8 x 8 pixels is lighter than its left neighbour."""
    grey = cv2.cvtColor(np.ascontiguousarray(crop), cv2.COLOR_BGR2GRAY)
    small = cv2.resize(grey, (HASH_SIDE + 1, HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.int16)
    lighter = small[:, 1:] - small[:, :-1] >= GRADIENT_MIN
    return Look(int.from_bytes(np.packbits(lighter).tobytes(), "big"), float(small.mean()), label)
