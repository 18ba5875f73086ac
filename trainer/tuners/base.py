"""What every tuner is: one folder with the same files, registered in one call.

`trainer/tuners/NAME/` holds `__init__.py` (the registration: light), `settings.py` (its configuration: light), `data.py`
(what it reads) and `tune.py` (the training: heavy, imported only when it runs, with one function `tune(work) -> Tuned`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Protocol

from pydantic import BaseModel

Report = Callable[[Mapping[str, float]], None]  # what a step or an epoch gave: "epoch", "epochs", "loss", "lr", ...


@dataclass(frozen=True, slots=True)
class Work:
    """One training. `base`: the checkpoint to begin from. `data`: the tuner's own examples, as its `data.py` makes them,
    `held_out`: others of the kind, for early stopping. `out`: the file or folder to make, whole or not at all. `scratch`:
    its checkpoints; what a killed training left there is continued."""

    base: Path
    data: Sequence[Any]
    out: Path
    scratch: Path
    settings: BaseModel
    seed: int
    held_out: Sequence[Any] = ()
    report: Report = lambda _values: None


@dataclass(frozen=True, slots=True)
class Tuned:
    """A finished training: what it made, how many parameters were trained of how many, what each epoch gave, and what a
    person should know of it (a smaller batch than asked for, an early stop, examples left out)."""

    path: Path
    trainable: int
    parameters: int
    history: tuple[Mapping[str, float], ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Tune(Protocol):
    """The function `tune` of a tuner's `tune.py`."""

    def __call__(self, work: Work) -> Tuned: ...


@dataclass(frozen=True, slots=True)
class Tuner:
    """A tuner by its name, the kinds of releases that it improves, and the class of its settings."""

    name: str
    kinds: tuple[str, ...]
    settings: type[BaseModel]

    def tune(self, work: Work) -> Tuned:
        """Train; raises SettingsError for settings that the model cannot honour, ValueError when nothing is left to train
        on."""
        run: Tune = import_module(f"trainer.tuners.{self.name}.tune").tune
        return run(work)


_TUNERS: dict[str, Tuner] = {}


def register(tuner: Tuner) -> Tuner:
    """Make a tuner known by its name; raises ValueError when the name is taken."""
    if tuner.name in _TUNERS:
        raise ValueError(f"tuner {tuner.name!r} is registered twice")
    return _TUNERS.setdefault(tuner.name, tuner)


def tuner(name: str) -> Tuner:
    """A registered tuner; raises ValueError naming those that there are."""
    for module in iter_modules([str(Path(__file__).parent)], "trainer.tuners."):
        if module.ispkg:
            import_module(module.name)  # which registers itself
    if name not in _TUNERS:
        raise ValueError(f"strategy {name!r}: use one of {', '.join(sorted(_TUNERS))}")
    return _TUNERS[name]
