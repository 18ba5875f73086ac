"""What a training of a YOLO follows; light, so that it can be checked without the heavy libraries."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run: where its weights are, how many parameters were trained of how many, the last epoch's losses."""

    path: Path
    trainable: int
    parameters: int
    metrics: dict[str, float]


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


def overrides(settings: TrainSettings, start: str, scratch: Path) -> dict[str, Any]:
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


def threads(settings: TrainSettings) -> int:
    if settings.threads:
        return settings.threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
