"""Overfit YOLO checkpoints (.pt), kept below build/ so that only the first run makes them."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

from bench import photos
from bench.kept import kept

SIZE = 128  # of the inputs, in pixels


def checkpoint(network: str) -> Path:
    """The .pt of a network such as "yolo11n-seg.yaml" that surely answers `bench.photos.photos()`."""
    told = hashlib.sha256(Path(photos.__file__).read_bytes() + f"{network} {SIZE} {version('ultralytics')}".encode())
    out = photos.CACHE / f"{Path(network).stem}-{SIZE}-{told.hexdigest()[:12]}.pt"
    return kept(out, lambda beside: photos._train(network, SIZE, beside))
