"""Phi checkpoints (Hugging Face folders) as ONNX files with a cache, for the device's engine `onnx_phi`.

Written by optimum, which traces the model once with made-up inputs. Three things it gets wrong for Phi, and what is done:

- Grouped-query attention. Its export configuration for `phi` makes up a cache with as many heads as the queries have, so
  that a checkpoint with fewer key-value heads cannot be traced at all ("Sizes of tensors must match except in dimension
  2"); its configuration for `phi3` reads `num_key_value_heads`. Both models take the same inputs and `PhiConfig` has
  that key too, so `Phi3OnnxConfig` is used for both.
- Scaled rotary positions. LongRoPE (Phi-3 128k) takes one set of factors up to `original_max_position_embeddings`
  tokens and another one beyond; the trace keeps the first. The exported context ends there: for more, release a GGUF.
- The file is not trusted: it must compute what the checkpoint computes in transformers, on the device's own engine, step
  by step through the cache and past the sliding window where there is one. Otherwise the export is refused
  (`trainer.core.parity` has the tolerances).

int8: weights of matrices and embeddings are rounded once, a scale for each column; activations while the model runs, a
scale for each tensor. Signed weights, because a CPU with VNNI multiplies them twice as fast as unsigned ones.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edged.engines.base import EngineError, EngineOptions
from edged.engines.causal import CausalModel
from edged.engines.ort import Session
from edged.engines.token_loop import STEP_TOKENS_MAX
from trainer.core.parity import TEXT_TOLERANCES, Exported, ParityReport, compare_logits, rows_of
from trainer.export.gguf import read_json
from trainer.export.gguf_architectures import ExportError
from trainer.export.parity import GOLDEN_TEXTS, load_checkpoint
from trainer.export.quantize import convert_fp16
from trainer.files import write_whole
from trainer.releases import build_manifest

ENGINE = "onnx_phi"
SUPPORTED = ("PhiForCausalLM", "Phi3ForCausalLM")
PRECISIONS = ("fp32", "fp16", "int8-dynamic")
_PROBE_TOKENS = 128  # the comparison is this long, or as the context allows
_PROBE_TAIL = 64  # the last of them (at most half) go in steps of _PROBE_STEP
_PROBE_STEP = 4
_MODEL, _TOKENIZER, _CONFIG = "model.onnx", "tokenizer.json", "config.json"


def export_phi(checkpoint: Path, folder: Path, *, int8: bool = True) -> dict[str, str]:
    """Write the checkpoint in `checkpoint` as the files of a release into `folder`; the roles with their file names.

    Needs no network. Raises ExportError naming what is wrong with the checkpoint, ParityFailed saying how far it is off.
    """
    exported = export_phi_as(checkpoint, folder, "int8-dynamic" if int8 else "fp32").check()
    return dict(exported.roles)


def export_phi_as(checkpoint: Path, folder: Path, precision: str, texts: Sequence[str] = GOLDEN_TEXTS) -> Exported:
    """Write the checkpoint in `precision` (of PRECISIONS) into `folder`, with how far the files are off on `texts` and
    made-up tokens.

    A rounded file is judged in two steps: the fp32 file that it is made of, whose tolerances are tight, and what rounding
    did to it. fp16 has weights of half the size and computes as exactly as a GPU would; its inputs, outputs and cache stay
    float32.
    Raises ExportError naming what is wrong with the checkpoint.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"precision {precision!r}: a Phi as ONNX is written as {', '.join(PRECISIONS)}")
    config = read_json(checkpoint / "config.json")
    names = config.get("architectures") or ["none named"]
    if names[0] not in SUPPORTED:
        raise ExportError(
            f"{checkpoint}: architecture {names[0]} is not supported as ONNX; supported: {', '.join(SUPPORTED)}"
        )
    model, tokenizer = _load(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    described = _describe(checkpoint, model, tokenizer)
    given = [list(tokenizer(text)["input_ids"]) for text in texts]
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
        files, reports = _trace(model, Path(scratch) / "fp32"), []
        if precision != "fp32":
            whole = _beside_model(files, tokenizer, described)
            reports.append(
                _parity(model, described["max_position_embeddings"], files, whole, checkpoint, given, "fp32")
            )
            for role in ("tokenizer", "config"):
                (files / whole[role]).unlink()
        if precision == "int8-dynamic":
            files = _quantise(files, Path(scratch) / "int8")
        elif precision == "fp16":
            files = convert_fp16(files / _MODEL, Path(scratch) / "fp16" / _MODEL).parent
        for path in sorted(files.iterdir()):
            path.replace(folder / path.name)
    roles = _beside_model(folder, tokenizer, described)
    reports.append(_parity(model, described["max_position_embeddings"], folder, roles, checkpoint, given, precision))
    return Exported(roles, tuple(reports))


def _beside_model(folder: Path, tokenizer: Any, described: dict[str, Any]) -> dict[str, str]:
    """Write tokenizer and config beside a model in `folder`; the roles of all that is there."""
    roles = {"model" if name == _MODEL else "model_data": name for name in sorted(_models(folder))}
    tokenizer.backend_tokenizer.save(str(folder / _TOKENIZER))
    write_whole(folder / _CONFIG, json.dumps(described, ensure_ascii=False, indent=1).encode())
    return {"tokenizer": _TOKENIZER, "config": _CONFIG, **roles}


def _models(folder: Path) -> list[str]:
    """The names of a model's files in `folder`."""
    return [path.name for path in folder.iterdir() if path.name.startswith(_MODEL)]


def _load(checkpoint: Path) -> tuple[Any, Any]:
    """The checkpoint in float32, and its tokenizer."""
    model, tokenizer = load_checkpoint(checkpoint)
    if not tokenizer.is_fast:
        raise ExportError(f"{checkpoint}: its tokenizer has no tokenizer.json; save it with a fast tokenizer class")
    return model, tokenizer


def _describe(checkpoint: Path, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The release's config: what the engine must know beyond the graph."""
    config = model.config
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = config.eos_token_id
    if ends is None:
        raise ExportError(f"{checkpoint}: no eos_token_id in its configuration; name the token that ends an answer")
    context = config.max_position_embeddings
    if getattr(config, "rope_scaling", None):
        context = getattr(config, "original_max_position_embeddings", context)
    described = {
        "architectures": config.architectures,
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": context,
        "eos_token_id": ends,
    }
    texts = {key: getattr(tokenizer, key, None) for key in ("bos_token", "eos_token", "chat_template")}
    return described | {key: text for key, text in texts.items() if isinstance(text, str)}


def _trace(model: Any, folder: Path) -> Path:
    """Have optimum write the model into `folder` (made): model.onnx, from 2 GiB on with its weights in a second file."""
    from optimum.exporters.onnx import export
    from optimum.exporters.onnx.model_configs import Phi3OnnxConfig

    folder.mkdir()
    config = Phi3OnnxConfig(model.config, task="text-generation", use_past=True, use_past_in_inputs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of every branch that it takes for good
        export(model, config, folder / _MODEL)
        config.post_process_exported_models(folder, {"model": (model, config)}, [_MODEL])
    return folder


def _quantise(source: Path, folder: Path) -> Path:
    """The model of the folder `source` as dynamic int8 in `folder` (made)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder.mkdir()
    quantize_dynamic(
        source / _MODEL,
        folder / _MODEL,
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=len(list(source.iterdir())) > 1,
    )
    return folder


def _parity(
    model: Any,
    context: int,
    folder: Path,
    roles: dict[str, str],
    checkpoint: Path,
    texts: Sequence[list[int]],
    precision: str,
) -> ParityReport:
    """Compare the files in `folder` with the model they came from, on made-up tokens and on `texts`, also in tokens."""
    window = getattr(model.config, "sliding_window", None) or 0
    count = min(context, max(_PROBE_TOKENS, window + _PROBE_TAIL))
    made_up = np.random.default_rng(0).integers(0, model.config.vocab_size, count).tolist()
    manifest = build_manifest(folder, "export@1", kind="llm", engine=ENGINE, roles=roles)
    expected, found = [], []
    try:
        engine = CausalModel(
            Session(folder, manifest, EngineOptions(threads=os.cpu_count() or 1), shapes_vary=True), str(checkpoint)
        )
        for tokens in (made_up, *(text[: min(context, _PROBE_TOKENS)] for text in texts if text)):
            rows, ends = _probe(engine, tokens)
            found.append(rows)
            expected.append(_reference(model, tokens)[ends])
        engine.close()
    except EngineError as error:
        raise ExportError(f"{checkpoint}: the exported file does not run: {error}") from error
    values = compare_logits(np.concatenate(expected), np.concatenate(found))
    return ParityReport(precision, len(found), rows_of("logits", values, TEXT_TOLERANCES[precision]))


def _probe(engine: CausalModel, tokens: list[int]) -> tuple[NDArray[np.float32], list[int]]:
    """The engine's logits (steps, vocabulary), and after which token each of them comes."""
    engine.rewind(())
    tail = min(_PROBE_TAIL, len(tokens) // 2) // _PROBE_STEP * _PROBE_STEP
    head = len(tokens) - tail
    starts = [*range(0, head, STEP_TOKENS_MAX), *range(head, len(tokens), _PROBE_STEP)]
    ends = [*starts[1:], len(tokens)]
    rows = [engine.step(tokens[start:end]) for start, end in zip(starts, ends, strict=True)]
    return np.stack(rows), [end - 1 for end in ends]


def _reference(model: Any, tokens: list[int]) -> NDArray[np.float32]:
    """Logits (tokens, vocabulary) of transformers, all tokens at once."""
    import torch

    with torch.no_grad():
        logits: NDArray[np.float32] = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    return logits
