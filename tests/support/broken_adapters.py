"""GGUF adapters that went wrong on their way from the checkpoint, and load all the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float32]]
Change = Callable[[Tensors], Mapping[str, NDArray[np.float32]]]


def rewrite(source: Path, out: Path, change: Change = lambda held: held, alpha: float | None = None) -> Path:
    """The adapter `source` with other tensors, or scaled by another `alpha`, as `out`."""
    reader = gguf.GGUFReader(source)
    held = {each.name: np.array(each.data, np.float32) for each in reader.tensors}
    known: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
    writer = gguf.GGUFWriter(out, known[gguf.Keys.General.ARCHITECTURE])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, known[gguf.Keys.Adapter.LORA_ALPHA] if alpha is None else alpha)
    for name, values in change(held).items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def without(part: str) -> Change:
    """The matrices of one weight are lost."""
    return lambda held: {name: values for name, values in held.items() if not name.startswith(f"{part}.")}


def exchanged(part: str, first: slice, second: slice) -> Change:
    """Two runs of rows of a weight change places, as when the parts of a fused one are taken in another order."""

    def change(held: Tensors) -> Tensors:
        values = held[f"{part}.weight.lora_b"]
        values[first], values[second] = values[second].copy(), values[first].copy()
        return held

    return change
