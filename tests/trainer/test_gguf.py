"""GGUF files made from checkpoints compute in llama.cpp what the checkpoint computes in transformers."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_phi import END, PHI3, save_phi2, save_phi3, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.export.gguf import ExportError, export_gguf, quantize_gguf
from trainer.export.gguf_lora import export_lora_gguf
from trainer.export.gguf_vocab import _SPLITS

TOKENS = [5, 301, 42, 17, 388, 90, 7, 255, 300, 12, 64, 311]
# Of logits whose standard deviation is 1 to 2; a swapped row or a wrong rotation moves them by more than 1.
TOLERANCE = 0.0005
TOLERANCE_GELU = 0.01  # llama.cpp looks GELU, which Phi-2 has, up in a table of float16


def logits_of(path: Path, tokens: list[int], adapter: Path | None = None) -> NDArray[np.float32]:
    """Logits (tokens, vocabulary) of llama.cpp, with float32 keys and values (float16 is its default)."""
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, type_k=f32, type_v=f32)
    if adapter is not None:
        loaded = llama_cpp.llama_adapter_lora_init(model.model, str(adapter).encode())
        assert loaded, "llama.cpp refused the adapter"
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
        assert llama_cpp.llama_set_adapters_lora(model.ctx, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
    model.eval(tokens)
    logits = np.array(model.scores[: len(tokens)])
    model.close()
    return logits


@torch.no_grad()
def reference(model: Any, tokens: list[int]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    return logits


@torch.no_grad()
def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


def assert_same(path: Path, model: Any, adapter: Path | None = None, tolerance: float = TOLERANCE) -> None:
    tokens = greedy(model, TOKENS, 12)
    expected, found = reference(model, tokens), logits_of(path, tokens, adapter)
    assert expected.std() > 0.5
    assert np.abs(expected - found).max() < tolerance
    assert (expected.argmax(-1) == found.argmax(-1))[len(TOKENS) - 1 :].all()


LONGROPE = {"type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0] * 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "ungrouped": {"num_key_value_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "partly rotated": {"partial_rotary_factor": 0.5},
    "theta": {"rope_theta": 500.0},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_phi3_computes_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = save_phi3(tmp_path / "phi", **changes)
    assert_same(export_gguf(tmp_path / "phi", tmp_path / "phi.gguf", "f32"), model)


def test_long_rope_computes_the_same_beyond_the_trained_context(tmp_path: Path) -> None:
    # llama.cpp chooses the factors by the size of its context (64), transformers by what it was given: so be longer.
    model = save_phi3(tmp_path / "phi", rope_scaling=LONGROPE, original_max_position_embeddings=16)
    path = export_gguf(tmp_path / "phi", tmp_path / "phi.gguf", "f32")
    tokens = TOKENS + TOKENS
    assert np.abs(reference(model, tokens) - logits_of(path, tokens)).max() < TOLERANCE


def test_phi2_computes_the_same(tmp_path: Path) -> None:
    model = save_phi2(tmp_path / "phi")
    assert_same(export_gguf(tmp_path / "phi", tmp_path / "phi.gguf", "f32"), model, tolerance=TOLERANCE_GELU)


def test_f16_file_is_half_as_large_and_says_the_same(tmp_path: Path) -> None:
    model = save_phi3(tmp_path / "phi")
    full = export_gguf(tmp_path / "phi", tmp_path / "f32.gguf", "f32")
    half = export_gguf(tmp_path / "phi", tmp_path / "f16.gguf")
    assert half.stat().st_size < 0.6 * full.stat().st_size
    assert (reference(model, TOKENS).argmax(-1) == logits_of(half, TOKENS).argmax(-1)).all()


def test_bfloat16_shards_export_like_one_file(tmp_path: Path) -> None:
    save_phi3(tmp_path / "phi")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "phi", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "phi", max_shard_size="200KB")
    (tmp_path / "phi" / "model.safetensors").unlink()
    assert len(list((tmp_path / "phi").glob("*.safetensors"))) > 1
    assert_same(export_gguf(tmp_path / "phi", tmp_path / "phi.gguf", "f32"), model.float())


def test_q8_is_smaller_and_close(tmp_path: Path) -> None:
    model = save_phi3(tmp_path / "phi")
    half = export_gguf(tmp_path / "phi", tmp_path / "f16.gguf")
    small = quantize_gguf(half, tmp_path / "q8.gguf", "Q8_0")
    assert small.stat().st_size < 0.75 * half.stat().st_size
    assert np.abs(reference(model, TOKENS) - logits_of(small, TOKENS)).mean() < 0.1
    with pytest.raises(ExportError, match=r"Q9_9.*Q8_0"):
        quantize_gguf(half, tmp_path / "q9.gguf", "Q9_9")
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    with pytest.raises(ExportError, match=r"junk\.gguf"):
        quantize_gguf(tmp_path / "junk.gguf", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


TEXTS = [
    "line 1 read a 7 with score 0.4. What to do?\n",
    "  two  spaces,\ttabs\r\n\nand don't I'LL WE'VE CamelCaseWords 1234567",
    "größer ½ 日本語 🙂 naïve — “quotes”…",
    f"ends here{END} and goes on",
]


@pytest.mark.parametrize("split", [None, *_SPLITS], ids=["gpt-2", *_SPLITS.values()])
def test_text_becomes_the_same_tokens(tmp_path: Path, split: str | None) -> None:
    save_phi3(tmp_path / "phi", words=tokenizer(split))
    path = export_gguf(tmp_path / "phi", tmp_path / "phi.gguf")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    words = AutoTokenizer.from_pretrained(tmp_path / "phi")
    for text in TEXTS:
        tokens = model.tokenize(text.encode(), special=True)
        assert tokens == words(text)["input_ids"]
        assert model.detokenize(tokens, special=True).decode() == text


def test_special_tokens_and_chat_template_arrive(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    words = tokenizer()
    words.chat_template = template
    save_phi3(tmp_path / "phi", words=words)
    content = json.loads((tmp_path / "phi" / "tokenizer.json").read_text())
    start = {"SpecialToken": {"id": END, "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
    }
    (tmp_path / "phi" / "tokenizer.json").write_text(json.dumps(content))
    path = export_gguf(tmp_path / "phi", tmp_path / "phi.gguf")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    assert model.metadata["tokenizer.chat_template"] == template
    assert model.token_bos() == model.token_eos() == 0
    assert model.tokenize(b"a")[0] == 0  # this tokenizer puts the beginning of text in front


def test_unsupported_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "phi"
    save_phi3(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GizmoForCausalLM"]}))
    with pytest.raises(ExportError, match=r"GizmoForCausalLM.*Phi3ForCausalLM"):
        export_gguf(folder, tmp_path / "out.gguf")
    (folder / "config.json").write_text(json.dumps(config))
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": {"type": "Metaspace"}}))
    with pytest.raises(ExportError, match="byte-level BPE"):
        export_gguf(folder, tmp_path / "out.gguf")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"model\.safetensors"):
        export_gguf(folder, tmp_path / "out.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"phi"}  # nothing half written


def test_weights_beyond_float16_are_refused_not_written_as_infinity(tmp_path: Path) -> None:
    model = save_phi3(tmp_path / "phi")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "phi")
    with pytest.raises(ExportError, match=r"output\.weight.*f32"):
        export_gguf(tmp_path / "phi", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def save_adapter(base: Path, folder: Path, **changes: Any) -> Any:
    """A random adapter for `base`, saved in PEFT's format; the merged model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | changes
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload().eval()


