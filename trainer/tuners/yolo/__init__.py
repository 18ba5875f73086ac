"""YOLO: from scratch, further, and with LoRA. Everything is imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.tuners.yolo.data import write_yolo_dataset
    from trainer.tuners.yolo.process import prepare_process
    from trainer.tuners.yolo.settings import Trained, TrainSettings
    from trainer.tuners.yolo.tune import train_full, tune_lora, weights_sha256

__all__ = [
    "TrainSettings",
    "Trained",
    "prepare_process",
    "train_full",
    "tune_lora",
    "weights_sha256",
    "write_yolo_dataset",
]

_HOMES = {
    "TrainSettings": "settings",
    "Trained": "settings",
    "prepare_process": "process",
    "train_full": "tune",
    "tune_lora": "tune",
    "weights_sha256": "tune",
    "write_yolo_dataset": "data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
