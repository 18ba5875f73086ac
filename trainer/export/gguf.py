"""Writes Hugging Face checkpoints as GGUF, the format of llama.cpp, and quantises such files.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Which keys and tensors an architecture needs is what
llama.cpp reads for it: `trainer.export.gguf_architectures` has one row for each that is supported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from trainer.export.gguf_architectures import (
    ARCHITECTURES,
    Architecture,
    Config,
    ExportError,
    architecture_of,
    completed,
)
from trainer.export.gguf_vocab import model_name, write_vocabulary

__all__ = ["ARCHITECTURES", "Config", "ExportError", "architecture_of", "export_gguf", "quantize_gguf", "read_json"]

OutType = Literal["f16", "f32"]


class NotFinite(ExportError):
    """A weight is not a number in the type that it is written as."""


def export_gguf(checkpoint: Path, out: Path, outtype: OutType = "f16") -> Path:
    """Write the Hugging Face checkpoint in folder `checkpoint` (config.json, *.safetensors, tokenizer.json) to `out`.

    Matrices are stored as `outtype`, vectors as float32. Tensors are streamed: no more than one is in memory. `out`
    appears whole or not at all. Raises ExportError.
    """
    config = read_json(checkpoint / "config.json")
    architecture = architecture_of(checkpoint, config)
    config = completed(architecture, config)
    names = gguf.get_tensor_name_map(architecture.arch, config["num_hidden_layers"])
    with safetensors_of(checkpoint) as tensors, written_beside(out) as beside:
        writer = gguf.GGUFWriter(beside, gguf.MODEL_ARCH_NAMES[architecture.arch])
        try:
            _write_keys(writer, checkpoint, config, architecture, outtype)
            plan = [
                (_gguf_name(names, name), tensor, architecture.rows(name.rpartition(".")[0], config))
                for name, tensor in tensors.items()
                if _is_weight(name)
            ]
            extra = architecture.extra(config)
            for name, tensor, _ in plan:
                dtype = _stored_as(tensor.shape, outtype)
                writer.add_tensor_info(name, tensor.shape, np.dtype(dtype), math.prod(tensor.shape) * dtype().nbytes)
            for name, array in extra.items():
                writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor, rows in plan:
                array = _cast(name, tensor.read(), _stored_as(tensor.shape, outtype))
                writer.write_tensor_data(array if rows is None else array[rows])
            for array in extra.values():
                writer.write_tensor_data(array)
        finally:
            writer.close()
    return out


def quantize_gguf(source: Path, out: Path, kind: str = "Q8_0") -> Path:
    """Quantise the f16 or f32 GGUF `source` with llama.cpp, `kind` as it calls it (Q8_0, Q4_K_M, ...), into `out`.

    Raises ExportError.
    """
    import llama_cpp  # only here: the trainer can export without it

    from edged.engines.llama import capture_log, log_reason

    ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if ftype is None:
        prefix = "LLAMA_FTYPE_MOSTLY_"
        known = ", ".join(sorted(name.removeprefix(prefix) for name in dir(llama_cpp) if name.startswith(prefix)))
        raise ExportError(f"quantisation {kind!r} is unknown to llama.cpp; it knows: {known}")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    capture_log()
    with written_beside(out) as beside:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(beside).encode(), params)
        if code != 0:
            raise ExportError(f"{source}: cannot be quantised to {kind}{log_reason()}; give an f16 or f32 GGUF")
    return out


def unsuitable(source: Path, kind: str) -> str:
    """What of the f16 or f32 GGUF `source` does not become `kind`, because its rows are no whole blocks of it; llama.cpp
    stores that with more bits. Empty when all of it does."""
    small = kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")  # the others are kinds of blocks of 256
    block = 32 if small else 256
    matrices = [tensor for tensor in gguf.GGUFReader(source).tensors if sum(int(n) > 1 for n in tensor.shape) > 1]
    odd = [tensor for tensor in matrices if int(tensor.shape[0]) % block]
    if not odd:
        return ""
    lengths = ", ".join(str(length) for length in sorted({int(tensor.shape[0]) for tensor in odd}))
    return (
        f"{len(odd)} of {len(matrices)} matrices have rows of {lengths} numbers, no multiple of {block}: llama.cpp stores "
        f"them with more bits than {kind}"
    )


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint, still on disk; `read` gives it in its own type."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@contextmanager
def safetensors_of(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """All tensors of the *.safetensors files in `folder` by name, read when asked for; raises ExportError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ExportError(f"{folder}: no *.safetensors in it; save the checkpoint with save_pretrained()")
    tensors: dict[str, StoredTensor] = {}
    with ExitStack() as stack:
        for path in files:
            try:
                file: Any = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ExportError(f"{path}: not a whole safetensors file ({error}); save it again") from error
            for name in file.keys():  # noqa: SIM118  # not a dict
                shape = tuple(file.get_slice(name).get_shape())
                tensors[name] = StoredTensor(shape, partial(file.get_tensor, name))
        yield tensors


@contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """A path beside `out` to write to; it becomes `out` when the block ends well, and goes away when not. It is not fsynced:
    what a release ships is, when it is registered."""
    beside = out.with_name(f".{out.name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield beside
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: Path) -> Config:
    """The object in a JSON file of a checkpoint; raises ExportError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read as JSON ({error}); is {path.parent} a whole checkpoint?") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path}: holds {type(value).__name__} instead of an object; is {path.parent} a checkpoint?")
    return value


def _write_keys(
    writer: gguf.GGUFWriter, checkpoint: Path, config: Config, architecture: Architecture, outtype: OutType
) -> None:
    heads = config["num_attention_heads"]
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if outtype == "f16" else gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(architecture.context(config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    architecture.describe(writer, config)
    try:
        writer.add_name(model_name(checkpoint))
        write_vocabulary(writer, checkpoint, config["vocab_size"])
    except (OSError, ValueError) as error:
        raise ExportError(f"{checkpoint}: its tokenizer cannot be written as GGUF: {error}") from error


def _is_weight(name: str) -> bool:
    # Old checkpoints carry tables that are computed from the config.
    return not name.endswith((".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias"))


def _gguf_name(names: gguf.TensorNameMap, name: str) -> str:
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ExportError(f"tensor {name} has no place in this architecture; export the merged model, without adapters")
    return found


def _stored_as(shape: tuple[int, ...], outtype: OutType) -> type[np.float16] | type[np.float32]:
    # llama.cpp adds and multiplies with vectors in float32 only.
    return np.float16 if outtype == "f16" and len(shape) > 1 else np.float32


def _cast(name: str, tensor: torch.Tensor, dtype: type[np.float16] | type[np.float32]) -> NDArray[Any]:
    array = tensor.to(torch.float32).numpy()
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        fix = "train again" if not np.isfinite(array).all() else 'use outtype "f32"'
        raise NotFinite(f"tensor {name}: values are not finite as {np.dtype(dtype).name}; {fix}")
    return cast
