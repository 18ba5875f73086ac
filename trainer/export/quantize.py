"""A vision model's ONNX file made smaller, its metadata kept: static int8 (QDQ, per channel), dynamic int8, fp16.

Static int8 is what devices should run: the fastest and the smallest. Dynamic int8 needs no images, fp16 hardly loses
anything; on a CPU both are slower than static int8 and no faster than fp32, because ONNX Runtime converts as it goes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CALIBRATION_MIN = 8  # images; fewer leave the activations' ranges to chance
# Of the input, whatever the images hold: its 256 steps are the 256 levels of a pixel, exactly.
_PIXELS = {"scale": np.array(1 / np.float32(255), np.float32), "zero_point": np.array(0, np.uint8)}


def quantize_static_int8(
    source: Path, out: Path, images: Iterable[NDArray[np.float32]], *, exclude: Iterable[str] | None = None
) -> Path:
    """Quantise the fp32 `source` to `out` with the activations that `images` cause; returns `out`.

    `images`: prepared inputs, each (1, 3, height, width) float32 in 0..1, from data that neither trained nor judges the
    model. `exclude`: names of nodes that stay in float; by default the decoder behind the head's convolutions, because
    boxes in pixels and scores in 0..1 share its last tensor and cannot share 256 steps. The metadata of `source` is
    kept. Raises ValueError for too few images.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = list(images)
    if len(prepared) < CALIBRATION_MIN:
        raise ValueError(
            f"quantising {source.name}: {len(prepared)} calibration images, need {CALIBRATION_MIN} or more"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=out.parent) as scratch:
        clean, quantised = Path(scratch) / "clean.onnx", Path(scratch) / "int8.onnx"
        quant_pre_process(str(source), str(clean))
        graph = onnx.load(str(clean)).graph
        quantize_static(
            str(clean),
            str(quantised),
            _Reader(graph.input[0].name, prepared),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=decoder_nodes(graph) if exclude is None else list(exclude),
            extra_options={"TensorQuantOverrides": {graph.input[0].name: [_PIXELS]}},
        )
        quantised.replace(out)
    return out


def quantize_dynamic_int8(source: Path, out: Path) -> Path:
    """Quantise the weights of the fp32 `source` to `out`, a scale for each tensor; activations get theirs as it runs.

    The decoder behind the head's convolutions stays in float, as in `quantize_static_int8`. Returns `out`.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=out.parent) as scratch:
        clean, quantised = Path(scratch) / "clean.onnx", Path(scratch) / "int8.onnx"
        quant_pre_process(str(source), str(clean))
        model = onnx.load(str(clean))
        quantize_dynamic(
            str(clean),
            str(quantised),
            # ONNX Runtime's integer convolution on a CPU takes unsigned weights only.
            weight_type=QuantType.QUInt8,
            nodes_to_exclude=decoder_nodes(model.graph),
        )
        quantised.replace(out)
    return out


def convert_fp16(source: Path, out: Path) -> Path:
    """Write the fp32 `source` with weights and activations of 16 bits to `out`; inputs and outputs stay float32.

    Weights that lie in a file of their own stay in one, `out` with `.data` appended. Returns `out`.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(str(source))
    aside = any(path.name.startswith(source.name) and path != source for path in source.parent.iterdir())
    # Shapes cannot be inferred of what is too large for one file; the conversion needs them for a few odd nodes only.
    halved = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=aside)
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(halved, str(out), save_as_external_data=aside, location=f"{out.name}.data" if aside else None)
    return out


def decoder_nodes(graph: Any) -> list[str]:
    """Names of the nodes behind the last convolutions: what turns the head's maps into boxes and scores."""
    made_by = {name: node for node in graph.node for name in node.output}
    found: dict[str, None] = {}
    waiting = [value.name for value in graph.output]
    while waiting:
        node = made_by.get(waiting.pop())
        # The box decoder's expectation over 16 bins is a convolution too, but of constants behind a softmax.
        if node is None or node.name in found or (node.op_type == "Conv" and not _follows_softmax(node, made_by)):
            continue
        found[node.name] = None
        waiting.extend(node.input)
    return list(found)


def _follows_softmax(node: Any, made_by: dict[str, Any]) -> bool:
    source = made_by.get(node.input[0])
    while source is not None and source.op_type in ("Transpose", "Reshape"):
        source = made_by.get(source.input[0])
    return source is not None and source.op_type == "Softmax"


class _Reader:
    """Feeds the calibration images one by one, as ONNX Runtime's CalibrationDataReader does."""

    def __init__(self, name: str, images: list[NDArray[np.float32]]) -> None:
        self._name = name
        self._left: Iterator[NDArray[np.float32]] = iter(images)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        image = next(self._left, None)
        return None if image is None else {self._name: image}
