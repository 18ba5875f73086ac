"""Fine-tuning a language model: it learns the answers, honours every setting and repeats itself exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_phi import save_phi2, save_phi3
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.tuners.base import Tuned, Work, tuner
from trainer.tuners.lora.data import Example
from trainer.tuners.lora.settings import LanguageSettings
from trainer.tuners.settings import LoraSettings, SettingsError

EXAMPLES = [Example(prompt=f"the line reads {n}", answer=f" ask {word}") for n, word in enumerate(["a", "b", "c", "d"])]


pytestmark = pytest.mark.usefixtures("one_thread")


def run(
    base: Path, out: Path, lora: LoraSettings, examples: Sequence[Example] = EXAMPLES, seed: int = 0, **settings: Any
) -> Tuned:
    """A training with the registered tuner; `settings` as in LanguageSettings, and Work's `held_out` and `report`."""
    work = {key: settings.pop(key) for key in ("held_out", "report") if key in settings}
    given = LanguageSettings(lora=lora, **{"epochs": 1, "learning_rate": 2e-3, **settings})
    return tuner("lora").tune(Work(base, examples, out, out.with_name(f"{out.name}-scratch"), given, seed, **work))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "phi"
    save_phi3(folder, initializer_range=0.05)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_it_learns_the_answers(base: Path, tmp_path: Path) -> None:
    seen: list[Mapping[str, float]] = []
    everything = ("embed_tokens", "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")
    settings = LoraSettings(r=16, lora_alpha=32, target_modules=everything)
    made = run(base, tmp_path / "out", settings, epochs=60, seed=1, learning_rate=1e-2, report=seen.append)
    assert [row["epoch"] for row in seen] == list(range(1, 61))
    assert [(row["step"], row["steps"], row["epochs"]) for row in seen][::59] == [(1, 60, 60), (60, 60, 60)]
    assert made.facts["steps"] == len(made.history) == 60
    assert made.history[-1]["loss"] < 0.1 * made.history[0]["loss"]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(tmp_path / "out"))
    words = AutoTokenizer.from_pretrained(base)
    for example in EXAMPLES:
        prompt = words(example["prompt"], return_tensors="pt")
        made = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert words.decode(made) == example["answer"] + "<|endoftext|>"  # and it knows where to end


