"""Preference training: the better answer gains on the worse one, in an adapter, with the base as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_phi import save_phi2, save_phi3
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.files import sha256_of
from trainer.tuners.base import Tuned, Work, tuner
from trainer.tuners.dpo.data import Pair
from trainer.tuners.dpo.settings import DpoSettings
from trainer.tuners.settings import LoraSettings, SettingsError

PAIRS = [
    Pair(prompt=f"the line reads {n}", chosen=f" ask {word}", rejected=" 12345")
    for n, word in enumerate(["a", "b", "c", "d"])
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "phi"
    save_phi3(folder, initializer_range=0.05)
    return folder


def run(base: Path, out: Path, *, seed: int = 0, held_out: Any = (), **settings: Any) -> Tuned:
    given = DpoSettings(**{"epochs": 6, "batch": 4, "learning_rate": 5e-3, "lora": LoraSettings(r=4), **settings})
    return tuner("dpo").tune(Work(base, PAIRS, out, out.with_name(f"{out.name}-scratch"), given, seed, held_out))


def margin(base: Path, adapter: Path | None = None) -> float:
    """By how much the better answer is likelier than the worse one, in nats, over all pairs."""
    model, words = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    total = 0.0
    for pair in PAIRS:
        prompt = words(pair["prompt"])["input_ids"]
        for sign, text in ((1, pair["chosen"]), (-1, pair["rejected"])):
            answer = [*words(text)["input_ids"], words.eos_token_id]
            with torch.no_grad():
                scores = model.eval()(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            total += sign * sum(float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
    return total


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: Path, two: Path) -> bool:
    first, second = tensors(one), tensors(two)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_better_answer_gains_and_the_base_is_untouched(base: Path, tmp_path: Path) -> None:
    before = {path.name: sha256_of(path) for path in base.iterdir()}
    made = run(base, tmp_path / "out")
    assert margin(base, tmp_path / "out") > margin(base) + 5
    assert {path.name: sha256_of(path) for path in base.iterdir()} == before
    assert all("lora_" in key for key in tensors(tmp_path / "out"))
    assert made.trainable == sum(tensor.numel() for tensor in tensors(tmp_path / "out").values()) < made.parameters / 5
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    first, last = made.history[0], made.history[-1]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: nothing is preferred yet
    assert last["loss"] < 0.5 and last["margin"] > first["margin"]


def test_an_adapter_is_trained_further_and_is_what_it_must_stay_near(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "first")
    made = run(base, tmp_path / "second", adapter=tmp_path / "first", lora=LoraSettings())
    assert made.history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # measured from the adapter, not from the base
    assert margin(base, tmp_path / "second") > margin(base, tmp_path / "first") + 1
    assert not same(tmp_path / "first", tmp_path / "second")
    with pytest.raises(SettingsError, match=r"lora.r = 16.*has 4"):
        run(base, tmp_path / "third", adapter=tmp_path / "first", lora=LoraSettings(r=16))
    with pytest.raises(SettingsError, match="no PEFT adapter is there"):
        run(base, tmp_path / "third", adapter=tmp_path / "none")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_train_and_the_reference_stays(tmp_path: Path, bias: Any) -> None:
    save_phi2(tmp_path / "phi", initializer_range=0.05)
    lora = LoraSettings(r=2, target_modules=("dense",), bias=bias)
    made = run(tmp_path / "phi", tmp_path / "first", lora=lora, epochs=2)
    assert made.history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert any(key.endswith(".bias") for key in tensors(tmp_path / "first"))
    made = run(tmp_path / "phi", tmp_path / "second", adapter=tmp_path / "first", lora=LoraSettings(), epochs=2)
    assert made.history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert made.history[1]["loss"] < 0.69
    assert not same(tmp_path / "first", tmp_path / "second")


def test_the_same_seed_gives_the_same_adapter_and_dropout_acts(base: Path, tmp_path: Path) -> None:
    for name, dropout in (("one", 0.2), ("two", 0.2), ("without", 0.0)):
        run(base, tmp_path / name, epochs=2, seed=3, lora=LoraSettings(r=4, lora_dropout=dropout))
    assert same(tmp_path / "one", tmp_path / "two")
    assert not same(tmp_path / "one", tmp_path / "without")


def test_a_larger_beta_stays_nearer_to_the_beginning(base: Path, tmp_path: Path) -> None:
    for name, beta in (("free", 0.01), ("tied", 5.0)):
        run(base, tmp_path / name, beta=beta, epochs=20)
    assert margin(base, tmp_path / "tied") < margin(base, tmp_path / "free")


def test_it_ends_early_when_the_held_out_pairs_get_worse(base: Path, tmp_path: Path) -> None:
    others = [Pair(prompt=pair["prompt"], chosen=pair["rejected"], rejected=pair["chosen"]) for pair in PAIRS]
    made = run(base, tmp_path / "out", held_out=others, patience=1, epochs=8)
    assert made.facts["stopped_early"] and len(made.history) < 8
    assert "held_out_margin" in made.history[0]


def test_the_output_layer_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="output layer"):
        run(base, tmp_path / "out", lora=LoraSettings(target_modules=("lm_head", "o_proj")))
