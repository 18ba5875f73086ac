"""Writes PEFT LoRA adapters as GGUF, so that llama.cpp attaches them to a loaded base."""

from __future__ import annotations

import math
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from trainer.export.gguf import read_json, safetensors_of, written_beside
from trainer.export.gguf_architectures import Config, ExportError, architecture_of, completed

_PART = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")
_OUTPUT = "lm_head"

# Settings of PEFT that change what the two matrices mean in a way that GGUF cannot hold, and what to do instead.
_REFUSED = {
    "use_dora": "train without DoRA",
    "fan_in_fan_out": "only models of Conv1D layers have it, none of which is supported",
    "modules_to_save": "put the modules into target_modules instead",
    "lora_bias": "train with lora_bias = false",
    "layer_replication": "train without",
    "target_parameters": "name modules in target_modules instead",
    "use_qalora": "train without QALoRA",
}


def export_lora_gguf(adapter: Path, base: Path, out: Path) -> Path:
    """Write the PEFT adapter in folder `adapter`, made for the Hugging Face checkpoint `base`, to `out` as GGUF.

    Each adapted matrix W (outputs, inputs) gets `<name>.lora_a` (rank, inputs) and `<name>.lora_b` (outputs, rank) in
    float32, under the name that W has in the base's GGUF, fused ones included; llama.cpp adds
    scale * alpha / rank * B A, with one alpha for the file: where a module's scaling is another one (`alpha_pattern`,
    `rank_pattern` with `use_rslora`), its B makes up for it. `out` appears whole or not at all. Raises ExportError.
    """
    settings = read_json(adapter / "adapter_config.json")
    config = read_json(base / "config.json")
    architecture = architecture_of(base, config)
    config = completed(architecture, config)
    _check(adapter, settings)
    alpha = float(settings["lora_alpha"])
    names = gguf.get_tensor_name_map(architecture.arch, config["num_hidden_layers"])
    pairs = _pairs(adapter)
    with written_beside(out) as beside, safetensors_of(base) as weights:
        writer = gguf.GGUFWriter(beside, gguf.MODEL_ARCH_NAMES[architecture.arch])
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            for module, (low, high) in sorted(pairs.items()):
                weight = weights.get(f"{module}.weight")
                name = names.get_name(module)
                if weight is None or name is None:
                    raise ExportError(f"{adapter}: adapts {module}, which {base} does not have; is it another base?")
                vocabulary = name == gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.TOKEN_EMBD]
                if vocabulary and f"{_OUTPUT}.weight" not in weights:
                    raise ExportError(
                        f"{adapter}: adapts {module}, which {base} uses as its output too; llama.cpp cannot adapt the "
                        "one without the other: leave it out of target_modules, or merge"
                    )
                shape = _shape(low, high, vocabulary)
                if shape != weight.shape:
                    raise ExportError(f"{adapter}: {module} is {shape}, {weight.shape} in {base}; is it another base?")
                scaled = high * np.float32(_scaling(settings, module, len(low)) / (alpha / len(low)))
                rows = architecture.rows(module, config)
                # Rows of an embedding are looked up, not multiplied: llama.cpp wants that A (vocabulary, rank).
                writer.add_tensor(f"{name}.weight.lora_a", np.ascontiguousarray(low.T) if vocabulary else low)
                writer.add_tensor(f"{name}.weight.lora_b", scaled if rows is None else scaled[rows])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return out


def _check(adapter: Path, settings: Config) -> None:
    """Raises ExportError for what GGUF cannot hold."""
    if settings.get("peft_type") != "LORA":
        raise ExportError(f"{adapter}: peft_type = {settings.get('peft_type')!r}: only LORA adapters exist in GGUF")
    for key, fix in _REFUSED.items():
        if settings.get(key):
            raise ExportError(
                f"{adapter}: {key} = {settings[key]!r} cannot be held by a GGUF adapter; {fix}, or merge the adapter"
            )


def _scaling(settings: Config, module: str, rank: int) -> float:
    """What PEFT multiplies B A of a module with; the first pattern that fits the end of its name counts."""
    alpha = float(settings["lora_alpha"])
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    # Rank-stabilised LoRA scales by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _pairs(adapter: Path) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """(A, B) of each adapted module: A (rank, inputs), B (outputs, rank)."""
    sides: dict[str, dict[str, NDArray[np.float32]]] = {}
    with safetensors_of(adapter) as tensors:
        for key, tensor in tensors.items():
            part = _PART.match(key)
            if part is None:
                raise ExportError(
                    f"{adapter}: tensor {key} is no LoRA matrix and a GGUF adapter cannot hold it; "
                    'train with bias = "none", or merge the adapter'
                )
            array = tensor.read().to(torch.float32).numpy()
            sides.setdefault(part["module"], {})[part["side"]] = np.ascontiguousarray(array)
    missing = [module for module, parts in sides.items() if len(parts) != 2]
    if missing or not sides:
        raise ExportError(f"{adapter}: half of a pair is missing for {missing or 'everything'}; save the adapter again")
    return {module: (parts["A"], parts["B"]) for module, parts in sides.items()}


def _shape(low: NDArray[np.float32], high: NDArray[np.float32], vocabulary: bool) -> tuple[int, int]:
    """Shape of the weight that B A is added to; an embedding's is (vocabulary, outputs)."""
    shape = (high.shape[0], low.shape[1])
    return (shape[1], shape[0]) if vocabulary else shape
