"""PeftHead: the documented configuration of a learning agent works, with every key, in front of any tuner."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_phi import tokenizer
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from trainer.checkpoints import CheckpointError
from trainer.tuners.dpo.data import Pair
from trainer.tuners.lora.data import Example
from trainer.tuners.peft_head import PeftHead
from trainer.tuners.settings import SettingsError

# The documentation's own example of a learning agent's configuration, and its model's architecture.
DOCUMENTED = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "v_proj"],
    "lora_dropout": 0.1,
    "bias": "none",
}
EXAMPLES = [Example(prompt=f"the line reads {n}", answer=f" ask {word}") for n, word in enumerate("abcd")]
PAIRS = [Pair(prompt=item["prompt"], chosen=item["answer"], rejected=" 1") for item in EXAMPLES]


pytestmark = pytest.mark.usefixtures("one_thread")


SHAPE = {
    "vocab_size": 400, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(MistralForCausalLM(MistralConfig(**SHAPE)), tmp_path_factory.mktemp("base") / "mistral")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its projections of queries, keys and values have biases."""
    torch.manual_seed(0)
    return save(Qwen2ForCausalLM(Qwen2Config(**SHAPE)), tmp_path_factory.mktemp("base") / "qwen")


@pytest.mark.parametrize(("learner", "data"), [("lora", EXAMPLES), ("dpo", PAIRS)])
def test_the_documented_example_trains(mistral: Path, tmp_path: Path, learner: str, data: Any) -> None:
    head = PeftHead(mistral, DOCUMENTED, learner=learner)
    tuned = head.tune(data, tmp_path / "out", tmp_path / "scratch", epochs=4, batch=4, learning_rate=1e-2)
    assert head.adapter == tuned.path == tmp_path / "out"
    assert tuned.history[-1]["loss"] < tuned.history[0]["loss"]
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {key: sorted(saved[key]) if key == "target_modules" else saved[key] for key in DOCUMENTED} == DOCUMENTED
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in tensors} == {"q_proj", "v_proj"}
    assert {min(tensor.shape) for tensor in tensors.values()} == {16}
    base, inputs = AutoModelForCausalLM.from_pretrained(mistral), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = base(inputs).logits
        after = PeftModel.from_pretrained(base, tmp_path / "out")(inputs).logits
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("r", 3, {"r": 3}),
        ("lora_alpha", 5, {"lora_alpha": 5}),
        ("target_modules", ["o_proj"], {"target_modules": ["o_proj"]}),
        ("lora_dropout", 0.5, {"lora_dropout": 0.5}),
        ("bias", "lora_only", {"bias": "lora_only"}),
    ],
)
def test_every_key_has_its_effect(qwen: Path, key: str, value: Any, seen: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = PeftHead(qwen, DOCUMENTED).prepare_peft_model()
    torch.manual_seed(0)
    changed = PeftHead(qwen, DOCUMENTED | {key: value}).prepare_peft_model()
    config = changed.peft_config["default"].to_dict()
    assert {name: sorted(config[name]) if name == "target_modules" else config[name] for name in seen} == seen

    def facts(model: Any) -> dict[str, Any]:
        layers = [layer for _, layer in model.named_modules() if hasattr(layer, "lora_A")]
        return {
            "r": {layer.lora_A["default"].weight.shape[0] for layer in layers},
            "lora_alpha": {layer.scaling["default"] * layer.r["default"] for layer in layers},
            "target_modules": {layer.in_features + layer.out_features for layer in layers},
            "lora_dropout": {getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers},
            "bias": {name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")},
        }

    before, after = facts(plain), facts(changed)
    assert {name for name in before if before[name] != after[name]} == {key}


def test_a_wrong_key_says_so_and_a_wrong_learner_names_those_there_are(mistral: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"lora.lora_rank = 8: .*known keys are r, lora_alpha"):
        PeftHead(mistral, {"lora_rank": 8})
    with pytest.raises(ValueError, match="use one of dpo, lora"):
        PeftHead(mistral, DOCUMENTED, learner="magic")
    with pytest.raises(SettingsError, match=r"'qkv_proj'.*no such module.*q_proj"):
        PeftHead(mistral, {"target_modules": ["qkv_proj"]}).tune(EXAMPLES, tmp_path / "out", tmp_path / "scratch")
    with pytest.raises(SettingsError, match="the head has its own"):
        PeftHead(mistral, DOCUMENTED).settings(lora={"r": 4})


@pytest.mark.parametrize(("learner", "data"), [("lora", EXAMPLES), ("dpo", PAIRS)])
def test_places_may_be_relative_to_where_the_process_is(
    mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learner: str, data: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(mistral)
    head = PeftHead("model", DOCUMENTED, learner=learner)

    def stop(row: Any) -> None:
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    for report in (stop, lambda _row: None):
        with nullcontext() if report is not stop else pytest.raises(KeyboardInterrupt):
            tuned = head.tune(
                data, Path("out"), Path("scratch"), held_out=data[:1], report=report, epochs=3, batch=4,
                checkpoint_steps=1,
            )  # fmt: skip
    assert tuned.facts["continued_at_step"]
    assert tuned.path == Path("out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}, "nothing is left of its checkpoints"


def test_a_model_that_is_absent_or_broken_is_named_with_the_fix(mistral: Path, tmp_path: Path) -> None:
    for name in ("cut", "junk"):
        shutil.copytree(mistral, tmp_path / name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "junk" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "best.pt").write_bytes(b"no checkpoint")
    cases: list[tuple[str, type[Exception], str]] = [
        ("absent", CheckpointError, "absent: neither a folder here nor to be had from the hub.*name its folder"),
        ("best.pt", SettingsError, r"best\.pt.*takes the Hugging Face folder of a language model"),
        ("empty", SettingsError, r"empty.*no Hugging Face checkpoint is there \(config\.json\); name the folder"),
        ("cut", SettingsError, r"cut.*not a whole checkpoint.*save it with save_pretrained"),
        ("junk", SettingsError, r"junk.*not a whole checkpoint.*save it with save_pretrained"),
    ]
    for name, kind, said in cases:
        with pytest.raises(kind, match=said):
            PeftHead(tmp_path / name).prepare_peft_model()
    for name in ("cut", "junk"):
        with pytest.raises(SettingsError, match=f"{name}.*not a whole checkpoint"):
            PeftHead(tmp_path / name).tune(EXAMPLES, tmp_path / "out", tmp_path / "scratch")
    with pytest.raises(CheckpointError, match=r"best\.pt: not a checkpoint of ultralytics"):
        PeftHead(tmp_path / "best.pt", learner="yolo").prepare_peft_model()


def test_a_head_is_configured_without_a_heavy_package() -> None:
    code = (
        "import sys; from trainer.tuners.peft_head import PeftHead; PeftHead('m', {'r': 4});"
        "import trainer.tuners.lora.data, trainer.tuners.dpo.data;"
        "print({'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
