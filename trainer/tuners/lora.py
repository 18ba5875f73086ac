"""Fine-tunes a causal language model with LoRA on prompts and the answers it should give."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.tuners.settings import LoraSettings, SettingsError

_IGNORED = -100  # torch's cross-entropy leaves this label out


class Example(TypedDict):
    """One prompt and the answer that the model should continue it with, without special tokens."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class LoraRun:
    """What a fine-tuning did: the PEFT adapter's folder, optimizer steps, mean loss (nats a token) of the first and the
    last epoch, how many parameters were trained, and how many examples did not fit the context and were left out."""

    folder: Path
    steps: int
    loss_first: float
    loss_last: float
    parameters: int
    skipped: int


@dataclass(frozen=True, slots=True)
class _Encoded:
    tokens: list[int]
    labels: list[int]  # the tokens where they are the answer's, else _IGNORED


def tune_lora(
    base: Path,
    examples: Sequence[Example],
    out: Path,
    settings: LoraSettings,
    *,
    epochs: int,
    seed: int,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    on_epoch: Callable[[int, float], None] | None = None,
) -> LoraRun:
    """Train a LoRA adapter for the Hugging Face checkpoint in `base` and save it in PEFT's format as folder `out`.

    The loss covers the answers and the end-of-text token behind them, not the prompts. The same arguments give the same
    adapter on the same machine. `on_epoch(epoch from 1, mean loss in nats a token)` reports progress. `out` appears
    whole or not at all; one that exists is replaced.
    Raises SettingsError for settings that the model cannot honour, ValueError when nothing is left to train on.
    """
    if epochs < 1 or batch_size < 1:
        raise SettingsError(f"epochs = {epochs}, batch_size = {batch_size}: use whole numbers from 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        encoded = _encode(tokenizer, examples, int(model.config.max_position_embeddings))
        tuned = get_peft_model(model, lora_config(model, settings)).to(device)
        trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        steps, losses, order = 0, [], random.Random(seed)
        total = epochs * -(-len(encoded) // batch_size)
        for epoch in range(1, epochs + 1):
            sum_loss, answers = 0.0, 0
            for batch in _batches(encoded, batch_size, order):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * _warm_then_decay(steps, total)
                count = sum(label != _IGNORED for item in batch for label in item.labels)
                sum_loss += _step(tuned, optimizer, trained, _collate(batch, device)) * count
                answers += count
                steps += 1
            losses.append(sum_loss / answers)
            if on_epoch is not None:
                on_epoch(epoch, losses[-1])
    _save(tuned, out)
    parameters = sum(parameter.numel() for parameter in trained)
    return LoraRun(out, steps, losses[0], losses[-1], parameters, skipped=len(examples) - len(encoded))


def lora_config(model: Any, settings: LoraSettings) -> LoraConfig:
    """PEFT's configuration for a causal language model.

    PEFT leaves out names it does not find as long as one matches; here each must match a module, else SettingsError.
    """
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    modules = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if settings.target_modules != "all":
        for target in settings.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in modules):
                known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in modules}))
                raise SettingsError(f"lora.target_modules = {target!r}: no such module in this model; it has: {known}")
    alpha = settings.lora_alpha
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules="all-linear" if settings.target_modules == "all" else list(settings.target_modules),
        lora_dropout=settings.lora_dropout,
        bias=settings.bias,
    )


def _encode(tokenizer: Any, examples: Sequence[Example], context: int) -> list[_Encoded]:
    # Prompt and answer are tokenized apart, because that is how a device meets them: the prompt ends where it ends.
    encoded = []
    for example in examples:
        prompt = list(tokenizer(example["prompt"])["input_ids"])
        answer = [*tokenizer(example["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(prompt) + len(answer) <= context:
            encoded.append(_Encoded(prompt + answer, [_IGNORED] * len(prompt) + answer))
    if not encoded:
        raise ValueError(f"nothing to train on: none of {len(examples)} examples fits the context of {context} tokens")
    return encoded


def _batches(encoded: list[_Encoded], size: int, order: random.Random) -> Iterator[list[_Encoded]]:
    shuffled = order.sample(encoded, len(encoded))
    for start in range(0, len(shuffled), size):
        yield shuffled[start : start + size]


def _collate(batch: list[_Encoded], device: str) -> dict[str, torch.Tensor]:
    width = max(len(item.tokens) for item in batch)
    pad = [width - len(item.tokens) for item in batch]
    rows = list(zip(batch, pad, strict=True))
    return {
        "input_ids": torch.tensor([item.tokens + [0] * n for item, n in rows], device=device),
        "attention_mask": torch.tensor([[1] * len(item.tokens) + [0] * n for item, n in rows], device=device),
        "labels": torch.tensor([item.labels + [_IGNORED] * n for item, n in rows], device=device),
    }


def _step(model: Any, optimizer: torch.optim.Optimizer, trained: list[Any], batch: dict[str, torch.Tensor]) -> float:
    model.train()
    loss = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    return float(loss.detach())


def _warm_then_decay(step: int, total: int) -> float:
    """Factor of the learning rate: up over the first 5 % of the steps, then down in a line to a tenth."""
    warm = max(1, total // 20)
    if step < warm:
        return (step + 1) / warm
    return 1.0 - 0.9 * (step - warm) / max(1, total - warm)


def _save(tuned: Any, out: Path) -> None:
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.parent.mkdir(parents=True, exist_ok=True)
    # The base's embeddings belong to the base, adapted or not.
    tuned.save_pretrained(beside, save_embedding_layers=False)
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)
