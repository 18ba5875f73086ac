"""An exported network made to take pixels as OpenCV gives them: uint8, BGR, (batch, height, width, 3).

Layout and normalisation move into the graph, where they cost next to nothing: the order of the colours goes into the first
convolution's weights; so does the division by 255 of a float file, and in an int8 file (QDQ) pixels are what the input's
quantisation would make of them anyway, so that step disappears.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edged.engines.metadata import INPUT_KEY, INPUT_UINT8

PIXEL_SCALE = np.float32(1) / np.float32(255)  # of an int8 file's input: one step is one grey level, and 0 is 0


def take_uint8(source: Path, out: Path) -> Path:
    """Write `source`, whose input is (batch, 3, height, width) float RGB in 0..1, to `out` with a uint8 input.

    Its answers stay the same. Returns `out`; raises ValueError naming what keeps a network from being rewritten.
    """
    import onnx

    model = onnx.load(str(source))
    try:
        _rewrite(model.graph)
    except ValueError as error:
        raise ValueError(f"{source.name} cannot take pixels: {error}") from None
    told = {entry.key: entry.value for entry in model.metadata_props} | {INPUT_KEY: INPUT_UINT8}
    onnx.helper.set_model_props(model, told)
    onnx.checker.check_model(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(out))
    return out


def _rewrite(graph: Any) -> None:
    from onnx import TensorProto, helper

    value = graph.input[0]
    kind = value.type.tensor_type
    shape = [side.dim_param or side.dim_value for side in kind.shape.dim]
    if kind.elem_type != TensorProto.FLOAT or len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"its input {value.name} {shape} is not a float (batch, 3, height, width)")
    pixels, planes, floats = value.name, f"{value.name}_planes", f"{value.name}_float"
    nodes = [helper.make_node("Transpose", [pixels], [planes], name="pixels_to_planes", perm=[0, 3, 1, 2])]
    users = _users(graph, pixels)
    if [user.op_type for user in users] == ["QuantizeLinear"]:
        _drop_quantisation(graph, users[0], planes)
    else:
        nodes.append(helper.make_node("Cast", [planes], [floats], name="pixels_to_float", to=TensorProto.FLOAT))
        for user in users:
            _turn_colours(graph, user, pixels, PIXEL_SCALE)
            user.input[0] = floats
    value.CopyFrom(helper.make_tensor_value_info(pixels, TensorProto.UINT8, [shape[0], *shape[2:], 3]))
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _drop_quantisation(graph: Any, quantise: Any, planes: str) -> None:
    """Feed uint8 planes to what reads the input's quantised values."""
    scale, zero = (_constant(graph, name) for name in quantise.input[1:3])
    if scale != PIXEL_SCALE or zero.dtype != np.uint8 or zero != 0:
        raise ValueError(
            f"its input is quantised with the scale {scale} and the zero point {zero} ({zero.dtype}) instead of 1/255 "
            "and 0 (uint8); quantise it with trainer.export.quantize"
        )
    for user in _users(graph, quantise.output[0]):
        if user.op_type != "DequantizeLinear":
            raise ValueError(f"its quantised input goes into {user.op_type} {user.name}, not into a DequantizeLinear")
        for reader in _users(graph, user.output[0]):
            _turn_colours(graph, reader, user.output[0], None)
        user.input[0] = planes
    graph.node.remove(quantise)


def _turn_colours(graph: Any, conv: Any, source: str, scale: np.float32 | None) -> None:
    """Make a convolution that reads RGB from `source` read BGR, `scale` times as large."""
    from onnx import numpy_helper

    if conv.op_type != "Conv" or conv.input[0] != source:
        raise ValueError(f"its input goes into {conv.op_type} {conv.name}, not into a convolution")
    name = conv.input[1]
    made_by = next((node for node in graph.node if name in node.output), None)
    if made_by is not None and made_by.op_type == "DequantizeLinear":
        name = made_by.input[0]
    stored = next((each for each in graph.initializer if each.name == name), None)
    if stored is None or len(_users(graph, name)) != 1:
        raise ValueError(f"the weights of its first convolution {conv.name} are computed, or shared with another node")
    weights = numpy_helper.to_array(stored)
    if weights.shape[1] != 3:
        raise ValueError(f"its first convolution {conv.name} has weights {weights.shape}: it reads its input in groups")
    turned = np.ascontiguousarray(weights[:, ::-1])
    if scale is not None:
        turned = (turned * scale).astype(weights.dtype)
    stored.CopyFrom(numpy_helper.from_array(turned, name))


def _constant(graph: Any, name: str) -> Any:
    from onnx import numpy_helper

    return numpy_helper.to_array(next(each for each in graph.initializer if each.name == name))


def _users(graph: Any, name: str) -> list[Any]:
    return [node for node in graph.node if name in node.input]
