"""What differs by the kind of model, one module a kind: `trainer.train` is the path that all of them go."""

from __future__ import annotations

from importlib import import_module

from trainer.kinds.base import Training
from trainer.run import Run

# kind -> the module whose `begin(run)` gives its Training; imported when a run of it begins.
_VISION = "trainer.kinds.vision"
_MODULES = {"detect": _VISION, "segment": _VISION, "classify": _VISION, "llm": "trainer.kinds.language"}


def begin(run: Run, kind: str) -> Training:
    """The training of one kind of model; raises ValueError naming the kinds that there are."""
    if kind not in _MODULES:
        raise ValueError(f"kind {kind!r}: nothing trains it; use one of {', '.join(sorted(_MODULES))}")
    training: Training = import_module(_MODULES[kind]).begin(run)
    return training