def test_the_loss_covers_the_answers_alone(base: Path, tmp_path: Path) -> None:
    # An untrained adapter changes nothing, so the first step's loss is the base's own.
    made = run(base, tmp_path / "out", LoraSettings())
    model, words = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    total, count = 0.0, 0
    for example in EXAMPLES:
        prompt = words(example["prompt"])["input_ids"]
        answer = [*words(example["answer"])["input_ids"], words.eos_token_id]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total -= sum(float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        count += len(answer)
    assert made.history[0]["loss"] == pytest.approx(total / count, rel=1e-4)


def test_the_same_seed_gives_the_same_adapter(base: Path, tmp_path: Path) -> None:
    settings = LoraSettings(r=4, lora_dropout=0.1)
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        torch.manual_seed(hash(name) % 1000)  # what was drawn before must not matter
        run(base, tmp_path / name, settings, epochs=2, seed=seed, batch=2)
    one, two, other = (weights(tmp_path / name) for name in ("one", "two", "other"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_rank_alpha_and_targets_are_honoured(base: Path, tmp_path: Path) -> None:
    settings = LoraSettings(r=3, lora_alpha=7, target_modules=("o_proj",), lora_dropout=0.25)
    made = run(base, tmp_path / "out", settings)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"], saved["bias"]) == (3, 7, 0.25, "none")
    tensors = weights(tmp_path / "out")
    assert {key.split(".")[-3] for key in tensors} == {"o_proj"}
    assert {min(tensor.shape) for tensor in tensors.values()} == {3}
    assert made.trainable == sum(tensor.numel() for tensor in tensors.values())


def test_all_targets_every_linear_layer(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "out", LoraSettings(r=2))
    targets = {key.split(".")[-3] for key in weights(tmp_path / "out")}
    assert targets == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_dropout_acts_in_training(base: Path, tmp_path: Path) -> None:
    for name, dropout in (("without", 0.0), ("with", 0.5)):
        settings = LoraSettings(r=2, lora_dropout=dropout)
        run(base, tmp_path / name, settings, epochs=3)
    without, dropped = weights(tmp_path / "without"), weights(tmp_path / "with")
    assert not all(torch.equal(without[key], dropped[key]) for key in without)


@pytest.mark.parametrize(("bias", "trained"), [("none", set()), ("lora_only", {"dense"}), ("all", {"dense", "fc1"})])
def test_bias_says_which_biases_train(tmp_path: Path, bias: Any, trained: set[str]) -> None:
    save_phi2(tmp_path / "phi")
    settings = LoraSettings(r=2, target_modules=("dense",), bias=bias)
    run(tmp_path / "phi", tmp_path / "out", settings)
    keys = [key.removesuffix(".bias") for key in weights(tmp_path / "out") if key.endswith(".bias")]
    biases = {key.removesuffix(".base_layer").split(".")[-1] for key in keys}
    assert trained <= biases
    assert bias == "all" or biases == trained


def test_an_adapter_is_trained_further(base: Path, tmp_path: Path) -> None:
    first = run(base, tmp_path / "first", LoraSettings(r=4, lora_dropout=0.1), epochs=4, learning_rate=1e-2)
    second = run(base, tmp_path / "second", LoraSettings(r=4), adapter=tmp_path / "first", learning_rate=1e-2)
    assert second.history[0]["loss"] < first.history[-1]["loss"]
    assert not torch.equal(*(next(iter(weights(tmp_path / name).values())) for name in ("first", "second")))
    for wrong in (LoraSettings(lora_dropout=0.2), LoraSettings(target_modules=("o_proj",))):
        with pytest.raises(SettingsError, match="leave the key out"):
            run(base, tmp_path / "third", wrong, adapter=tmp_path / "first")


def test_a_base_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no Hugging Face checkpoint is there \(config.json\)"):
        run(tmp_path / "nothing", tmp_path / "out", LoraSettings())


def test_a_target_that_does_not_exist_is_an_error(base: Path, tmp_path: Path) -> None:
    settings = LoraSettings(target_modules=("qkv_proj", "q_proj"))
    with pytest.raises(SettingsError, match=r"'q_proj'.*qkv_proj"):
        run(base, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_examples_beyond_the_context_are_counted_not_cut(base: Path, tmp_path: Path) -> None:
    long = Example(prompt="x" * 500, answer="y")
    made = run(base, tmp_path / "out", LoraSettings(r=2), [*EXAMPLES, long])
    assert (made.facts["examples"], made.facts["left_out"]) == (4, 1)
    longer = Example(prompt="the line reads 1 " * 3, answer="y")
    tokens = len(AutoTokenizer.from_pretrained(base)(longer["prompt"] + "y<|endoftext|>")["input_ids"])
    for context, left_out in ((tokens, 0), (tokens - 1, 1)):
        made = run(base, tmp_path / "out", LoraSettings(r=2), [*EXAMPLES, longer], context=context)
        assert made.facts["left_out"] == left_out
    with pytest.raises(ValueError, match="none of 1 examples fits the context of 64 tokens"):
        run(base, tmp_path / "out", LoraSettings(r=2), [long])


def test_the_best_epoch_is_kept_and_the_training_ends_when_it_gets_no_better(base: Path, tmp_path: Path) -> None:
    # Held out are the same prompts with other answers: to learn the ones is to lose the others.
    others = [Example(prompt=item["prompt"], answer=" wait 9") for item in EXAMPLES]
    settings = {"epochs": 10, "learning_rate": 1e-2, "seed": 1, "patience": 2}
    made = run(base, tmp_path / "out", LoraSettings(r=8), held_out=others, **settings)
    losses = [row["held_out_loss"] for row in made.history]
    assert made.facts["stopped_early"]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 10
    assert made.facts["best_step"] == best
    short = run(base, tmp_path / "short", LoraSettings(r=8), held_out=others, **settings | {"patience": 10})
    assert not short.facts["stopped_early"] and len(short.history) == 10
    kept, again = weights(tmp_path / "out"), weights(tmp_path / "short")
    assert all(torch.equal(kept[key], again[key]) for key in kept)


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
