"""Phi checkpoints as ONNX files: on the device's engine they answer what they answer in transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from phi_answers import CONTEXT, LONG, ask, assert_same, load, one_thread, prompt_of
from safetensors.torch import load_file, save_file
from tiny_phi import save_phi2, save_phi3
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.demo.phi import EXAMPLES
from edged.engines.base import (
    EngineError,
    EngineOptions,
)
from edged.engines.onnx_phi import OnnxPhiGenerator
from edged.engines.token_loop import STEP_TOKENS_MAX
from trainer.core.parity import ParityFailed, ParityReport
from trainer.export import onnx_phi
from trainer.export.gguf import ExportError
from trainer.export.onnx_phi import export_phi, export_phi_as
from trainer.releases import build_manifest

LONGROPE = {"type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0] * 8}

CHECKPOINTS: dict[str, Callable[[Path], Any]] = {
    "phi-2": lambda folder: save_phi2(folder, num_key_value_heads=6, max_position_embeddings=CONTEXT),
    "phi-2, grouped": lambda folder: save_phi2(folder, max_position_embeddings=CONTEXT),
    "phi-3": lambda folder: save_phi3(folder, num_key_value_heads=6, **LONG),
    "phi-3, grouped": lambda folder: save_phi3(folder, **LONG),
    "phi-3, one head": lambda folder: save_phi3(folder, num_key_value_heads=1, **LONG),
    "phi-3, tied": lambda folder: save_phi3(folder, tie_word_embeddings=True, **LONG),
    "phi-3, partly rotated": lambda folder: save_phi3(folder, partial_rotary_factor=0.5, **LONG),
    "phi-3, sliding window": lambda folder: save_phi3(folder, sliding_window=40, **LONG),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    CHECKPOINTS[name](tmp_path / "phi")
    words = AutoTokenizer.from_pretrained(tmp_path / "phi")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "phi")
    engine = load(tmp_path / "out", export_phi(tmp_path / "phi", tmp_path / "out", int8=False))
    assert engine.context == CONTEXT
    for length in (1, 17, STEP_TOKENS_MAX, STEP_TOKENS_MAX + 1, 150, CONTEXT - 5, CONTEXT - 1):
        assert_same(engine, model, words, prompt_of(words, length), min(16, CONTEXT - length))
    assert_same(engine, model, words, "seven", 80)


def test_stretched_positions_reach_as_far_as_the_export_is_right(tmp_path: Path) -> None:
    save_phi3(tmp_path / "phi", rope_scaling=LONGROPE, max_position_embeddings=128, original_max_position_embeddings=48)
    words = AutoTokenizer.from_pretrained(tmp_path / "phi")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "phi")
    engine = load(tmp_path / "out", export_phi(tmp_path / "phi", tmp_path / "out", int8=False))
    assert engine.context == 48
    for length in (5, 30, 46):
        assert_same(engine, model, words, prompt_of(words, length), 48 - length)


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_a_merged_export_runs_too(phi: dict[str, Path], tmp_path: Path) -> None:
    """Exports of older versions of optimum: two graphs in one file, and an input that chooses."""
    from optimum.exporters.onnx import export
    from optimum.exporters.onnx.model_configs import Phi3OnnxConfig
    from optimum.onnx import merge_decoders

    model = AutoModelForCausalLM.from_pretrained(phi["base"])
    for name, past in (("first", False), ("next", True)):
        config = Phi3OnnxConfig(model.config, task="text-generation", use_past=True, use_past_in_inputs=past)
        export(model, config, tmp_path / f"{name}.onnx")
    roles = export_phi(phi["base"], tmp_path / "out", int8=False)
    merge_decoders(tmp_path / "first.onnx", tmp_path / "next.onnx", save_path=tmp_path / "out" / "model.onnx")
    engine = load(tmp_path / "out", roles)
    for item in EXAMPLES:
        assert ask(engine, item.prompt)[0] == item.base


@pytest.mark.parametrize("int8", [False, True])
def test_weights_in_a_file_of_their_own(
    phi: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, int8: bool
) -> None:
    monkeypatch.setenv("FORCE_ONNX_EXTERNAL_DATA", "1")  # optimum does so by itself from 2 GiB on
    roles = export_phi(phi["base"], tmp_path / "out", int8=int8)
    assert set(roles) == {"model", "model_data", "tokenizer", "config"}
    data = tmp_path / "out" / roles["model_data"]
    assert data.stat().st_size > 3 * (tmp_path / "out" / roles["model"]).stat().st_size
    assert ask(load(tmp_path / "out", roles), EXAMPLES[0].prompt)[0] == EXAMPLES[0].base
    manifest = build_manifest(tmp_path / "out", "tiny@1.0", kind="llm", engine="onnx_phi", roles=roles)
    data.unlink()
    with pytest.raises(EngineError, match=f"{data.name} is missing"):
        OnnxPhiGenerator(tmp_path / "out", manifest, EngineOptions())


def test_int8_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    """A few activations that dwarf the others leave one scale for all of them nothing to tell the others apart with."""
    save_phi3(tmp_path / "phi", **LONG)
    weights = load_file(tmp_path / "phi" / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("layernorm.weight"):
            tensor[:2] *= 3000
        if name.endswith(("qkv_proj.weight", "gate_up_proj.weight")):
            tensor[:, :2] /= 3000
    save_file(weights, tmp_path / "phi" / "model.safetensors", {"format": "pt"})
    made = export_phi_as(tmp_path / "phi", tmp_path / "int8", "int8-dynamic")
    assert [report.passed for report in made.parity] == [True, False], "it is the rounding that costs it"
    with pytest.raises(ParityFailed, match=r"int8-dynamic.*logits kl .*, at most 0\.25.*Export a wider format"):
        made.check()


def metrics(report: ParityReport) -> dict[str, float]:
    return {row.metric: row.value for row in report.rows}


def test_int8_is_judged_in_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding may cost would hide two rows that a trace has swapped: the file before rounding shows them."""
    save_phi3(tmp_path / "phi", **LONG)
    made = export_phi_as(tmp_path / "phi", tmp_path / "whole", "int8-dynamic").check()
    assert [report.format for report in made.parity] == ["fp32", "int8-dynamic"]
    before, after = (metrics(report) for report in made.parity)
    assert before["logits_mean"] < 1e-4, "the first step has looked at a file that is not rounded"
    assert after["logits_mean"] > 100 * before["logits_mean"], "and the second one at the rounded file"
    assert [each["format"] for each in made.lineage()] == ["fp32", "int8-dynamic"]

    trace = onnx_phi._trace

    def swapped(model: Any, folder: Path) -> Path:
        wrong = copy.deepcopy(model)
        rows = wrong.model.layers[1].mlp.down_proj.weight.data
        rows[[3, 4]] = rows[[4, 3]]
        return trace(wrong, folder)

    monkeypatch.setattr(onnx_phi, "_trace", swapped)
    planted = export_phi_as(tmp_path / "phi", tmp_path / "swapped", "int8-dynamic")
    assert [report.passed for report in planted.parity] == [False, True]
    with pytest.raises(ParityFailed, match=r"exported fp32 file.*logits logits_max .*, at most 0\.01"):
        planted.check()


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    save_phi3(tmp_path / "phi", **LONG)
    roles = export_phi(tmp_path / "phi", tmp_path / "out", int8=False)
    other = save_phi3(tmp_path / "other", sliding_window=100, **LONG)  # differs from the 101st token on only
    report = onnx_phi._parity(other, CONTEXT, tmp_path / "out", roles, tmp_path / "phi", (), "fp32")
    assert not report.passed
    assert "logits_max" in [row.metric for row in report.rows if not row.passed]


def test_checkpoints_that_cannot_be_exported_are_named(tmp_path: Path) -> None:
    save_phi3(tmp_path / "phi")
    folder = tmp_path / "phi"
    config = json.loads((folder / "config.json").read_text())

    def refused(message: str) -> None:
        with pytest.raises(ExportError, match=message):
            export_phi(folder, tmp_path / "out")

    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused("lacks weights, among them model.layers.1.mlp.down_proj.weight")
    save_file({**weights, "model.layers.1.mlp.down_proj.weight": lost}, folder / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**value, "eos_token_id": None}))
    refused("no eos_token_id")
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    refused("LlamaForCausalLM is not supported as ONNX; supported: PhiForCausalLM, Phi3ForCausalLM")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    refused("not a whole checkpoint")


def test_ends_come_from_the_generation_config(tmp_path: Path) -> None:
    """Phi-3 ends a turn with other tokens than a text, and only its generation config says so."""
    save_phi3(tmp_path / "phi")
    path = tmp_path / "phi" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [0, *range(5, 300)]}))
    roles = export_phi(tmp_path / "phi", tmp_path / "out", int8=False)
    finished = ask(load(tmp_path / "out", roles), "the line")[1]
    assert finished.reason == "stop"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(roles.values())
