"""A task so small that a real detector for it is fitted in milliseconds: coloured squares on a noisy ground.

The network is one convolution over cells of 8 x 8 pixels and a sigmoid, its weights are a logistic regression on labelled
cells, its file is ONNX with YOLO's plain head. It learns what its labels say, forgets what they leave out, and is quantised
like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import minimize

from edged.wire.manifest import Calibration, ReleaseManifest
from trainer.evaluate import Labelled
from trainer.export.quantize import quantize_static_int8
from trainer.export.uint8 import take_uint8
from trainer.releases import build_manifest

LABELS = ["cat", "dog", "owl"]  # red, green and blue squares
SIDE, CELL = 64, 8
CELLS = SIDE // CELL
WORK = 256  # of the square matrix of useless work

Weights = NDArray[np.float64]  # (classes, red green blue and one)


def scenes(count: int, seed: int, light: float = 1.0) -> list[Labelled]:
    """Pictures (64, 64, 3) with two to five squares of one cell each; `light` below 1 makes the squares dimmer."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        image = rng.normal(90, 14, (SIDE, SIDE, 3)) + rng.normal(0, 4, 3)
        places = rng.permutation(CELLS * CELLS)[: int(rng.integers(2, 6))]
        classes = rng.integers(0, len(LABELS), len(places))
        boxes = np.empty((len(places), 4), np.float32)
        for index, (place, label) in enumerate(zip(places.tolist(), classes.tolist(), strict=True)):
            y, x = place // CELLS * CELL, place % CELLS * CELL
            image[y : y + CELL, x : x + CELL, 2 - label] += 120 * light * rng.uniform(0.8, 1.2)  # BGR
            boxes[index] = x, y, x + CELL, y + CELL
        found.append(Labelled(image.clip(0, 255).astype(np.uint8), boxes, classes.astype(np.int64)))
    return found


