"""Which tuner a strategy names, and what reads its data."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.tuners.base import Tuner, tuner

READERS = {"lora": "read_examples", "dpo": "read_pairs"}
Reader = Callable[[Path], tuple[list[Any], list[tuple[int, str]]]]  # what is wrong with a line, by its number


def reader(strategy: str) -> Reader:
    """What reads a dataset.jsonl for `strategy`: path -> (examples, bad lines)."""
    home = f"trainer.tuners.{strategy}.data" if _packaged(strategy) else "trainer.kinds.lora_now"
    found: Reader = getattr(import_module(home), READERS[strategy])
    return found


def tuner_for(strategy: str, kind: str) -> Tuner:
    """The tuner that a strategy names; raises ValueError when it does not improve releases of this kind."""
    if not _packaged(strategy):
        import_module("trainer.kinds.lora_now")
    found = tuner(strategy)
    if kind not in found.kinds:
        raise ValueError(f"strategy {strategy!r} improves releases of kind {', '.join(found.kinds)}, not {kind}")
    return found


def _packaged(strategy: str) -> bool:
    spec = find_spec(f"trainer.tuners.{strategy}")
    return spec is not None and spec.submodule_search_locations is not None
