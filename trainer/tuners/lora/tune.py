"""Fine-tunes a causal language model with LoRA on prompts and the answers it should give."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from trainer.core.batching import Batching
from trainer.tuners import language, loop
from trainer.tuners.base import Tuned, Work
from trainer.tuners.lora.data import Example
from trainer.tuners.lora.settings import LanguageSettings
from trainer.tuners.scratch import Scratch
from trainer.tuners.settings import SettingsError
from trainer.tuners.together import Together

Tokens = dict[str, list[int]]  # `input_ids`, and `labels`: the tokens where they are the answer's, else IGNORED


def tune(work: Work) -> Tuned:
    """Train a LoRA adapter for the Hugging Face checkpoint in `work.base` on `work.data` (lora.data.Example) and save it in
    PEFT's format as folder `work.out`.

    The loss covers the answers and the end behind them, not the prompts. The same work gives the same adapter on the same
    machine, also after a kill. Raises SettingsError for settings that the model cannot honour, ValueError when nothing is
    left to train on.
    """
    settings = work.settings
    if not isinstance(settings, LanguageSettings):
        raise SettingsError(f"lora: settings of {type(settings).__name__}; use LanguageSettings")
    return loop.run(work, settings, partial(_prepare, work, settings))


class _Trainer(loop.Checkpoints, Trainer):
    """Transformers' own, with whole checkpoints."""


class _Rows(Dataset[Tokens]):
    """Examples as tokens."""

    def __init__(self, rows: list[Tokens]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Tokens:
        return self._rows[place]


def _prepare(
    work: Work, settings: LanguageSettings, batching: Batching, scratch: Scratch, together: Together
) -> loop.Prepared:
    base = language.load(work.base, settings)
    rows, held_out, facts = language.as_tokens(base, work, encode, "examples")
    arguments = TrainingArguments(**loop.arguments(work, settings, batching, scratch), label_names=["labels"])
    trainer = _Trainer(
        scratch,
        together,
        model=language.adapted(base, settings),
        args=loop.one_device(arguments),
        data_collator=_collate,
        train_dataset=_Rows(rows),
        eval_dataset=_Rows(held_out) if held_out else None,
        callbacks=loop.callbacks(work, settings),
    )
    return loop.Prepared(trainer, base.facts | facts)


def encode(base: language.Base, examples: Sequence[Example]) -> tuple[list[Tokens], int]:
    """The examples as tokens, and how many are longer than the context and left out: half an answer is none."""
    rows: list[Tokens] = []
    for example in examples:
        messages = example.get("messages")
        prompt = language.prompt_tokens(base, example["prompt"], messages)
        answer = language.answer_tokens(base, example["answer"], messages)
        if len(prompt) + len(answer) <= base.context:
            rows.append({"input_ids": prompt + answer, "labels": [language.IGNORED] * len(prompt) + answer})
    return rows, len(examples) - len(rows)


def _collate(rows: list[Tokens]) -> dict[str, Any]:
    """Tensors (rows, longest row), filled up on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    pads = [width - len(row["input_ids"]) for row in rows]
    pairs = list(zip(rows, pads, strict=True))
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * pad for row, pad in pairs]),
        "attention_mask": torch.tensor([[1] * len(row["input_ids"]) + [0] * pad for row, pad in pairs]),
        "labels": torch.tensor([row["labels"] + [language.IGNORED] * pad for row, pad in pairs]),
    }
