"""A training's learning rate, and what each epoch gave, from the log that it wrote on its way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

_NAMES = {
    "loss": "loss",
    "learning_rate": "lr",
    "eval_loss": "held_out_loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "eval_rewards/margins": "held_out_margin",
    "eval_rewards/accuracies": "held_out_accuracy",
}
_MEANS = ("loss", "margin", "accuracy")  # over the steps of an epoch


def warm_then_decay(step: int, total: int) -> float:
    """Factor of the learning rate for a step (from 0): up over the first 5 %, then down in a line to a tenth."""
    warm = max(1, total // 20)
    if step < warm:
        return (step + 1) / warm
    return 1.0 - 0.9 * (min(step, total) - warm) / max(1, total - warm)


def named(row: Mapping[str, float]) -> dict[str, float]:
    """The numbers of a row of transformers' log that matter to a person, by the names used here."""
    return {name: float(row[key]) for key, name in _NAMES.items() if key in row}


def by_epoch(log: Iterable[Mapping[str, float]]) -> list[dict[str, float]]:
    """A row an epoch (`epoch` from 1): means over its steps, the last learning rate, and the loss on what was held out.

    `log`: rows of transformers' log history, in order; a row with a `loss` stands for the steps since the one before it.
    """
    epochs: dict[int, dict[str, float]] = {}
    weights: dict[int, int] = {}
    before = 0
    for row in log:
        number = max(1, math.ceil(row.get("epoch", 0.0) - 1e-9))
        known = named(row)
        epoch = epochs.setdefault(number, {"epoch": number})
        if "loss" in known:
            steps, before = int(row["step"]) - before, int(row["step"])
            done = weights.get(number, 0)
            weights[number] = done + steps
            for key in _MEANS:
                if key in known:
                    epoch[key] = (epoch.get(key, 0.0) * done + known[key] * steps) / (done + steps)
            epoch["lr"] = known["lr"]
        epoch |= {key: value for key, value in known.items() if key.startswith("held_out")}
    return [row for row in epochs.values() if len(row) > 1]
