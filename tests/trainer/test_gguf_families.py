"""GGUF of every family in the table computes what its checkpoint computes; what llama.cpp cannot compute is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_llama import SENTENCEPIECE_VOCAB, save_tiny, sentencepiece
from tiny_phi import save_phi3
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.core.parity import ParityFailed
from trainer.export.gguf import export_gguf
from trainer.export.gguf_architectures import ARCHITECTURES, ExportError
from trainer.export.gguf_lora import export_lora_gguf
from trainer.export.language import export_text_gguf, export_text_lora
from trainer.export.parity import gguf_parity, lora_parity, text_reference

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped": ("llama", {}),
    "llama, every head its own": ("llama", {"num_key_value_heads": 6}),
    "llama 3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0, "tie_word_embeddings": True}),
    "llama, stretched": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral, wide heads": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


@pytest.mark.parametrize(("family", "changes"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_it_computes_the_same(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    save_tiny(family, tmp_path / "model", **changes)
    path = export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    reference = text_reference(tmp_path / "model")
    assert sum(len(row) for row in reference.tokens) > 200
    assert gguf_parity(path, reference, "F32").check().rows[0].value < 0.001


def test_phi4_mini_computes_the_same(tmp_path: Path) -> None:
    """Phi-4-mini is a Phi-3 that rotates three quarters of a head, has one matrix for input and output, and long factors."""
    factors = {"type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [2.0] * 6}
    save_phi3(
        tmp_path / "phi", partial_rotary_factor=0.75, tie_word_embeddings=True, rope_scaling=factors,
        max_position_embeddings=1024, original_max_position_embeddings=512,
    )  # fmt: skip
    path = export_gguf(tmp_path / "phi", tmp_path / "phi.gguf", "f32")
    gguf_parity(path, text_reference(tmp_path / "phi"), "F32").check()


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_the_context_ends_where_llama_cpp_looks_further_back(tmp_path: Path, family: str) -> None:
    window = {"sliding_window": 48, "use_sliding_window": True, "max_window_layers": 0}
    save_tiny(family, tmp_path / "model", **(window if family == "qwen2" else {"sliding_window": 48}))
    path = export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    told = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    assert [value for key, value in told.metadata.items() if key.endswith(".context_length")] == ["48"]
    told.close()
    gguf_parity(path, text_reference(tmp_path / "model", context=48), "F32").check()
    assert not gguf_parity(path, text_reference(tmp_path / "model"), "F32").passed


def test_files_of_newer_versions_keep_both_rope_keys_in_one(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", rope_scaling=LLAMA3, rope_theta=500.0)
    reference = text_reference(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    rope = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    path.write_text(json.dumps(config | {"rope_parameters": rope}))
    gguf_parity(export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32"), reference, "F32").check()


TEXTS = [
    "hello line",
    "  two  spaces\n\tand tabs",
    "größer ½ 日本語 🙂 naïve",
    "",
    "a",
    "<|user|>\nName it.<|end|>\n a  b",
]


def phi3_words() -> Any:
    """A SentencePiece-like tokenizer with Phi-3's special tokens, which take the spaces behind them."""
    words = sentencepiece()
    words.add_special_tokens({"pad_token": "<|endoftext|>"})
    words.add_tokens([AddedToken(t, rstrip=True, special=True, normalized=False) for t in ("<|user|>", "<|end|>")])
    return words


@pytest.mark.parametrize("kind", ["llama", "phi-3"])
def test_sentencepiece_makes_the_same_tokens(tmp_path: Path, kind: str) -> None:
    words = sentencepiece() if kind == "llama" else phi3_words()
    save_tiny("llama", tmp_path / "phi-3-like", words=words, vocab_size=SENTENCEPIECE_VOCAB)
    path = export_gguf(tmp_path / "phi-3-like", tmp_path / "model.gguf")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    expected = AutoTokenizer.from_pretrained(tmp_path / "phi-3-like")
    for text in TEXTS:
        tokens = model.tokenize(text.encode(), special=True)
        assert tokens == expected(text)["input_ids"], text
    assert (model.token_bos(), model.token_eos()) == (1, 2)
    assert model.detokenize(model.tokenize("größer ½ 日本語".encode())).decode() == "größer ½ 日本語"
    model.close()