def mixed(count: int, seed: int, light: float) -> list[Labelled]:
    """Half of them clear, half of them dim."""
    return [*scenes(count // 2, seed), *scenes(count - count // 2, seed + 1, light)]


def learn(items: Sequence[Labelled]) -> Weights:
    """A logistic regression for each class on the mean colour of the cells."""
    colours = np.concatenate([_cells(item.image) for item in items])
    wanted = np.zeros((len(items), CELLS * CELLS, len(LABELS)))
    for index, item in enumerate(items):
        places = item.boxes[:, 1] // CELL * CELLS + item.boxes[:, 0] // CELL
        wanted[index, places.astype(int), item.classes] = 1
    x = np.hstack([colours, np.ones((len(colours), 1))])
    return np.stack([_fit(x, wanted[..., label].ravel()) for label in range(len(LABELS))])


def _cells(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    cells = image[..., ::-1].reshape(CELLS, CELL, CELLS, CELL, 3).mean(axis=(1, 3)) / 255
    return np.asarray(cells.reshape(-1, 3), np.float64)


def _fit(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    def loss(w: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = x @ w
        error = 1 / (1 + np.exp(-z)) - y
        return float((np.logaddexp(0, z) - y * z).mean() + 1e-5 * w @ w), x.T @ error / len(y) + 2e-5 * w

    return np.asarray(minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x)


def write_float(weights: Weights, path: Path, *, work: int = 0, ballast: int = 0, hidden: int = 0) -> Path:
    """The network's ONNX file in float. `work`: products of useless matrices before it answers; `ballast`: bytes of numbers
    in the file that nobody needs; `hidden`: bytes that it takes when it answers."""
    kernel = np.repeat(np.repeat(weights[:, :3, None, None] / CELL**2, CELL, axis=2), CELL, axis=3)
    centres = np.stack(np.meshgrid(np.arange(CELLS), np.arange(CELLS))).reshape(2, -1) * CELL + CELL / 2
    boxes = np.concatenate([centres, np.full_like(centres, CELL)])[None]
    constants = [
        numpy_helper.from_array(kernel.astype(np.float32), "kernel"),
        numpy_helper.from_array(weights[:, 3].astype(np.float32), "bias"),
        numpy_helper.from_array(boxes.astype(np.float32), "boxes"),
        numpy_helper.from_array(np.array([1, len(LABELS), CELLS * CELLS]), "shape"),
    ]
    nodes = [
        helper.make_node("Conv", ["images", "kernel", "bias"], ["cells"], strides=[CELL, CELL], name="conv"),
        helper.make_node("Sigmoid", ["cells"], ["sure"], name="sigmoid"),
        helper.make_node("Reshape", ["sure", "shape"], ["scores"], name="reshape"),
    ]
    last = "scores"
    for name, count, node in (("slow", work, _slow), ("heavy", ballast, _heavy), ("hungry", hidden, _hungry)):
        if not count:
            continue
        more, values = node(count)
        nothing, then = f"{name}_nothing", f"{name}_scores"
        nodes += [
            *more,
            helper.make_node("Mul", [f"{name}_end", "zero"], [nothing], name=nothing),
            helper.make_node("Add", [last, nothing], [then], name=then),
        ]
        constants += values
        last = then
    if last != "scores":
        constants += [
            numpy_helper.from_array(np.float32(0), "zero"),
            numpy_helper.from_array(np.array([0, 1, 2]), "axes"),
        ]
    nodes.append(helper.make_node("Concat", ["boxes", last], ["output0"], axis=1, name="concat"))
    graph = helper.make_graph(
        nodes,
        "squares",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 4 + len(LABELS), CELLS * CELLS])],
        constants,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


def _slow(products: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Products of matrices, one after the other, that begin with what the image gave: nothing of it can be left out."""
    nodes = [helper.make_node("ReduceMean", ["scores", "axes"], ["slow_mean"], keepdims=0, name="slow_mean"),
             helper.make_node("Mul", ["slow_mean", "slow_matrix"], ["slow_0"], name="slow_first")]  # fmt: skip
    nodes += [
        helper.make_node("MatMul", ["slow_matrix", f"slow_{n}"], [f"slow_{n + 1}"], name=f"slow_{n}")
        for n in range(products)
    ]
    nodes.append(helper.make_node("ReduceMax", [f"slow_{products}"], ["slow_end"], keepdims=0, name="slow_end"))
    return nodes, [numpy_helper.from_array(np.eye(WORK, dtype=np.float32), "slow_matrix")]


def _heavy(count: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    numbers = np.random.default_rng(0).random(count // 4).astype(np.float32)
    nodes = [helper.make_node("ReduceMean", ["scores", "axes"], ["heavy_mean"], keepdims=0, name="heavy_mean"),
             helper.make_node("Mul", ["heavy_mean", "heavy_numbers"], ["heavy_all"], name="heavy_all"),
             helper.make_node("ReduceMax", ["heavy_all"], ["heavy_end"], keepdims=0, name="heavy_end")]  # fmt: skip
    return nodes, [numpy_helper.from_array(numbers, "heavy_numbers")]


def _hungry(count: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """A tensor that is only made when the image is there."""
    nodes = [helper.make_node("ReduceMean", ["scores", "axes"], ["hungry_mean"], keepdims=0, name="hungry_mean"),
             helper.make_node("Expand", ["hungry_mean", "hungry_shape"], ["hungry_all"], name="hungry_all"),
             helper.make_node("Sqrt", ["hungry_all"], ["hungry_roots"], name="hungry_roots"),
             helper.make_node("ReduceMax", ["hungry_roots"], ["hungry_end"], keepdims=0, name="hungry_end")]  # fmt: skip
    return nodes, [numpy_helper.from_array(np.array([count // 4]), "hungry_shape")]


def ship(single: Path, out: Path, ranges: Sequence[Labelled], exclude: Sequence[str] | None = None) -> Path:
    """What a device gets: int8 with the activations' ranges of these images, taking pixels. `exclude`: nodes that stay in
    float, by default the decoder."""
    inputs = [np.ascontiguousarray(item.image[..., ::-1].transpose(2, 0, 1)[None]) / np.float32(255) for item in ranges]
    quantize_static_int8(single, out, inputs, exclude=exclude)
    return take_uint8(out, out)


def manifest_of(folder: Path, release: str, calibration: Calibration | None = None) -> ReleaseManifest:
    """The manifest of the `model.onnx` in `folder`."""
    return build_manifest(
        folder, release, kind="detect", engine="onnx_detect", roles={"model": "model.onnx"}, labels=LABELS,
        input_size=(SIDE, SIDE), calibration=calibration, created="2026-01-01T00:00:00Z",
    )  # fmt: skip
