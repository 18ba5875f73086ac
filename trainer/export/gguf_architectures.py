"""How each Hugging Face architecture is called and described in GGUF: one row of `ARCHITECTURES` each.

Adding one: its name in config.json ("architectures"), its GGUF architecture, its keys, the rows that llama.cpp wants in
another order. Tensor names come from the package `gguf`. Parity (`trainer.export.parity`) shows whether the row is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Config = dict[str, Any]


class ExportError(Exception):
    """A checkpoint cannot be exported; the message names the file or key, its value and the fix."""


def _no_rows(_module: str, _config: Config) -> NDArray[np.int64] | None:
    return None


def _whole_context(config: Config) -> int:
    return int(config["max_position_embeddings"])


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one Hugging Face architecture is called and described in GGUF.

    `describe` writes the keys beyond the common ones; `extra` gives tensors that the checkpoint keeps in its config.
    `rows`: in which order llama.cpp wants the rows of a module's weight, bias and LoRA B; None as they are. `context`: how
    many tokens llama.cpp computes as transformers does. `defaults`: what transformers assumes where config.json is silent.
    """

    arch: gguf.MODEL_ARCH
    describe: Callable[[gguf.GGUFWriter, Config], None]
    extra: Callable[[Config], dict[str, NDArray[np.float32]]] = lambda _: {}
    rows: Callable[[str, Config], NDArray[np.int64] | None] = _no_rows
    context: Callable[[Config], int] = _whole_context
    defaults: Config = field(default_factory=dict)


def architecture_of(checkpoint: Path, config: Config) -> Architecture:
    """The row of ARCHITECTURES for a checkpoint's config; raises ExportError naming what is supported."""
    names = config.get("architectures") or ["none named"]
    if names[0] not in ARCHITECTURES:
        raise ExportError(
            f"{checkpoint}: architecture {names[0]} is not supported; supported: {', '.join(ARCHITECTURES)}. "
            "Add a row to ARCHITECTURES for another one"
        )
    return ARCHITECTURES[names[0]]


def completed(architecture: Architecture, config: Config) -> Config:
    """A checkpoint's config with what transformers assumes where it is silent; newer files keep both rope keys in one."""
    told = architecture.defaults | {key: value for key, value in config.items() if value is not None}
    rope = told.get("rope_parameters")
    if rope:
        told = told | {"rope_theta": rope.get("rope_theta", told.get("rope_theta")), "rope_scaling": rope}
    told.setdefault("num_key_value_heads", told["num_attention_heads"])
    if _rope_kind(told) == "default":
        told = {key: value for key, value in told.items() if key != "rope_scaling"}
    return told


def _rope_kind(config: Config) -> str:
    scaling = config.get("rope_scaling")
    return str(scaling.get("rope_type", scaling.get("type"))) if scaling else "default"


def head_size(config: Config) -> int:
    """Numbers of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rotary_dimensions(config: Config) -> int:
    return int(head_size(config) * config.get("partial_rotary_factor", 1.0))


def _describe_phi3(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(_rotary_dimensions(config))
    writer.add_sliding_window(config.get("sliding_window") or 0)
    if config.get("rope_scaling"):
        trained, stretched = config["original_max_position_embeddings"], config["max_position_embeddings"]
        # LongRoPE, Ding et al. 2024 (https://arxiv.org/abs/2402.13753), section 3: attention grows with the stretch.
        factor = stretched / trained
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
        writer.add_rope_scaling_orig_ctx_len(trained)
        writer.add_rope_scaling_attn_factors(attention)


def _rope_factors_phi3(config: Config) -> dict[str, NDArray[np.float32]]:
    scaling = config.get("rope_scaling")
    if not scaling:
        return {}
    kind = _rope_kind(config)
    if kind not in ("longrope", "su"):
        raise ExportError(f"rope_scaling.type = {kind!r}: only 'longrope' exists for Phi-3; correct config.json")
    return {
        f"rope_factors_{name}.weight": np.asarray(scaling[f"{name}_factor"], np.float32) for name in ("long", "short")
    }


def _describe_phi2(writer: gguf.GGUFWriter, config: Config) -> None:
    if config.get("qk_layernorm"):
        raise ExportError("qk_layernorm = true: llama.cpp has no such Phi-2; use the engine onnx_phi")
    _no_scaling(config)
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(_rotary_dimensions(config))


def _no_scaling(config: Config) -> None:
    if config.get("rope_scaling"):
        raise ExportError(f"rope_scaling.type = {_rope_kind(config)!r} is not supported for this architecture")


def _describe_llama(writer: gguf.GGUFWriter, config: Config) -> None:
    kind, scaling = _rope_kind(config), config.get("rope_scaling") or {}
    if kind not in ("default", "linear", "llama3"):
        raise ExportError(f"rope_scaling.type = {kind!r}: supported are 'linear' and 'llama3'; set it to null for none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    size = head_size(config)
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))


def _rope_factors_llama(config: Config) -> dict[str, NDArray[np.float32]]:
    """By how much each frequency is divided, as transformers' `rope_type` llama3 does: waves shorter than the context
    that was trained stay, far longer ones are stretched, those between are mixed."""
    if _rope_kind(config) != "llama3":
        return {}
    scaling, size = config["rope_scaling"], head_size(config)
    trained, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * math.pi * config["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)
    share = np.clip((trained / waves - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - share) / factor + share)).astype(np.float32)}


def _rows_llama(module: str, config: Config) -> NDArray[np.int64] | None:
    """llama.cpp rotates neighbours of a Llama head, transformers its halves: so pairs must lie side by side."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(
        module.rpartition(".")[2]
    )
    if heads is None:
        return None
    size = head_size(config)
    return np.arange(heads * size).reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)


def _describe_qwen(writer: gguf.GGUFWriter, config: Config) -> None:
    _no_scaling(config)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])


def _describe_qwen3(writer: gguf.GGUFWriter, config: Config) -> None:
    _describe_qwen(writer, config)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))


def _context_before_window(config: Config) -> int:
    """llama.cpp's Llama and Qwen look at all tokens: up to the sliding window that is the same."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return int(min(config["max_position_embeddings"], window or math.inf))


_LLAMA: Config = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
_PHI: Config = {"rope_theta": 10000.0, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5}
_PHI3: Config = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}
_QWEN: Config = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "use_sliding_window": False}

ARCHITECTURES: dict[str, Architecture] = {
    "Phi3ForCausalLM": Architecture(gguf.MODEL_ARCH.PHI3, _describe_phi3, _rope_factors_phi3, defaults=_PHI3),
    "PhiForCausalLM": Architecture(gguf.MODEL_ARCH.PHI2, _describe_phi2, defaults=_PHI),
    "LlamaForCausalLM": Architecture(
        gguf.MODEL_ARCH.LLAMA, _describe_llama, _rope_factors_llama, _rows_llama, defaults=_LLAMA
    ),
    "MistralForCausalLM": Architecture(
        gguf.MODEL_ARCH.LLAMA, _describe_llama, _rope_factors_llama, _rows_llama, _context_before_window, _LLAMA
    ),
    "Qwen2ForCausalLM": Architecture(
        gguf.MODEL_ARCH.QWEN2, _describe_qwen, context=_context_before_window, defaults=_QWEN
    ),
    "Qwen3ForCausalLM": Architecture(
        gguf.MODEL_ARCH.QWEN3, _describe_qwen3, context=_context_before_window, defaults=_QWEN
    ),
}
