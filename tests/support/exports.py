"""Exports of ultralytics as releases, and what ultralytics itself makes of them: the two sides of every comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from bench.photos import LABELS, photos
from edged.engines.base import Image
from edged.wire.manifest import ReleaseManifest
from trainer.releases import file_entry

SIZE = 128  # of the inputs, in pixels
SCORE, IOU = 0.25, 0.7
BOXES_MIN = 20  # on each side: a comparison of nothing with nothing proves nothing
SHAPES = ((160, 160), (427, 640), (300, 101), (97, 200), (33, 160), (160, 161))  # height, width


def pictures() -> list[Image]:
    """The photos, and one of them in sizes that letterbox in every way: square, wide, tall, odd, enlarged, a pixel off."""
    resized = [cv2.resize(photos()[2], (width, height)) for height, width in SHAPES]
    return [*photos(), *resized]  # type: ignore[list-item]


def release(path: Path, kind: str, **more: Any) -> ReleaseManifest:
    """The manifest of a folder that holds only this export."""
    return ReleaseManifest(
        release="parity@1.0",
        kind=kind,  # type: ignore[arg-type]
        engine=f"onnx_{kind}",
        files={"model": file_entry(path)},
        labels=list(LABELS),
        input_size=(SIZE, SIZE),
        created="2026-01-01T00:00:00Z",
        **more,
    )


def predicted(path: Path, kind: str, image: Image) -> Any:
    """Ultralytics' result for one image, from the same file."""
    return _yolo(path, kind).predict(image, conf=SCORE, iou=IOU, imgsz=SIZE, verbose=False)[0]


_loaded: dict[Path, Any] = {}


def _yolo(path: Path, kind: str) -> Any:
    from ultralytics import YOLO  # after bench.photos has prepared the process

    if path not in _loaded:
        _loaded[path] = YOLO(path, task=kind)
    return _loaded[path]


def covered(polygon: np.ndarray, side: int) -> np.ndarray:
    """The pixels (side, side) whose centres a polygon (k, 2) surrounds, by the even-odd rule."""
    inside = np.zeros((side, side), dtype=bool)
    start, end = polygon, np.roll(polygon, -1, axis=0)
    centres = np.arange(side) + 0.5
    for row, y in enumerate(centres):
        crossed = (start[:, 1] < y) != (end[:, 1] < y)
        along = (y - start[crossed, 1]) / (end[crossed, 1] - start[crossed, 1])
        places = start[crossed, 0] + along * (end[crossed, 0] - start[crossed, 0])
        inside[row] = (places[None] < centres[:, None]).sum(axis=1) % 2
    return inside
