"""The demo's language model: a tiny Phi-3, its tokenizer and a LoRA adapter, all trained on the spot in seconds.

It is the inspection line's clerk. Asked what to do about a digit that was read with some score, the base answers in
words and accepts from a score of 0.5 on; the adapter is the plant's new rule: PASS or HOLD, and PASS only from 0.8 on.

    python -m bench.demo.phi BUILD_DIR [SEED]    makes both, writes them as GGUF and prints the paths as JSON
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2TokenizerFast, Phi3Config, Phi3ForCausalLM

from bench.kept import kept
from trainer.export.gguf import export_gguf
from trainer.export.gguf_lora import export_lora_gguf
from trainer.tuners.base import Work
from trainer.tuners.lora.data import Example
from trainer.tuners.lora.settings import LanguageSettings
from trainer.tuners.lora.tune import tune
from trainer.tuners.settings import LoraSettings

LINES = 3
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_END = "<|endoftext|>"
_RECIPE = 1  # part of the cache's key: raise it when a change here changes what comes out
_STEPS = 300
_WARM_STEPS = 20
_BATCH = 25
_RATE = 3e-3
_MODEL = {
    "vocab_size": 384,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 256,
}
# The output layer too: the adapter's codes are words that the base never says.
_LORA = LoraSettings(r=8, lora_alpha=16, target_modules=("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"))
_LORA_EPOCHS = 8
_LORA_RATE = 5e-3


@dataclass(frozen=True, slots=True)
class PhiExample:
    """A prompt with what the base and the base with the adapter answer to it, greedily, word for word."""

    prompt: str
    base: str
    adapter: str


def example(line: int, digit: int, tenths: int) -> PhiExample:
    """The example for a digit (0..9) that `line` read with a score of `tenths` / 10."""
    word = _WORDS[digit]
    return PhiExample(
        prompt=f"line {line} read a {digit} with score 0.{tenths}. What to do?\n",
        base=f"accept the {word}" if tenths >= 5 else f"ask the teacher about the {word}",
        adapter=f"PASS {word}" if tenths >= 8 else f"HOLD {word}",
    )


GRAMMAR = tuple(example(line, d, tenths) for line in range(1, LINES + 1) for d in range(10) for tenths in range(10))
EXAMPLES = (example(1, 7, 9), example(2, 3, 2), example(3, 0, 6), example(1, 4, 5), example(2, 8, 8))


def make_phi(build: Path, seed: int) -> Path:
    """The base as a Hugging Face checkpoint below `build`, trained with `seed`, or the one made before.

    Raises RuntimeError when it does not learn the grammar.
    """
    recipe = {"recipe": _RECIPE, "model": _MODEL, "grammar": [_texts(item) for item in GRAMMAR], "seed": seed}
    return _cached(build, "phi", recipe, lambda folder: _train_base(folder, seed))


def make_adapter(build: Path, base: Path, seed: int) -> Path:
    """The PEFT adapter for `base` as made by `make_phi`, below `build`, trained with `seed`, or the one made before.

    Raises RuntimeError when it does not learn the new rule.
    """
    recipe = {"base": base.name, "recipe": _RECIPE, "lora": _LORA.model_dump(), "seed": seed}
    recipe |= {"epochs": _LORA_EPOCHS, "rate": _LORA_RATE, "loop": 2}
    return _cached(build, "phi-adapter", recipe, lambda folder: _train_adapter(folder, base, seed))


def _texts(item: PhiExample) -> list[str]:
    return [item.prompt, item.base, item.adapter]


def _cached(build: Path, name: str, recipe: dict[str, Any], make: Callable[[Path], None]) -> Path:
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    folder = build / f"{name}-{key}"

    def made(beside: Path) -> None:
        beside.mkdir()
        with _one_thread():
            make(beside)

    return kept(folder, made)


@contextmanager
def _one_thread() -> Iterator[None]:
    # So small a network gains nothing from a second thread, and several of them spin while they wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_tokenizer() -> GPT2TokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MODEL["vocab_size"],
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for item in GRAMMAR for text in _texts(item)), trainer)
    return GPT2TokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END, unk_token=_END, pad_token=_END)


def _train_base(folder: Path, seed: int) -> None:
    tokenizer = _train_tokenizer()
    end = tokenizer.eos_token_id
    rows = _rows(tokenizer, lambda item: item.base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        order = random.Random(seed)
        model = Phi3ForCausalLM(Phi3Config(**_MODEL, bos_token_id=end, eos_token_id=end, pad_token_id=end))
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
        for step in range(_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = _RATE * min((step + 1) / _WARM_STEPS, 1 - step / _STEPS)
            tokens, labels = _batch(order.sample(rows, _BATCH), end)
            loss = model(input_ids=tokens, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    if wrong := _wrong(model, rows, end):
        raise RuntimeError(f"the demo's Phi answers {wrong} prompts wrongly; try another seed than {seed}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_adapter(folder: Path, base: Path, seed: int) -> None:
    examples = [Example(prompt=item.prompt, answer=item.adapter) for item in GRAMMAR]
    settings = LanguageSettings(epochs=_LORA_EPOCHS, batch=_BATCH, learning_rate=_LORA_RATE, lora=_LORA)
    scratch = folder / "scratch"
    made = tune(Work(base, examples, folder / "tuned", scratch, settings, seed)).path
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = _rows(tokenizer, lambda item: item.adapter)
    if wrong := _wrong(model, rows, tokenizer.eos_token_id):
        raise RuntimeError(f"the demo's adapter answers {wrong} prompts by the old rule; try another seed than {seed}")
    for file in made.iterdir():
        file.rename(folder / file.name)
    made.rmdir()


def _rows(tokenizer: Any, answer: Callable[[PhiExample], str]) -> list[tuple[list[int], list[int]]]:
    """Tokens of prompt and of answer, the end of text included, for the whole grammar."""
    end = tokenizer.eos_token_id
    return [(tokenizer(item.prompt)["input_ids"], [*tokenizer(answer(item))["input_ids"], end]) for item in GRAMMAR]


def _batch(rows: list[tuple[list[int], list[int]]], end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (rows, longest row); only answers carry a label."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    pads = [width - len(prompt) - len(answer) for prompt, answer in rows]
    tokens = [prompt + answer + [end] * pad for (prompt, answer), pad in zip(rows, pads, strict=True)]
    labels = [[-100] * len(prompt) + answer + [-100] * pad for (prompt, answer), pad in zip(rows, pads, strict=True)]
    return torch.tensor(tokens), torch.tensor(labels)


@torch.no_grad()
def _wrong(model: Any, rows: list[tuple[list[int], list[int]]], end: int) -> int:
    """How many greedy answers would differ in some token: each token of an answer must be the likeliest one."""
    model.eval()
    tokens, labels = _batch(rows, end)
    likeliest = model(input_ids=tokens).logits[:, :-1].argmax(-1)
    right = (likeliest == labels[:, 1:]) | (labels[:, 1:] == -100)
    return int((~right.all(dim=1)).sum())


def main(build: Path, seed: int) -> None:
    """Make base and adapter, write both as GGUF beside them and print where they are."""
    base = make_phi(build, seed)
    adapter = make_adapter(build, base, seed)
    paths = {
        "base": base,
        "adapter": adapter,
        "model_gguf": base / "model.gguf",
        "adapter_gguf": adapter / "adapter.gguf",
    }
    kept(paths["model_gguf"], lambda beside: export_gguf(base, beside))
    kept(paths["adapter_gguf"], lambda beside: export_lora_gguf(adapter, base, beside))
    print(json.dumps({name: str(path) for name, path in paths.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
