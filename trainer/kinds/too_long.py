"""Examples of a language job that do not fit a context: counted before anything is trained, because a training of hours for
nothing held out is no use, and left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from trainer import likelihood
from trainer.kinds.texts import Text
from trainer.releases import StoredRelease

log = logging.getLogger(__name__)

TRAIN = ("training", "validation")  # the sets that the checkpoint must have room for; the others are for what ships


@dataclass(frozen=True, slots=True)
class Fitting:
    """The examples that fit, by the name of their set, and how many of a set do not."""

    sets: Mapping[str, list[Text]]
    too_long: Mapping[str, int]

    @property
    def left_out(self) -> dict[str, int]:
        """How many were left out, by reason, where any were."""
        return {_reason(name): count for name, count in self.too_long.items() if count}


def fitting(base: StoredRelease, checkpoint: Path, settings: BaseModel, sets: Mapping[str, Sequence[Text]]) -> Fitting:
    """What fits: of TRAIN the context that the tuner gives the checkpoint, of all others that of the release `base` as
    devices load it. Raises EngineError, SettingsError."""
    found = {name: _fit_to_train(checkpoint, settings, sets[name]) for name in TRAIN}
    with likelihood.shipped(base.folder, base.manifest, None) as scorer:
        found |= {name: _fit_to_judge(scorer, rows) for name, rows in sets.items() if name not in TRAIN}
    too_long = {name: len(rows) - len(found[name]) for name, rows in sets.items()}
    for name, count in too_long.items():
        if count:
            log.warning("%d examples are left out: too long for the model's context (%s)", count, _reason(name))
    return Fitting(found, too_long)


def _reason(name: str) -> str:
    return f"{'train' if name == 'training' else name}_too_long"


def _fit_to_train(checkpoint: Path, settings: BaseModel, given: Sequence[Text]) -> list[Text]:
    from trainer.tuners.language import fitting
    from trainer.tuners.lora.data import Turn
    from trainer.tuners.lora.settings import LanguageSettings

    assert isinstance(settings, LanguageSettings)
    asked: list[Any] = [
        (
            each.prompt,
            [Turn(role=role, content=content) for role, content in each.messages],
            [each.wanted] if each.other is None else [each.wanted, each.other],
        )
        for each in given
    ]
    return [each for each, fits in zip(given, fitting(checkpoint, settings, asked), strict=True) if fits]


def _fit_to_judge(scorer: likelihood.Scorer, given: Sequence[Text]) -> list[Text]:
    return [each for each in given if scorer.fits(each.said) and (not each.other or scorer.fits(each.avoided))]
