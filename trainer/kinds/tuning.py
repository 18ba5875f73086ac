"""Which tuner a strategy names, and what reads its data."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from trainer.tuners.base import Tuner, tuner

READERS = {"lora": "read_examples", "dpo": "read_pairs"}
Reader = Callable[[Path], tuple[list[Any], list[tuple[int, str]]]]  # what is wrong with a line, by its number


def reader(strategy: str) -> Reader:
    """What reads a dataset.jsonl for `strategy`: path -> (examples, bad lines)."""
    found: Reader = getattr(import_module(f"trainer.tuners.{strategy}.data"), READERS[strategy])
    return found


def tuner_for(strategy: str, kind: str) -> Tuner:
    """The tuner that a strategy names; raises ValueError when it does not improve releases of this kind."""
    found = tuner(strategy)
    if kind not in found.kinds:
        raise ValueError(f"strategy {strategy!r} improves releases of kind {', '.join(found.kinds)}, not {kind}")
    return found
