"""Every family of language models that is promised: it learns, its adapter loads with PEFT, conversations are its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_phi import END, PHI3, save_phi2, save_phi3, tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainer.tuners import language
from trainer.tuners.base import Work, tuner
from trainer.tuners.lora.data import Example
from trainer.tuners.lora.settings import LanguageSettings
from trainer.tuners.lora.tune import encode
from trainer.tuners.settings import LoraSettings, SettingsError

EXAMPLES = [Example(prompt=f"the line reads {n}", answer=f" ask {word}") for n, word in enumerate("abcd")]
SHAPE = {key: value for key, value in PHI3.items() if key != "original_max_position_embeddings"}
SEPARATE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FUSED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
# Of the shapes that are loaded from the hub under these names: grouped heads, scaled and partial rotation, tied embeddings.
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
FAMILIES: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "phi-2": (lambda folder: save_phi2(folder), {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
    "phi-3": (lambda folder: save_phi3(folder), FUSED),
    "phi-3.5": (lambda folder: save_phi3(folder, max_position_embeddings=256, rope_scaling=LONG), FUSED),
    "phi-4-mini": (lambda folder: save_phi3(folder, partial_rotary_factor=0.75, tie_word_embeddings=True), FUSED),
    "llama": (lambda folder: save(LlamaForCausalLM, LlamaConfig, folder), SEPARATE),
    "qwen2": (lambda folder: save(Qwen2ForCausalLM, Qwen2Config, folder), SEPARATE),
    "qwen3": (lambda folder: save(Qwen3ForCausalLM, Qwen3Config, folder, head_dim=16), SEPARATE),
}
PHI_CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


pytestmark = pytest.mark.usefixtures("one_thread")


def save(model: Any, config: Any, folder: Path, **changes: Any) -> None:
    torch.manual_seed(0)
    model(config(**(SHAPE | changes), bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_and_its_adapter_loads_with_peft(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, names = FAMILIES[family]
    make(tmp_path / "base")
    settings = LanguageSettings(epochs=10, batch=4, learning_rate=1e-2, lora=LoraSettings(r=8))
    tuned = tuner("lora").tune(Work(tmp_path / "base", EXAMPLES, tmp_path / "out", tmp_path / "scratch", settings, 0))
    assert tuned.history[-1]["loss"] < 0.7 * tuned.history[0]["loss"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in tensors} == names
    assert all(float(tensor.abs().max()) > 0 for key, tensor in tensors.items() if "lora_B" in key)
    base, inputs = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = base(inputs).logits
        with caplog.at_level(logging.WARNING):
            after = PeftModel.from_pretrained(base, tmp_path / "out").eval()(inputs).logits
    assert not caplog.records, caplog.text
    assert float((before - after).abs().max()) > 0.1
    # What PEFT loads is what was trained: it gives the answers' loss that the training ended with, or a better one.
    assert loss(tmp_path / "base", tmp_path / "out") < tuned.history[-1]["loss"] * 1.05


def loss(folder: Path, adapter: Path) -> float:
    """Nats a token of the answers, by the model with its adapter."""
    base = language.load(folder, LanguageSettings())
    model, total, count = PeftModel.from_pretrained(base.model, adapter).eval(), 0.0, 0
    for row in encode(base, EXAMPLES)[0]:
        with torch.no_grad():
            scores = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        wanted = [(place, label) for place, label in enumerate(row["labels"]) if label != language.IGNORED]
        total -= sum(float(scores[place - 1, label]) for place, label in wanted)
        count += len(wanted)
    return total / count


def talking(folder: Path, template: str, marks: list[str]) -> language.Base:
    """A Phi-3 with a chat template, whose marks are tokens of their own."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": marks})
    words.chat_template = template
    model = save_phi3(folder, words=words, vocab_size=420, max_position_embeddings=200)
    model.generation_config.eos_token_id = [0, *words.convert_tokens_to_ids([mark for mark in marks if "end" in mark])]
    model.generation_config.save_pretrained(folder)
    return language.load(folder, LanguageSettings())


@pytest.mark.parametrize(
    ("template", "marks", "asked", "said"),
    [
        (
            PHI_CHAT,
            ["<|user|>", "<|system|>", "<|assistant|>", "<|end|>"],
            "<|system|>\nBe brief.<|end|>\n<|user|>\nA seven?<|end|>\n<|assistant|>\n",
            "Ask.<|end|>",
        ),
        (
            CHATML,
            ["<|im_start|>", "<|im_end|>"],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA seven?<|im_end|>\n<|im_start|>assistant\n",
            "Ask.<|im_end|>",
        ),
    ],
)
def test_a_conversation_goes_through_the_chat_template_and_ends_with_its_mark(
    tmp_path: Path, template: str, marks: list[str], asked: str, said: str
) -> None:
    base = talking(tmp_path, template, marks)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A seven?"}]
    example = Example(prompt="plain", answer="Ask.", messages=turns)  # type: ignore[typeddict-item]
    (row,), left_out = encode(base, [example])
    answer = [token for token in row["labels"] if token != language.IGNORED]
    assert left_out == 0
    assert base.words.decode(row["input_ids"]) == asked + said
    assert base.words.decode(answer) == said
    (plain,), _ = encode(base, [Example(prompt="plain", answer="Ask.")])  # a bare prompt stays one
    assert base.words.decode(plain["input_ids"]) == f"plainAsk.{END}"


def test_a_model_without_a_template_gets_the_conversation_as_text(tmp_path: Path) -> None:
    save_phi3(tmp_path)
    example = Example(
        prompt="user: A seven?\nassistant: ", answer="Ask.", messages=[{"role": "user", "content": "A seven?"}]
    )
    base = language.load(tmp_path, LanguageSettings())
    (row,), _ = encode(base, [example])
    assert base.words.decode(row["input_ids"]) == f"user: A seven?\nassistant: Ask.{END}"


@pytest.mark.parametrize(
    ("asked", "gpu", "installed", "loads", "why"),
    [
        ("auto", True, True, True, "NF4"),
        ("auto", False, True, False, "without a GPU"),
        ("auto", True, False, False, "without the package bitsandbytes"),
        (False, True, True, False, "not asked for"),
        (True, True, True, True, "NF4"),
        (True, False, True, True, "NF4, on the CPU"),
    ],
)
def test_four_bits_where_they_can_be(asked: Any, gpu: bool, installed: bool, loads: bool, why: str) -> None:
    told = language.four_bits(asked, gpu=gpu, installed=installed)
    assert told[0] == loads and why in told[1]


def test_four_bits_that_must_be_and_cannot_are_an_error() -> None:
    with pytest.raises(SettingsError, match="load_4bit = true: this host lacks the package bitsandbytes"):
        language.four_bits(True, gpu=False, installed=False)
