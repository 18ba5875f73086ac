"""A network that takes pixels answers as it did with floats, in float and in int8, and the device reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bench.photos import overfit, photos, pieces
from edged.engines.base import Detections, EngineOptions
from edged.engines.letterbox import Letterboxer
from edged.engines.onnx_detect import OnnxDetector
from tests.support.exports import BOXES_MIN, SCORE, SIZE, pictures, release
from trainer.export.quantize import quantize_static_int8
from trainer.export.uint8 import take_uint8


def answers(path: Path) -> list[Detections]:
    engine = OnnxDetector(path.parent, release(path, "detect"), EngineOptions())
    return [engine.infer([engine.prepare(image)])[0] for image in pictures()]


def quantised(source: Path, out: Path) -> Path:
    letterboxer = Letterboxer((SIZE, SIZE), "float32")
    seen = [piece for photo in photos() for piece in pieces(photo)]
    return quantize_static_int8(source, out, [letterboxer.prepare(image).tensor[None].copy() for image in seen])


@pytest.mark.parametrize(("network", "int8"), [("yolo11n.yaml", False), ("yolo11n.yaml", True), ("yolo26n.yaml", True)])
def test_pixels_give_the_answers_that_floats_gave(tmp_path: Path, network: str, int8: bool) -> None:
    source = overfit(network, SIZE)
    before = quantised(source, tmp_path / "int8.onnx") if int8 else source
    after = take_uint8(before, tmp_path / "uint8.onnx")
    boxes = 0
    for expected, found in zip(answers(before), answers(after), strict=True):
        boxes += len(found.above(SCORE))
        assert len(found) == len(expected)
        # The order of boxes with the same score is nobody's promise; int8 has few different scores.
        np.testing.assert_allclose(found.scores, expected.scores, atol=0 if int8 else 1e-4)
        if int8:
            np.testing.assert_array_equal(found.boxes, expected.boxes)
            np.testing.assert_array_equal(found.classes, expected.classes)
        else:
            np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.02)
    assert boxes >= BOXES_MIN, f"{boxes} boxes: the comparison is empty"


def test_an_int8_file_computes_nothing_before_its_first_convolution(tmp_path: Path) -> None:
    before = quantised(overfit("yolo11n.yaml", SIZE), tmp_path / "int8.onnx")
    graph = onnx.load(str(take_uint8(before, tmp_path / "uint8.onnx"))).graph
    reader, way = graph.input[0].name, []
    while not way or way[-1] != "Conv":
        node = next(node for node in graph.node if reader in node.input)
        way.append(node.op_type)
        reader = node.output[0]
    # ONNX Runtime makes the last two one, and its int8 convolution wants its input as the Transpose finds it.
    assert way == ["Transpose", "DequantizeLinear", "Conv"]


def test_metadata_stays_and_says_how_the_input_is_meant(tmp_path: Path) -> None:
    source = overfit("yolo11n.yaml", SIZE)
    told = {
        path: {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
        for path in (source, take_uint8(source, tmp_path / "uint8.onnx"))
    }
    before, after = told.values()
    assert after == before | {"edged.input": "uint8 height width BGR"}


def network(path: Path, first: str, weights: np.ndarray, shape: tuple[int, ...] = (1, 3, 8, 8)) -> Path:
    """A file whose input goes into one node of this kind."""
    nodes = [
        helper.make_node(first, ["images", "weights"] if first == "Conv" else ["images"], ["output"], name="first")
    ]
    if weights.ndim == 1:  # shared with a second node
        weights = np.ones((3, 3, 1, 1), np.float32)
        nodes.append(helper.make_node("Identity", ["weights"], ["copy"]))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


@pytest.mark.parametrize(
    ("first", "weights", "shape", "message"),
    [
        ("Relu", np.ones((3, 3, 1, 1), np.float32), (1, 3, 8, 8), "its input goes into Relu first, not"),
        ("Conv", np.ones((4, 1, 1, 1), np.float32), (1, 1, 8, 8), r"its input images \[1, 1, 8, 8\] is not a float"),
        ("Conv", np.ones((3, 1, 1, 1), np.float32), (1, 3, 8, 8), r"weights \(3, 1, 1, 1\): it reads its input in"),
        ("Conv", np.ones(1, np.float32), (1, 3, 8, 8), "first are computed, or shared with another node"),
    ],
)
def test_what_cannot_be_rewritten_is_named_and_nothing_is_written(
    tmp_path: Path, first: str, weights: np.ndarray, shape: tuple[int, ...], message: str
) -> None:
    source = network(tmp_path / "m.onnx", first, weights, shape)
    with pytest.raises(ValueError, match=f"m.onnx cannot take pixels: .*{message}"):
        take_uint8(source, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_an_input_quantised_otherwise_is_refused(tmp_path: Path) -> None:
    path = quantised(overfit("yolo11n.yaml", SIZE), tmp_path / "int8.onnx")
    model = onnx.load(str(path))
    name = next(node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear")
    scale = next(each for each in model.graph.initializer if each.name == name)
    scale.CopyFrom(numpy_helper.from_array(np.float32(0.0038), name))
    onnx.save(model, str(path))
    with pytest.raises(ValueError, match=r"quantised with the scale 0\.0038.* instead of 1/255"):
        take_uint8(path, tmp_path / "out.onnx")
