"""Today's LoRA tuner behind the seam of `trainer.tuners.base`, until it is a package of its own; then this file goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from trainer.tuners import base
from trainer.tuners.settings import LoraSettings


class Settings(BaseModel):
    """As `trainer.tuners.lora.tune_lora` takes them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lora: LoraSettings = LoraSettings()
    epochs: int = 3
    batch: int = 16
    learning_rate: float = 2e-4


class _Lora(base.Tuner):
    __slots__ = ()

    def tune(self, work: base.Work) -> base.Tuned:
        from trainer.tuners.lora import tune_lora

        settings, history = work.settings, list[dict[str, float]]()
        assert isinstance(settings, Settings)

        def epoch(number: int, loss: float) -> None:
            history.append({"epoch": number, "epochs": settings.epochs, "loss": loss})
            work.report(history[-1])

        done = tune_lora(
            work.base, work.data, work.out, settings.lora, epochs=settings.epochs, seed=work.seed,
            batch_size=settings.batch, learning_rate=settings.learning_rate, on_epoch=epoch,
        )  # fmt: skip
        return base.Tuned(done.folder, done.parameters, 0, tuple(history), {"left_out": done.skipped})


base.register(_Lora("lora", ("llm",), Settings))


def read_examples(path: Path) -> tuple[list[Any], list[tuple[int, str]]]:
    """Goals with their summaries, and the lines that are none."""
    examples, bad = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            examples.append({"prompt": row["goal"], "answer": row["summary"]})
        except (ValueError, TypeError, KeyError) as error:
            bad.append((number, f"{type(error).__name__}: {error}"))
    return examples, bad
