"""Which tuner a strategy names, and what reads its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from trainer.tuners.base import Tuner, tuner

STRATEGIES = ("lora", "dpo")
# Examples with who answered; what is wrong with a line, by its number; how much was left out besides, by reason.
Reader = Callable[[Path], tuple[list[tuple[Any, Mapping[str, Any]]], list[tuple[int, str]], dict[str, int]]]


def reader(strategy: str) -> Reader:
    """What reads a dataset.jsonl for `strategy`: path -> (examples with their provenance, bad lines, left out)."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")
    found: Reader = import_module(f"trainer.tuners.{strategy}.data").read_labelled
    return found


def tuner_for(strategy: str, kind: str) -> Tuner:
    """The tuner that a strategy names; raises ValueError when it does not improve releases of this kind."""
    found = tuner(strategy)
    if kind not in found.kinds:
        raise ValueError(f"strategy {strategy!r} improves releases of kind {', '.join(found.kinds)}, not {kind}")
    return found


def check_adapter(checkpoint: Path, settings: BaseModel) -> None:
    """Whether the checkpoint has the modules that `settings` name; raises SettingsError. Loads no weights."""
    from trainer.tuners.language import check_shape
    from trainer.tuners.lora.settings import LanguageSettings

    if isinstance(settings, LanguageSettings):
        check_shape(checkpoint, settings)