ADAPTERS: dict[str, dict[str, Any]] = {
    "all linear": {},
    "fused attention": {"target_modules": ["qkv_proj"]},
    "fused feed-forward": {"target_modules": ["gate_up_proj"]},
    "output": {"target_modules": ["o_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "down_proj"]},
    "rank-stabilised": {"use_rslora": True},
}


@pytest.mark.parametrize("changes", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_adapter_computes_what_the_merged_model_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    base = save_phi3(tmp_path / "phi")
    merged = save_adapter(tmp_path / "phi", tmp_path / "lora", **changes)
    path = export_gguf(tmp_path / "phi", tmp_path / "phi.gguf", "f32")
    adapter = export_lora_gguf(tmp_path / "lora", tmp_path / "phi", tmp_path / "lora.gguf")
    assert np.abs(reference(base, TOKENS) - reference(merged, TOKENS)).max() > 500 * TOLERANCE  # it does something
    assert_same(path, merged, adapter)


def test_adapter_for_phi2(tmp_path: Path) -> None:
    save_phi2(tmp_path / "phi")
    merged = save_adapter(tmp_path / "phi", tmp_path / "lora")
    path = export_gguf(tmp_path / "phi", tmp_path / "phi.gguf", "f32")
    adapter = export_lora_gguf(tmp_path / "lora", tmp_path / "phi", tmp_path / "lora.gguf")
    assert_same(path, merged, adapter, tolerance=TOLERANCE_GELU)


def test_adapters_that_gguf_cannot_hold_are_refused(tmp_path: Path) -> None:
    save_phi3(tmp_path / "phi")
    save_adapter(tmp_path / "phi", tmp_path / "dora", use_dora=True)
    with pytest.raises(ExportError, match="use_dora"):
        export_lora_gguf(tmp_path / "dora", tmp_path / "phi", tmp_path / "out.gguf")
    save_phi2(tmp_path / "phi2")
    save_adapter(tmp_path / "phi2", tmp_path / "bias", bias="all")
    with pytest.raises(ExportError, match="bias"):
        export_lora_gguf(tmp_path / "bias", tmp_path / "phi2", tmp_path / "out.gguf")
    save_adapter(tmp_path / "phi", tmp_path / "lora")
    save_phi3(tmp_path / "wide", **{key: PHI3[key] * 2 for key in ("hidden_size", "intermediate_size")})
    with pytest.raises(ExportError, match="another base"):
        export_lora_gguf(tmp_path / "lora", tmp_path / "wide", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
