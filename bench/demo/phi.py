"""The demo's language model: a tiny Phi-3, its tokenizer and a LoRA adapter, all trained on the spot in seconds.

It is the inspection line's clerk. Asked what to do about a digit that was read with some score, the base answers in
words and accepts from a score of 0.5 on; the adapter is the plant's new rule: PASS or HOLD, and PASS only from 0.8 on.

    python -m bench.demo.phi BUILD_DIR [SEED]    makes both, writes them as GGUF and prints the paths as JSON
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.kept import kept
from bench.small_phi import Row, Schooling, cached, tokenizer_of, train, wrong
from trainer.export.gguf import export_gguf
from trainer.export.gguf_lora import export_lora_gguf
from trainer.tuners.base import Work
from trainer.tuners.lora.data import Example
from trainer.tuners.lora.settings import LanguageSettings
from trainer.tuners.lora.tune import tune
from trainer.tuners.settings import LoraSettings

LINES = 3
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_RECIPE = 1  # part of the cache's key: raise it when a change here changes what comes out
_SCHOOLING = Schooling(steps=300, batch=25, rate=3e-3)
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
    return cached(build, "phi", recipe, lambda folder: _train_base(folder, seed))


def make_adapter(build: Path, base: Path, seed: int) -> Path:
    """The PEFT adapter for `base` as made by `make_phi`, below `build`, trained with `seed`, or the one made before.

    Raises RuntimeError when it does not learn the new rule.
    """
    recipe = {"base": base.name, "recipe": _RECIPE, "lora": _LORA.model_dump(), "seed": seed}
    recipe |= {"epochs": _LORA_EPOCHS, "rate": _LORA_RATE, "loop": 2}
    return cached(build, "phi-adapter", recipe, lambda folder: _train_adapter(folder, base, seed))


def _texts(item: PhiExample) -> list[str]:
    return [item.prompt, item.base, item.adapter]


def _train_base(folder: Path, seed: int) -> None:
    words = tokenizer_of((text for item in GRAMMAR for text in _texts(item)), _MODEL["vocab_size"])
    model = train(_rows(words, lambda item: item.base), _MODEL, words.eos_token_id, _SCHOOLING, seed)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def _train_adapter(folder: Path, base: Path, seed: int) -> None:
    examples = [Example(prompt=item.prompt, answer=item.adapter) for item in GRAMMAR]
    settings = LanguageSettings(epochs=_LORA_EPOCHS, batch=_SCHOOLING.batch, learning_rate=_LORA_RATE, lora=_LORA)
    scratch = folder / "scratch"
    made = tune(Work(base, examples, folder / "tuned", scratch, settings, seed)).path
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = _rows(tokenizer, lambda item: item.adapter)
    if count := wrong(model, rows, tokenizer.eos_token_id):
        raise RuntimeError(f"the demo's adapter answers {count} prompts by the old rule; try another seed than {seed}")
    for file in made.iterdir():
        file.rename(folder / file.name)
    made.rmdir()


def _rows(tokenizer: Any, answer: Callable[[PhiExample], str]) -> list[Row]:
    """Tokens of prompt and of answer, the end of text included, for the whole grammar."""
    end = tokenizer.eos_token_id
    return [(tokenizer(item.prompt)["input_ids"], [*tokenizer(answer(item))["input_ids"], end]) for item in GRAMMAR]


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
