"""Fine-tuning a language model: it learns the answers, honours every setting and repeats itself exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_phi import save_phi2, save_phi3
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.tuners.lora import Example, tune_lora
from trainer.tuners.settings import LoraSettings, SettingsError

EXAMPLES = [Example(prompt=f"the line reads {n}", answer=f" ask {word}") for n, word in enumerate(["a", "b", "c", "d"])]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "phi"
    save_phi3(folder, initializer_range=0.05)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_it_learns_the_answers(base: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    everything = ("embed_tokens", "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")
    settings = LoraSettings(r=16, lora_alpha=32, target_modules=everything)
    run = tune_lora(
        base,
        EXAMPLES,
        tmp_path / "out",
        settings,
        epochs=60,
        seed=1,
        learning_rate=1e-2,
        on_epoch=lambda epoch, _: seen.append(epoch),
    )
    assert seen == list(range(1, 61))
    assert run.steps == 60
    assert run.loss_last < 0.1 * run.loss_first
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(tmp_path / "out"))
    words = AutoTokenizer.from_pretrained(base)
    for example in EXAMPLES:
        prompt = words(example["prompt"], return_tensors="pt")
        made = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert words.decode(made) == example["answer"] + "<|endoftext|>"  # and it knows where to end


def test_the_loss_covers_the_answers_alone(base: Path, tmp_path: Path) -> None:
    # An untrained adapter changes nothing, so the first step's loss is the base's own.
    run = tune_lora(base, EXAMPLES, tmp_path / "out", LoraSettings(), epochs=1, seed=0)
    model, words = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    total, count = 0.0, 0
    for example in EXAMPLES:
        prompt = words(example["prompt"])["input_ids"]
        answer = [*words(example["answer"])["input_ids"], words.eos_token_id]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total -= sum(float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        count += len(answer)
    assert run.loss_first == pytest.approx(total / count, rel=1e-4)


def test_the_same_seed_gives_the_same_adapter(base: Path, tmp_path: Path) -> None:
    settings = LoraSettings(r=4, lora_dropout=0.1)
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        torch.manual_seed(hash(name) % 1000)  # what was drawn before must not matter
        tune_lora(base, EXAMPLES, tmp_path / name, settings, epochs=2, seed=seed, batch_size=2)
    one, two, other = (weights(tmp_path / name) for name in ("one", "two", "other"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_rank_alpha_and_targets_are_honoured(base: Path, tmp_path: Path) -> None:
    settings = LoraSettings(r=3, lora_alpha=7, target_modules=("o_proj",), lora_dropout=0.25)
    run = tune_lora(base, EXAMPLES, tmp_path / "out", settings, epochs=1, seed=0)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"], saved["bias"]) == (3, 7, 0.25, "none")
    tensors = weights(tmp_path / "out")
    assert {key.split(".")[-3] for key in tensors} == {"o_proj"}
    assert {min(tensor.shape) for tensor in tensors.values()} == {3}
    assert run.parameters == sum(tensor.numel() for tensor in tensors.values())


def test_all_targets_every_linear_layer(base: Path, tmp_path: Path) -> None:
    tune_lora(base, EXAMPLES, tmp_path / "out", LoraSettings(r=2), epochs=1, seed=0)
    targets = {key.split(".")[-3] for key in weights(tmp_path / "out")}
    assert targets == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_dropout_acts_in_training(base: Path, tmp_path: Path) -> None:
    for name, dropout in (("without", 0.0), ("with", 0.5)):
        settings = LoraSettings(r=2, lora_dropout=dropout)
        tune_lora(base, EXAMPLES, tmp_path / name, settings, epochs=3, seed=0)
    without, dropped = weights(tmp_path / "without"), weights(tmp_path / "with")
    assert not all(torch.equal(without[key], dropped[key]) for key in without)


@pytest.mark.parametrize(("bias", "trained"), [("none", set()), ("lora_only", {"dense"}), ("all", {"dense", "fc1"})])
def test_bias_says_which_biases_train(tmp_path: Path, bias: Any, trained: set[str]) -> None:
    save_phi2(tmp_path / "phi")
    settings = LoraSettings(r=2, target_modules=("dense",), bias=bias)
    tune_lora(tmp_path / "phi", EXAMPLES, tmp_path / "out", settings, epochs=1, seed=0)
    keys = [key.removesuffix(".bias") for key in weights(tmp_path / "out") if key.endswith(".bias")]
    biases = {key.removesuffix(".base_layer").split(".")[-1] for key in keys}
    assert trained <= biases
    assert bias == "all" or biases == trained


def test_a_target_that_does_not_exist_is_an_error(base: Path, tmp_path: Path) -> None:
    settings = LoraSettings(target_modules=("qkv_proj", "q_proj"))
    with pytest.raises(SettingsError, match=r"'q_proj'.*qkv_proj"):
        tune_lora(base, EXAMPLES, tmp_path / "out", settings, epochs=1, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_examples_beyond_the_context_are_counted_not_cut(base: Path, tmp_path: Path) -> None:
    long = Example(prompt="x" * 500, answer="y")
    run = tune_lora(base, [*EXAMPLES, long], tmp_path / "out", LoraSettings(r=2), epochs=1, seed=0)
    assert run.skipped == 1
    with pytest.raises(ValueError, match="none of 1 examples fits the context of 64 tokens"):
        tune_lora(base, [long], tmp_path / "out", LoraSettings(r=2), epochs=1, seed=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", 4.5),
        ("lora_alpha", -1),
        ("target_modules", []),
        ("target_modules", "qkv_proj"),
        ("lora_dropout", 1.0),
        ("bias", "some"),
        ("rank", 8),
    ],
)
def test_a_wrong_setting_names_key_value_and_fix(key: str, value: Any) -> None:
    with pytest.raises(SettingsError) as error:
        LoraSettings.parse({key: value})
    assert f"lora.{key} = {value!r}" in str(error.value)
    assert "fix: " in str(error.value)


def test_settings_from_configuration() -> None:
    settings = LoraSettings.parse({"r": 8, "lora_alpha": 12.5, "target_modules": ["a", "b"], "bias": "all"})
    assert settings == LoraSettings(r=8, lora_alpha=12.5, target_modules=("a", "b"), lora_dropout=0.0, bias="all")
    assert LoraSettings.parse({}).target_modules == "all"
