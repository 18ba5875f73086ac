"""Training YOLO detectors: from scratch, further, and with PEFT LoRA on the convolutions.

Heavy libraries are imported inside the functions, so that settings can be checked without them. Nothing here uses the
network. A training belongs in a process of its own: ultralytics seeds and configures its whole process.
"""

from __future__ import annotations

import atexit
import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.tuners.settings import LoraSettings

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")

OnEpoch = Callable[[int, int, dict[str, float]], None]  # epoch (from 1), epochs, losses and learning rate


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What a training run follows besides its data; `augment` takes ultralytics' own augmentation keys."""

    epochs: int
    imgsz: int = 160  # pixels, a multiple of 32
    batch: int = 32
    lr: float = 0.002  # AdamW's, at its highest
    lr_final: float = 0.05  # share of `lr` in the last epoch
    warmup_epochs: float = 0.5
    weight_decay: float = 0.0005
    seed: int = 0
    threads: int = 0  # 0: all cores
    augment: Mapping[str, float] = field(default_factory=dict)


# Ultralytics' own augmentations that would spoil text and digits (flips, mosaic's cut glyphs) are off.
_AUGMENT: dict[str, float] = {
    "mosaic": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "fliplr": 0.0,
    "flipud": 0.0,
    "hsv_h": 0.015,
    "hsv_s": 0.3,
    "hsv_v": 0.2,
    "translate": 0.1,
    "scale": 0.15,
    "degrees": 0.0,
}


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run: where its weights are, how many parameters were trained of how many, the last epoch's losses."""

    path: Path
    trainable: int
    parameters: int
    metrics: dict[str, float]


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


def train_full(
    dataset: Path, start: str | Path, out: Path, settings: TrainSettings, on_epoch: OnEpoch | None = None
) -> Trained:
    """Train every weight of `start` (a .pt, or a network such as "yolo11n.yaml") on `dataset` (folder or yaml); save
    to `out`.

    Raises ValueError for unusable settings or data, FileNotFoundError for a missing file.
    """
    return _run(dataset, start, out, settings, None, on_epoch)


def tune_lora(
    base: Path,
    dataset: Path,
    out: Path,
    lora: LoraSettings,
    settings: TrainSettings,
    on_epoch: OnEpoch | None = None,
) -> Trained:
    """Fine-tune the .pt `base` with LoRA on its convolutions, its batch-norm training too; save it merged to `out`.

    "all" of `target_modules` are the ungrouped convolutions; `bias` concerns the few that have one, the head's last.
    The result has the base's structure and no trace of LoRA. Raises as `train_full`, and SettingsError when
    `target_modules` match nothing or a layer that cannot be adapted.
    """
    return _run(dataset, base, out, settings, lora, on_epoch)


def weights_sha256(checkpoint: Path) -> str:
    """Identity of the weights in a .pt file: its tensors by name. The file's own hash changes with every save.

    Raises FileNotFoundError for a missing file.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"model {checkpoint} does not exist; give the path of a .pt file")
    prepare_process()
    from ultralytics import YOLO

    digest = hashlib.sha256()
    for name, tensor in sorted(YOLO(str(checkpoint)).model.state_dict().items()):
        values = tensor.float().cpu().numpy()
        digest.update(f"{name}{values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


def prepare_process() -> None:
    """Keep ultralytics from the network and from the user's home; call before the first import of it or of torch."""
    if "YOLO_CONFIG_DIR" not in os.environ:
        config = tempfile.mkdtemp(prefix="edged-ultralytics-")
        atexit.register(shutil.rmtree, config, ignore_errors=True)
        os.environ["YOLO_CONFIG_DIR"] = config
    os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="0", YOLO_VERBOSE="false")
    # Threads that wait for each other sleep: spinning, they would starve whatever else runs on the trainer's cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _run(
    dataset: Path,
    start: str | Path,
    out: Path,
    settings: TrainSettings,
    lora: LoraSettings | None,
    on_epoch: OnEpoch | None,
) -> Trained:
    data = _read_dataset(dataset)
    if str(start).endswith(".pt") and not Path(start).is_file():
        raise FileNotFoundError(f"model {start} does not exist; give the path of a .pt file")
    out.parent.mkdir(parents=True, exist_ok=True)
    prepare_process()
    from trainer.tuners.yolo_loop import run_training

    scratch = out.resolve().with_name(f".{out.stem}-run")
    try:
        return run_training(data, _overrides(settings, str(start), scratch), _threads(settings), lora, out, on_epoch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _overrides(settings: TrainSettings, start: str, scratch: Path) -> dict[str, Any]:
    if settings.epochs < 1 or settings.batch < 1:
        raise ValueError(f"epochs={settings.epochs}, batch={settings.batch}: both must be 1 or more")
    if settings.imgsz < 32 or settings.imgsz % 32:
        raise ValueError(f"imgsz={settings.imgsz}: use a multiple of 32 pixels")
    return {
        **_AUGMENT,
        **settings.augment,
        "model": start,
        "data": "given",  # the data set is handed over in memory
        "epochs": settings.epochs,
        "imgsz": settings.imgsz,
        "batch": settings.batch,
        "nbs": settings.batch,  # one optimiser step a batch
        "optimizer": "AdamW",
        "lr0": settings.lr,
        "lrf": settings.lr_final,
        "momentum": 0.9,
        "cos_lr": True,
        "warmup_epochs": settings.warmup_epochs,
        "warmup_bias_lr": 0.0,
        "weight_decay": settings.weight_decay,
        "seed": settings.seed,
        "deterministic": True,
        "device": "cpu",
        "workers": 0,
        "cache": "ram",
        "amp": False,
        "patience": 0,
        "val": False,
        "save": False,
        "plots": False,
        "verbose": False,
        "project": str(scratch),
        "name": "run",
        "exist_ok": True,
    }


def _threads(settings: TrainSettings) -> int:
    if settings.threads:
        return settings.threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_dataset(dataset: Path) -> dict[str, Any]:
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
