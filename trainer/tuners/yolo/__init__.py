"""YOLO: detectors, segmenters and classifiers, with LoRA, by their head or whole. Imported when first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainer.tuners.base import Tuner, register
from trainer.tuners.yolo.settings import YoloSettings

if TYPE_CHECKING:
    from trainer.tuners.yolo.data import Example, outline_of, write_yolo_dataset
    from trainer.tuners.yolo.process import prepare_process
    from trainer.tuners.yolo.settings import Trained, TrainSettings
    from trainer.tuners.yolo.tune import train_full, tune_lora, weights_sha256

__all__ = [
    "Example",
    "TrainSettings",
    "Trained",
    "YoloSettings",
    "outline_of",
    "prepare_process",
    "train_full",
    "tune_lora",
    "weights_sha256",
    "write_yolo_dataset",
]

_HOMES = {
    "Example": "data",
    "TrainSettings": "settings",
    "Trained": "settings",
    "outline_of": "data",
    "prepare_process": "process",
    "train_full": "tune",
    "tune_lora": "tune",
    "weights_sha256": "tune",
    "write_yolo_dataset": "data",
}

register(Tuner("yolo", ("detect", "segment", "classify"), YoloSettings))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
