"""Tiny Phi-3 models that are trained from scratch on the spot, on a CPU: their tokenizer, their training on prompts with
answers, and the check that they have learned them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2TokenizerFast, Phi3Config, Phi3ForCausalLM

from bench.kept import kept

END = "<|endoftext|>"

Row = tuple[list[int], list[int]]  # tokens of a prompt, and of its answer with the end behind it


@dataclass(frozen=True, slots=True)
class Schooling:
    """How a model is trained: steps of `batch` rows, the learning rate up over `warm_steps` to `rate` and down to 0. In
    the first `short_steps` only the last `short` tokens of each prompt are shown: where to look is learned sooner, and each
    step takes less time."""

    steps: int
    batch: int
    rate: float
    warm_steps: int = 20
    short_steps: int = 0
    short: int = 0


def cached(build: Path, name: str, recipe: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder below `build` that `make` makes by this recipe, with one thread, or the one that was made before."""
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]

    def made(beside: Path) -> None:
        beside.mkdir()
        with _one_thread():
            make(beside)

    return kept(build / f"{name}-{key}", made)


@contextmanager
def _one_thread() -> Iterator[None]:
    # So small a network gains nothing from a second thread, and several of them spin while they wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tokenizer_of(texts: Iterable[str], vocabulary: int) -> GPT2TokenizerFast:
    """A byte-level BPE of `vocabulary` tokens, of what these texts are made of."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return GPT2TokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, pad_token=END)


def train(rows: Sequence[Row], size: dict[str, Any], end: int, how: Schooling, seed: int) -> Phi3ForCausalLM:
    """A Phi-3 of this size that answers these prompts; only answers count. `end`: the token that ends a text.

    Raises RuntimeError when it does not learn them word for word.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        order = random.Random(seed)
        model = Phi3ForCausalLM(Phi3Config(**size, bos_token_id=end, eos_token_id=end, pad_token_id=end))
        optimizer = torch.optim.AdamW(model.parameters(), lr=how.rate, weight_decay=0.01)
        for step in range(how.steps):
            for group in optimizer.param_groups:
                group["lr"] = how.rate * min((step + 1) / how.warm_steps, 1 - step / how.steps)
            some = order.sample(rows, how.batch)
            if step < how.short_steps:
                some = [(prompt[-how.short :], answer) for prompt, answer in some]
            tokens, labels = _batch(some, end)
            loss = model(input_ids=tokens, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    if count := wrong(model, rows, end):
        raise RuntimeError(
            f"the small Phi answers {count} of {len(rows)} prompts wrongly; try another seed than {seed}"
        )
    return model


def _batch(rows: Sequence[Row], end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (rows, longest row); only answers carry a label."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    pads = [width - len(prompt) - len(answer) for prompt, answer in rows]
    tokens = [prompt + answer + [end] * pad for (prompt, answer), pad in zip(rows, pads, strict=True)]
    labels = [[-100] * len(prompt) + answer + [-100] * pad for (prompt, answer), pad in zip(rows, pads, strict=True)]
    return torch.tensor(tokens), torch.tensor(labels)


@torch.no_grad()
def wrong(model: Any, rows: Sequence[Row], end: int) -> int:
    """How many greedy answers would differ in some token: each token of an answer must be the likeliest one."""
    model.eval()
    count = 0
    for start in range(0, len(rows), _ROWS_MAX):
        tokens, labels = _batch(rows[start : start + _ROWS_MAX], end)
        likeliest = model(input_ids=tokens).logits[:, :-1].argmax(-1)
        right = (likeliest == labels[:, 1:]) | (labels[:, 1:] == -100)
        count += int((~right.all(dim=1)).sum())
    return count


_ROWS_MAX = 300  # at once: of long rows the logits are hundreds of megabytes
