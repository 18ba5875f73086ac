"""Overfit YOLO checkpoints (.pt), kept below build/ so that only the first run makes them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

from bench import photos

SIZE = 128  # of the inputs, in pixels


def checkpoint(network: str) -> Path:
    """The .pt of a network such as "yolo11n-seg.yaml" that surely answers `bench.photos.photos()`."""
    told = hashlib.sha256(Path(photos.__file__).read_bytes() + f"{network} {SIZE} {version('ultralytics')}".encode())
    out = photos.CACHE / f"{Path(network).stem}-{SIZE}-{told.hexdigest()[:12]}.pt"
    if not out.is_file():
        photos.CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=photos.CACHE) as scratch:
            photos._train(network, SIZE, Path(scratch) / "model.pt")
            os.replace(Path(scratch) / "model.pt", out)
    return out