def changed(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def test_tokenizers_that_llama_cpp_lacks_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_tiny("llama", folder, words=sentencepiece(), vocab_size=SENTENCEPIECE_VOCAB)
    whole = json.loads((folder / "tokenizer.json").read_text())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": {"type": "Unigram", "vocab": []}}, r"kind Unigram is not supported; supported are byte-level BPE"),
        ({"normalizer": {"type": "Lowercase"}}, r"normalizer does \['Lowercase'\]"),
        ({"normalizer": None}, "spaces do not become ▁"),
        ({"normalizer": None, "pre_tokenizer": METASPACE}, 'prepend_scheme "first".*set it to "always"'),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer Whitespace is not applied"),
    ]
    for changes, message in cases:
        changed(folder, **whole | changes)
        with pytest.raises(ExportError, match=message):
            export_gguf(folder, tmp_path / "out.gguf")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ExportError, match=r"only a tokenizer\.model; write it with"):
        export_gguf(folder, tmp_path / "out.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic': supported are 'linear' and"),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
    ],
)
def test_positions_that_llama_cpp_scales_otherwise_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    save_tiny(family, tmp_path / "model", **changes)
    with pytest.raises(ExportError, match=message):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf")


def save_adapter(base: Path, folder: Path, **changes: Any) -> None:
    """A random adapter in PEFT's format for the checkpoint in `base`."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | changes
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(folder, save_embedding_layers=False)


PHI3_ADAPTERS: dict[str, dict[str, Any]] = {
    "fused": {"target_modules": ["qkv_proj", "gate_up_proj"]},
    "alphas": {"alpha_pattern": {"qkv_proj": 20, r"layers\.1\.mlp\.down_proj": 1}},
    "ranks": {"rank_pattern": {"gate_up_proj": 8, "o_proj": 2}},
    "rank-stabilised ranks": {"rank_pattern": {"gate_up_proj": 8}, "alpha_pattern": {"o_proj": 2}, "use_rslora": True},
}


@pytest.mark.parametrize("changes", PHI3_ADAPTERS.values(), ids=PHI3_ADAPTERS.keys())
def test_an_adapter_on_a_grouped_phi3_does_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_phi3(tmp_path / "phi", max_position_embeddings=256, original_max_position_embeddings=256)
    save_adapter(tmp_path / "phi", tmp_path / "lora", **changes)
    exported = export_text_lora(tmp_path / "lora", tmp_path / "phi", tmp_path / "out").check()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter.gguf"}
    assert next(row.value for row in exported.parity[0].rows if row.metric == "effect_off") < 0.02


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_an_adapter_of_every_family_does_the_same(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path / "model")
    save_adapter(tmp_path / "model", tmp_path / "lora", target_modules=["q_proj", "k_proj", "v_proj", "gate_proj"])
    export_text_lora(tmp_path / "lora", tmp_path / "model", tmp_path / "out").check()


def test_adapters_that_gguf_cannot_hold_are_refused_with_the_fix(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", tie_word_embeddings=True, attention_bias=True)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias = True.*train with lora_bias = false"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, r"q_proj\..*bias.*train with bias = \"none\""),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*target_modules instead"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.*as its output too.*leave it out of target_modules"),
    ]
    for number, (changes, message) in enumerate(cases):
        save_adapter(tmp_path / "model", tmp_path / f"lora{number}", **changes)
        with pytest.raises(ExportError, match=message):
            export_lora_gguf(tmp_path / f"lora{number}", tmp_path / "model", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def damaged(source: Path, folder: Path, change: str) -> Path:
    """A copy of a checkpoint that is exported as a wrong exporter would: its files say something else."""
    shutil.copytree(source, folder)
    if change == "rope base":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 2 * config["rope_theta"]}))
        return folder
    weights = load_file(folder / "model.safetensors")
    if change == "swapped rows":
        rows = weights["model.layers.0.mlp.down_proj.weight"]
        rows[[3, 4]] = rows[[4, 3]]
    elif change == "swapped heads":
        rows = weights["model.layers.1.self_attn.q_proj.weight"]
        weights["model.layers.1.self_attn.q_proj.weight"] = torch.roll(rows, 16, dims=0)
    else:
        weights["model.norm.weight"] *= 1.05
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("change", ["rope base", "swapped rows", "swapped heads", "scale"])
def test_a_broken_export_is_seen(tmp_path: Path, change: str) -> None:
    save_tiny("llama", tmp_path / "model", max_position_embeddings=512)
    reference = text_reference(tmp_path / "model")
    path = export_gguf(damaged(tmp_path / "model", tmp_path / "damaged", change), tmp_path / "model.gguf")
    report = gguf_parity(path, reference, "F16")
    assert not report.passed
    with pytest.raises(ParityFailed, match=r"F16 file computes something else.*logits_mean"):
        report.check()


def test_rows_left_in_the_order_of_transformers_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "model")
    wrong = replace(ARCHITECTURES["LlamaForCausalLM"], rows=ARCHITECTURES["Qwen2ForCausalLM"].rows)
    monkeypatch.setitem(ARCHITECTURES, "LlamaForCausalLM", wrong)
    made = export_text_gguf(tmp_path / "model", tmp_path / "out", "Q4_K_M")
    assert [(report.format, report.passed) for report in made.parity] == [("F16", False), ("Q4_K_M", False)]


@pytest.mark.parametrize("change", ["alpha", "empty"])
def test_an_adapter_that_does_something_else_is_seen(tmp_path: Path, change: str) -> None:
    save_tiny("llama", tmp_path / "model")
    save_adapter(tmp_path / "model", tmp_path / "lora", target_modules=["v_proj"], init_lora_weights=True)
    if change == "empty":
        weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        nothing = {name: tensor * 0 for name, tensor in weights.items()}
        save_file(nothing, tmp_path / "lora" / "adapter_model.safetensors", {"format": "pt"})
    shutil.copytree(tmp_path / "lora", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    if change == "alpha":
        config["lora_alpha"] *= 1.25
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
    adapter = export_lora_gguf(tmp_path / "other", tmp_path / "model", tmp_path / "lora.gguf")
    base = export_gguf(tmp_path / "model", tmp_path / "base.gguf")
    report = lora_parity(base, adapter, text_reference(tmp_path / "model", adapter=tmp_path / "lora"))
    assert "effect_off" in [row.metric for row in report.rows if not row.passed]


@pytest.mark.parametrize(("kind", "share"), [("Q8_0", 0.6), ("Q6_K", 0.5), ("Q5_K_M", 0.42), ("Q4_K_M", 0.37)])
def test_quantised_files_are_smaller_and_near(wide: Path, tmp_path: Path, kind: str, share: float) -> None:
    made = export_text_gguf(wide, tmp_path, kind).check()
    assert [report.format for report in made.parity] == ["F16", kind]
    assert made.notes == ()
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf"}
    weights = (wide / "model.safetensors").stat().st_size / 2  # float32
    assert (tmp_path / "model.gguf").stat().st_size < share * weights + 50_000


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are whole blocks of llama.cpp's quantisations."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    save_tiny(
        "llama", folder, hidden_size=512, intermediate_size=768, num_attention_heads=8, num_key_value_heads=2,
        initializer_range=0.04,
    )  # fmt: skip
    return folder


def test_what_quantising_cannot_do_is_said(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    made = export_text_gguf(tmp_path / "model", tmp_path / "out", "Q6_K")
    assert made.notes == (
        "16 of 16 matrices have rows of 96, 160 numbers, no multiple of 256: llama.cpp stores them with more bits than Q6_K",
    )
    with pytest.raises(ValueError, match=r"'TQ1_0': a GGUF is written as f32, f16, Q8_0"):
        export_text_gguf(tmp_path / "model", tmp_path / "out", "tq1_0")
    with pytest.raises(ExportError, match=r"Q4_X.*unknown to llama\.cpp"):
        export_text_gguf(tmp_path / "model", tmp_path / "out", "Q4_X")


def test_weights_too_large_for_16_bits_are_quantised_from_32(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight *= 1e-5
        model.lm_head.weight *= 1e5
        model.lm_head.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "model")
    made = export_text_gguf(tmp_path / "model", tmp_path / "out", "Q8_0")
    assert made.parity[0].format == "F32"
    assert made.parity[0].passed
    assert made.notes[0].startswith("quantised from F32: tensor output.weight")
