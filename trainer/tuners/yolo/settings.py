"""What a training of a YOLO follows; light, so that it can be checked without the heavy libraries."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.tuners.settings import DEVICE, LoraSettings, SettingsError

Task = Literal["detect", "segment", "classify"]
Method = Literal["lora", "head", "full"]

OnEpoch = Callable[[int, int, dict[str, float]], None]  # epoch (from 1), epochs, losses and learning rate

WORKERS_MAX = 8  # processes that read images for a GPU


class YoloSettings(BaseModel):
    """How a YOLO is trained.

    `method`: "lora" adapts the convolutions (`lora`) and trains the batch norms, "head" trains the last module alone,
    "full" every weight. Layers that the base does not have, because a class is new, train whole with every method.
    `augment` takes ultralytics' own augmentation keys; those that are not named are off or small, and nothing is
    flipped or cut, which would spoil text and digits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: Annotated[tuple[str, ...], Field(min_length=1)]
    task: Task = "detect"
    method: Method = "lora"
    lora: LoraSettings = LoraSettings()
    epochs: Annotated[int, Field(ge=1, le=10000)] = 10
    imgsz: Annotated[int, Field(ge=32, le=4096, multiple_of=32)] = 640  # pixels
    batch: Annotated[int, Field(ge=1, le=4096)] = 32  # images an optimizer step, of all processes together
    lr: Annotated[float, Field(gt=0, lt=1)] = 0.002  # AdamW's, at its highest
    lr_final: Annotated[float, Field(gt=0, le=1)] = 0.05  # share of `lr` in the last epoch
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0005
    patience: Annotated[int, Field(ge=0)] = 0  # epochs without a lower held-out loss until it stops; 0: it does not
    replay_ratio: Annotated[float, Field(ge=0, le=100)] = 1.0  # images of the base's data for each new image
    augment: Mapping[str, float] = {}
    device: Annotated[str, Field(pattern=DEVICE)] = "auto"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # on a CPU; 0: all cores
    workers: Annotated[int, Field(ge=0, le=64)] = WORKERS_MAX  # processes that read images; none on a CPU

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> YoloSettings:
        """Settings from configuration; raises SettingsError naming every wrong key, its value and what it must be."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            lines = []
            for item in error.errors():
                key = ".".join(str(part) for part in item["loc"])
                fix = f"; known keys are {', '.join(cls.model_fields)}" if item["type"] == "extra_forbidden" else ""
                lines.append(f"yolo.{key} = {item.get('input')!r}: {item['msg']}{fix}")
        raise SettingsError("; ".join(lines))


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What `train_full` and `tune_lora` follow besides a data set that is in files already: see YoloSettings."""

    epochs: int
    imgsz: int = 160  # pixels, a multiple of 32
    batch: int = 32
    lr: float = 0.002
    lr_final: float = 0.05
    warmup_epochs: float = 0.5
    weight_decay: float = 0.0005
    seed: int = 0
    threads: int = 0  # 0: all cores
    augment: Mapping[str, float] = field(default_factory=dict)

    def settings(self, labels: tuple[str, ...], method: Method, lora: LoraSettings) -> YoloSettings:
        """The same for a detector with these labels; raises ValueError for numbers that are out of range."""
        if self.epochs < 1 or self.batch < 1:
            raise ValueError(f"epochs={self.epochs}, batch={self.batch}: both must be 1 or more")
        if self.imgsz < 32 or self.imgsz % 32:
            raise ValueError(f"imgsz={self.imgsz}: use a multiple of 32 pixels")
        return YoloSettings.parse({
            "labels": labels, "method": method, "lora": lora, "epochs": self.epochs, "imgsz": self.imgsz,
            "batch": self.batch, "lr": self.lr, "lr_final": self.lr_final, "warmup_epochs": self.warmup_epochs,
            "weight_decay": self.weight_decay, "threads": self.threads, "augment": dict(self.augment), "device": "cpu",
        })  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run: where its weights are, how many parameters were trained of how many, the last epoch's losses."""

    path: Path
    trainable: int
    parameters: int
    metrics: dict[str, float]


# Ultralytics' own augmentations that would spoil text and digits (flips, mosaic's cut glyphs) are off.
_AUGMENT: dict[str, Any] = {
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
    "erasing": 0.0,  # the last two: of classifiers
    "auto_augment": None,
}


def overrides(settings: YoloSettings, start: str, scratch: Path, seed: int, batch: int) -> dict[str, Any]:
    """Ultralytics' own keys for a training of `start` whose memory holds `batch` images at once."""
    return {
        **_AUGMENT,
        **settings.augment,
        "task": settings.task,
        "model": start,
        "data": "given",  # the data set is handed over in memory
        "epochs": settings.epochs,
        "imgsz": settings.imgsz,
        "batch": batch,
        "nbs": settings.batch,  # one optimizer step for so many images
        "optimizer": "AdamW",
        "lr0": settings.lr,
        "lrf": settings.lr_final,
        "momentum": 0.9,
        "cos_lr": True,
        "warmup_epochs": settings.warmup_epochs,
        "warmup_bias_lr": 0.0,
        "weight_decay": settings.weight_decay,
        "patience": settings.patience,
        "seed": seed,
        "deterministic": True,
        "workers": settings.workers,
        "cache": "ram",
        "amp": False,
        "val": False,
        "save": True,
        "plots": False,
        "verbose": False,
        "project": str(scratch.resolve()),  # a relative one would be the library's, below its own folder of runs
        "name": "run",
        "exist_ok": True,
    }


def threads(settings: YoloSettings) -> int:
    """How many threads torch may use."""
    if settings.threads:
        return settings.threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
