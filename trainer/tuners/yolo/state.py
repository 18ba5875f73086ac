"""A training's state after each epoch, so that one that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.files import write_whole
from trainer.tuners.yolo.settings import YoloSettings

log = logging.getLogger(__name__)

_STATE, _BEST = "state.pt", "best.pt"
_ANYWHERE = ("device", "threads", "workers")  # settings that a continued training may have others of


def fingerprint(settings: YoloSettings, seed: int, base: str, data: str) -> str:
    """What makes two trainings the same one: settings, seed, the base's and the data's hashes."""
    told = json.dumps([settings.model_dump(mode="json", exclude=set(_ANYWHERE)), seed, base, data], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


class States:
    """The state files of one training in its scratch folder, each written whole."""

    def __init__(self, folder: Path, mark: str) -> None:
        self._folder, self._mark = folder, mark

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state; raises OSError, the one before stays then."""
        self._write(_STATE, state)

    def save_best(self, weights: Mapping[str, Any]) -> None:
        """Replace the best averaged weights so far."""
        self._write(_BEST, {"weights": dict(weights)})

    def load(self) -> dict[str, Any] | None:
        """The last state of this very training; None when there is none, or one of another or a damaged one."""
        return self._read(_STATE)

    def load_best(self) -> dict[str, torch.Tensor] | None:
        """The best averaged weights so far."""
        found = self._read(_BEST)
        return None if found is None else found["weights"]

    def clear(self) -> None:
        """Forget the training."""
        for name in (_STATE, _BEST):
            for path in (self._folder / name, *self._folder.glob(f".{name}.*")):  # with what a kill left half written
                path.unlink(missing_ok=True)

    def _write(self, name: str, state: Mapping[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save({"mark": self._mark, **state}, buffer)
        write_whole(self._folder / name, buffer.getvalue())

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._folder / name
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError) as error:
            log.warning("%s cannot be read (%s): the training begins anew", path, error)
            return None
        if found.get("mark") != self._mark:
            log.warning("%s is of another training (base, data, settings or seed): this one begins anew", path)
            return None
        return found
