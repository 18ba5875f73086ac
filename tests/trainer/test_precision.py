"""Trainings of adapters on a base in bfloat16 and in four bits, really run; without a GPU on the CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_phi import save_phi3

from trainer.tuners import language
from trainer.tuners.base import Tuned, Work, tuner
from trainer.tuners.dpo.settings import DpoSettings
from trainer.tuners.lora.settings import LanguageSettings
from trainer.tuners.settings import LoraSettings

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = [{"prompt": f"the line reads {n}", "answer": f" ask {word}"} for n, word in enumerate("abcd")]
PAIRS = [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": " 12345"} for row in EXAMPLES]
DATA: dict[str, Any] = {"lora": EXAMPLES, "dpo": PAIRS}
LORA = LoraSettings(r=8, lora_alpha=16, target_modules=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "phi"
    save_phi3(folder, initializer_range=0.05)
    return folder


def train(base: Path, out: Path, name: str, **settings: Any) -> Tuned:
    kind = {"lora": LanguageSettings, "dpo": DpoSettings}[name]
    given = kind(lora=LORA, epochs=20, batch=4, learning_rate=1e-2, patience=20, **settings)
    # Looked at after each epoch, without gradients: the next epoch must have them again.
    return tuner(name).tune(Work(base, DATA[name], out, out.with_name("scratch"), given, 1, held_out=DATA[name]))


def learned(made: Tuned) -> None:
    """It learned, and what is kept is an adapter of 32 bits that others can read."""
    assert made.history[-1]["loss"] < 0.6 * made.history[0]["loss"]
    weights = load_file(made.path / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    assert json.loads((made.path / "adapter_config.json").read_text())["r"] == LORA.r


@pytest.mark.parametrize("name", ["lora", pytest.param("dpo", marks=pytest.mark.long)])
def test_a_base_in_bfloat16(base: Path, tmp_path: Path, name: str) -> None:
    loaded = language.load(base, LanguageSettings(bf16=True, load_4bit=False)).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    made = train(base, tmp_path / "half", name, bf16=True, load_4bit=False)
    whole = train(base, tmp_path / "whole", name, bf16=False, load_4bit=False)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no", "the one before has left its own to this one"
    assert (made.facts["dtype"], whole.facts["dtype"]) == ("bfloat16", "float32")
    learned(made)
    # The same training, but for eight bits of mantissa: were bfloat16 ignored, no digit would differ.
    first, second = (one.history[0]["loss"] for one in (made, whole))
    assert first == pytest.approx(second, rel=0.02) and [r["loss"] for r in made.history] != [
        r["loss"] for r in whole.history
    ]


@pytest.mark.parametrize("name", ["lora", pytest.param("dpo", marks=pytest.mark.long)])
def test_a_base_in_four_bits(base: Path, tmp_path: Path, name: str) -> None:
    loaded = language.load(base, LanguageSettings(load_4bit=True)).model
    packed = [module for module in loaded.modules() if type(module).__name__ == "Linear4bit"]
    assert len(packed) == 8  # four of each layer; the output layer stays whole
    assert {module.weight.dtype for module in packed} == {torch.uint8}
    assert {module.weight.quant_state.quant_type for module in packed} == {"nf4"}
    bytes_four = sum(module.weight.numel() for module in packed)
    full = language.load(base, LanguageSettings(load_4bit=False, bf16=False)).model
    named = dict(full.named_modules())
    weights = [named[name].weight for name, module in loaded.named_modules() if module in packed]
    assert 2 * bytes_four == sum(weight.numel() for weight in weights)  # two weights a byte
    made = train(base, tmp_path / "out", name, load_4bit=True)
    assert made.facts["load_4bit"].startswith("yes: NF4")
    learned(made)
