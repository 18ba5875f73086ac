"""The demo's own detectors: a base that knows clean scenes, and a teacher that knows shifted ones too.

Both are trained here from scratch, because no weights can be fetched, and kept under the hash of their recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.demo.scenes import LABELS, SHIFTS, SIZE, Scene, decode_png, encode_png, make_scenes
from bench.kept import kept
from trainer.tuners.yolo import TrainSettings, train_full, write_yolo_dataset

NETWORK = "yolo11n.yaml"

Item = tuple[str, bytes, NDArray[np.float32], NDArray[np.int64]]  # name, PNG, boxes, classes
Say = Callable[[str], None]  # takes one line of progress


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is made; every value is part of its cache key."""

    clean: int  # scenes
    shifted: int  # scenes, of every shift in turn
    epochs: int
    lr: float
    batch: int
    hsv_v: float  # how much ultralytics varies brightness
    warmup_epochs: float


BASE = Recipe(clean=1400, shifted=0, epochs=12, lr=0.002, batch=32, hsv_v=0.3, warmup_epochs=0.5)
TEACHER = Recipe(clean=400, shifted=1200, epochs=9, lr=0.001, batch=32, hsv_v=0.3, warmup_epochs=0.2)

# The teacher's scenes come from their own seed, so that they are not the base's scenes again.
_TEACHER_SEED = 1_000_003


def make_base(build: Path, seed: int, say: Say = print) -> Path:
    """The .pt of a detector trained from scratch on clean `train` scenes; made once a seed and recipe, then reused."""
    return _make("base", NETWORK, build, seed, BASE, say)


def make_teacher(build: Path, seed: int, say: Say = print) -> Path:
    """The .pt of the base trained on, with clean and shifted `train` scenes; made once a seed and recipe."""
    base = make_base(build, seed, say)
    return _make("teacher", str(base), build, seed + _TEACHER_SEED, TEACHER, say)


def replay_items(seed: int, count: int) -> Iterator[Item]:
    """`count` of the clean scenes that the base of `seed` learned from, for replay while it learns something new.

    Raises ValueError for more than the base saw.
    """
    if count > BASE.clean:
        raise ValueError(f"replay of {count} scenes: the base was trained on {BASE.clean}; ask for that many or fewer")
    return as_items(make_scenes("train", count, seed), "clean")


def as_items(given: Iterable[Scene], prefix: str) -> Iterator[Item]:
    """Scenes as `write_yolo_dataset` takes them, named `prefix` and a number."""
    for index, scene in enumerate(given):
        yield f"{prefix}-{index:05d}", encode_png(scene.image), scene.boxes, scene.classes


def _make(name: str, start: str, build: Path, seed: int, recipe: Recipe, say: Say) -> Path:
    out = build / f"{name}-{_key(start, seed, recipe)}.pt"
    if out.is_file():
        say(f"{name}: made before, {out}")
        return out
    settings = TrainSettings(
        epochs=recipe.epochs,
        imgsz=SIZE,
        batch=recipe.batch,
        lr=recipe.lr,
        warmup_epochs=recipe.warmup_epochs,
        seed=seed,
        augment={"hsv_v": recipe.hsv_v},
    )

    def make(beside: Path) -> None:
        say(f"{name}: drawing {recipe.clean} clean and {recipe.shifted} shifted scenes")
        data = write_yolo_dataset(beside.with_suffix(".data"), _training_items(recipe, seed), LABELS)
        train_full(
            data,
            start,
            beside,
            settings,
            lambda epoch, epochs, losses: say(f"{name}: epoch {epoch}/{epochs}, loss {losses['loss']:.3f}"),
        )

    return kept(out, make)


def _training_items(recipe: Recipe, seed: int) -> Iterator[Item]:
    yield from as_items(make_scenes("train", recipe.clean, seed), "clean")
    shifts = [shift for shift in SHIFTS if shift != "mix"]
    for number, shift in enumerate(shifts, start=1):
        share = recipe.shifted // len(shifts)
        yield from as_items(make_scenes("train", share, seed + number, shift), shift)


def _key(start: str, seed: int, recipe: Recipe) -> str:
    """Names a model by all that shapes it: where it starts, its recipe, its seed, and pixels as they are drawn now."""
    told = hashlib.sha256(json.dumps([Path(start).name, asdict(recipe), seed], sort_keys=True).encode())
    for _, png, boxes, _ in _training_items(
        replace(recipe, clean=min(recipe.clean, 8), shifted=min(recipe.shifted, 24)), seed
    ):
        told.update(decode_png(png).tobytes() + boxes.tobytes())
    return told.hexdigest()[:16]
