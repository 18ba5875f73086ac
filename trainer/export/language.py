"""Language models as GGUF files, each with its parity: the whole model, quantised or not, and LoRA adapters."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gguf

from trainer.core.parity import Exported, ParityReport, text_tolerances
from trainer.export.gguf import NotFinite, OutType, export_gguf, quantize_gguf, read_json, unsuitable
from trainer.export.gguf_architectures import ExportError, architecture_of, completed
from trainer.export.gguf_lora import export_lora_gguf
from trainer.export.parity import GOLDEN_TEXTS, TOKENS_MAX, gguf_parity, lora_parity, text_reference

_ALIASES = {"fp32": "F32", "fp16": "F16", "f32": "F32", "f16": "F16"}
MODEL, ADAPTER = "model.gguf", "adapter.gguf"


def gguf_precision(name: str) -> str:
    """A precision as llama.cpp calls it: fp16 and f16 are F16, q4_k_m is Q4_K_M. Raises ValueError for one without stated
    tolerances."""
    form = _ALIASES.get(name, name.upper())
    if not re.fullmatch(r"F32|F16|I?Q[2-8]_.*", form):
        raise ValueError(
            f"precision {form!r}: a GGUF is written as f32, f16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_M or Q2_K"
        )
    text_tolerances(form)
    return form


def export_text_gguf(
    checkpoint: Path, folder: Path, precision: str = "Q4_K_M", texts: Sequence[str] = GOLDEN_TEXTS
) -> Exported:
    """Write a Hugging Face checkpoint as `model.gguf` into `folder`, in F32, F16 or a quantisation of llama.cpp.

    A quantised file is judged in two steps: the F16 file that it is made of (F32 where weights are too large for 16 bits),
    whose tolerances are tight, and what quantising did to it. Raises ExportError, ValueError for an unknown precision.
    """
    form = gguf_precision(precision)
    reference = text_reference(checkpoint, texts, context=_context(checkpoint))
    folder.mkdir(parents=True, exist_ok=True)
    out, roles = folder / MODEL, {"model": MODEL}
    if form in ("F16", "F32"):
        outtype: OutType = "f32" if form == "F32" else "f16"
        return Exported(roles, (gguf_parity(export_gguf(checkpoint, out, outtype), reference, form),))
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
        whole, notes = Path(scratch) / "whole.gguf", []
        try:
            export_gguf(checkpoint, whole)
            first = gguf_parity(whole, reference, "F16")
        except NotFinite as error:
            notes.append(f"quantised from F32: {error}")
            first = gguf_parity(export_gguf(checkpoint, whole, "f32"), reference, "F32")
        quantize_gguf(whole, out, form)
        notes += [note for note in (unsuitable(whole, form),) if note]
    return Exported(roles, (first, gguf_parity(out, reference, form)), tuple(notes))


def file_parity(checkpoint: Path, file: Path, texts: Sequence[str] = GOLDEN_TEXTS) -> ParityReport:
    """Compare a GGUF model that somebody made, in whatever format it says it has, with its Hugging Face checkpoint.

    Raises ExportError, ValueError for a file that llama.cpp does not load or a format without stated tolerances.
    """
    reference = text_reference(checkpoint, texts, context=_context(checkpoint))
    return gguf_parity(file, reference, gguf_form(file))


def gguf_form(file: Path) -> str:
    """The format of a GGUF model as llama.cpp calls it: F16, Q4_K_M. Raises ValueError for a file that says none."""
    try:
        field = gguf.GGUFReader(file).get_field(gguf.Keys.General.FILE_TYPE)
        told = gguf.LlamaFileType(field.contents()).name if field is not None else ""
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{file}: no GGUF file that can be read ({error}); export it again") from None
    if not told:
        raise ValueError(f"{file}: does not say its format ({gguf.Keys.General.FILE_TYPE}); export it again")
    return told.removeprefix("MOSTLY_").removeprefix("ALL_")


def export_text_lora(adapter: Path, base: Path, folder: Path, texts: Sequence[str] = GOLDEN_TEXTS) -> Exported:
    """Write a PEFT LoRA adapter for the Hugging Face checkpoint `base` as `adapter.gguf` into `folder`.

    Compared as in `adapter_parity`. Raises ExportError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = export_lora_gguf(adapter, base, folder / ADAPTER)
    return Exported({"adapter": ADAPTER}, (adapter_parity(adapter, base, out, folder, texts),))


def adapter_parity(
    adapter: Path, base: Path, file: Path, folder: Path, texts: Sequence[str] = GOLDEN_TEXTS, *,
    tokens_max: int = TOKENS_MAX,
) -> ParityReport:  # fmt: skip
    """Compare the GGUF adapter `file` with the PEFT adapter that it was made of, on the checkpoint `base`; of each text at
    most `tokens_max` tokens.

    The base is made as F16 below `folder` and thrown away: what a quantised one rounds would hide what an adapter does.
    Where its weights are too large for 16 bits, or the adapter seems off, F32 has the last word: of an adapter that does
    little, 16 bits round away a share. Raises ExportError, and ValueError for an adapter that llama.cpp refuses or a text
    without tokens.
    """
    reference = text_reference(base, texts, adapter=adapter, context=min(tokens_max, _context(base)))
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
        whole = Path(scratch) / "base.gguf"
        try:
            report = lora_parity(export_gguf(base, whole), file, reference)
        except NotFinite:
            report = None
        if report is None or not report.passed:
            report = lora_parity(export_gguf(base, whole, "f32"), file, reference)
        return report


def base_of(adapter: Path) -> str:
    """The checkpoint that a PEFT adapter says it was trained on; raises ExportError when it does not say."""
    name = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise ExportError(f"{adapter}: its adapter_config.json names no base model; give it with --base")
    return str(name)


def _context(checkpoint: Path) -> int:
    config = read_json(checkpoint / "config.json")
    architecture = architecture_of(checkpoint, config)
    return min(TOKENS_MAX, architecture.context(completed(architecture, config)))
