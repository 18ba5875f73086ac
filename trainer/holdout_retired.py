"""A holdout whose labels turned out wrong: put aside as a whole, with the reason, so that another one can be frozen.

    DATA_DIR/holdouts/retired/MODEL.SET.N.json    why and when, and every state that the set has been in
    DATA_DIR/holdouts/retired/MODEL.SET.N.jsonl   its ledger as it was

Law of this file: nothing is taken from a ledger. It is kept whole, and releases that were judged on it are known by it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.chain import locked
from trainer.config import TrainerConfig
from trainer.datasets import read_folder
from trainer.files import make_folder, write_whole
from trainer.holdout import HoldoutError, folder_of, ledger_path, loose, read_ledger, states

RETIRED_MAX = 1000  # of one set


def retired(config: TrainerConfig, model: str, name: str) -> list[dict[str, Any]]:
    """What is known of the retired sets of this name, the oldest first; raises HoldoutError naming a damaged file."""
    found = []
    for number in range(1, RETIRED_MAX + 1):
        path = _path(config, model, name, number)
        if not path.is_file():
            break
        try:
            found.append(dict(json.loads(path.read_bytes())))
        except (OSError, ValueError) as error:
            raise HoldoutError(f"{path}: {error}; restore it from a copy") from None
    return found


def retire(config: TrainerConfig, model: str, name: str, reason: str, now: float) -> dict[str, Any]:
    """Put a frozen set aside; what is kept of it. Its folder stays as it is: the next `freeze` takes what lies there then.

    Raises HoldoutError where nothing is frozen, the set was changed, or no reason is given. A run that was killed is
    finished by the next.
    """
    path, folder = ledger_path(config, model, name), folder_of(config.model(model), name)
    if not reason.strip():
        raise HoldoutError(f"holdout {model}/{name}: say why it is retired; the reason is kept for whoever asks later")
    with locked(config.holdouts):
        entries = read_ledger(path)
        if not entries or folder is None:
            raise HoldoutError(f"holdout {model}/{name} is not frozen: there is nothing to retire")
        items = read_folder(folder)
        loose(path, f"{model}/{name}", entries, items)  # one that was changed is named, not retired
        number = len(retired(config, model, name)) + 1
        if number > RETIRED_MAX:
            raise HoldoutError(f"holdout {model}/{name} was retired {RETIRED_MAX} times, the most that may be")
        said = {
            "set": name, "reason": reason.strip(), "retired": now, "images": len(entries),
            "identities": sorted(states(entries, items)),
        }  # fmt: skip
        make_folder(config.holdouts / "retired")
        beside = _path(config, model, name, number)
        write_whole(beside.with_suffix(".jsonl"), path.read_bytes())
        write_whole(beside, json.dumps(said, indent=2).encode())
        path.unlink()
    return said


def _path(config: TrainerConfig, model: str, name: str, number: int) -> Path:
    return config.holdouts / "retired" / f"{model}.{name}.{number}.json"
