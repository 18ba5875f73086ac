"""A segmenter and a classifier as small as `tests.support.squares`: triangles whose pixels are told by their colour, and
pictures that are tinted in one of three colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edged.engines.outline import trace
from edged.wire.manifest import ReleaseManifest
from tests.support.squares import CELL, CELLS, LABELS, SIDE, Weights, scenes
from trainer.evaluate import Labelled
from trainer.releases import build_manifest

TRIANGLE = np.tril(np.ones((CELL, CELL), bool))  # of a cell, the half that an object covers
CONTRAST = np.eye(3) * 1.5 - 0.5  # red green blue: a colour above the mean of the two others


def triangles(count: int, seed: int) -> list[Labelled]:
    """`squares.scenes` whose objects cover the lower left half of their cells, with their outlines."""
    found = []
    for item in scenes(count, seed, light=1.6):
        image, ground = item.image.copy(), np.full((CELL, CELL, 3), 90, np.uint8)
        outlines = []
        for x, y, *_ in item.boxes.astype(int).tolist():
            place = image[y : y + CELL, x : x + CELL]
            place[~TRIANGLE] = ground[~TRIANGLE]
            outlines.append(trace(TRIANGLE.astype(np.uint8)) + np.array([x, y], np.float32))
        found.append(item._replace(image=image, outlines=tuple(outlines)))
    return found


def tints(count: int, seed: int, strength: float = 25.0) -> list[Labelled]:
    """Noisy pictures, each a little more red, green or blue; the truth is one box around the whole."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        label = int(rng.integers(0, len(LABELS)))
        image = rng.normal(110, 30, (SIDE, SIDE, 3)) + rng.normal(0, 12, 3)
        image[..., 2 - label] += strength
        whole = np.array([[0, 0, SIDE, SIDE]], np.float32)
        found.append(Labelled(image.clip(0, 255).astype(np.uint8), whole, np.array([label])))
    return found


def write_segmenter(weights: Weights, path: Path, *, inside_out: bool = False) -> Path:
    """A segmenter with the boxes of `squares.write_float`; a pixel belongs to a mask by its own colour. `inside_out`: by its
    lack of it, while the boxes stay what they were."""
    kernel = np.repeat(np.repeat(weights[:, :3, None, None] / CELL**2, CELL, axis=2), CELL, axis=3)
    centres = np.stack(np.meshgrid(np.arange(CELLS), np.arange(CELLS))).reshape(2, -1) * CELL + CELL / 2
    sign = -1.0 if inside_out else 1.0
    constants = {
        "kernel": kernel, "bias": weights[:, 3], "boxes": np.concatenate([centres, np.full_like(centres, CELL)])[None],
        "colour": sign * CONTRAST[..., None, None], "level": np.full(3, sign * -0.2), "much": np.float32(100),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["images", "kernel", "bias"], ["cells"], strides=[CELL, CELL]),
        helper.make_node("Sigmoid", ["cells"], ["sure"]),
        helper.make_node("Reshape", ["sure", "shape"], ["scores"]),
        # Of the best class alone: the others' evidence must not paint its mask.
        helper.make_node("Mul", ["scores", "much"], ["loud"]),
        helper.make_node("Softmax", ["loud"], ["shares"], axis=1),
        helper.make_node("Concat", ["boxes", "scores", "shares"], ["output0"], axis=1),
        helper.make_node("Conv", ["images", "colour", "level"], ["output1"]),
    ]
    values = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    values.append(numpy_helper.from_array(np.array([1, len(LABELS), CELLS * CELLS]), "shape"))
    outputs = {"output0": [1, 4 + 2 * len(LABELS), CELLS * CELLS], "output1": [1, len(LABELS), SIDE, SIDE]}
    return _save(path, nodes, values, outputs)


def learn_tints(items: Sequence[Labelled]) -> NDArray[np.float64]:
    """Of each class the mean colour of its pictures: (classes, red green blue)."""
    classes = np.array([int(item.classes[0]) for item in items])
    colours = np.array([item.image[..., ::-1].mean(axis=(0, 1)) / 255 for item in items])
    return np.stack([colours[classes == label].mean(axis=0) for label in range(len(LABELS))])


def write_classifier(means: NDArray[np.float64], path: Path) -> Path:
    """A classifier by the nearest mean colour: its distance, written as a convolution of the picture's own mean."""
    weights, bias = 400 * means, -200 * (means**2).sum(axis=1)
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["mean"]),
        helper.make_node("Conv", ["mean", "weights", "bias"], ["near"]),
        helper.make_node("Reshape", ["near", "shape"], ["flat"]),
        helper.make_node("Softmax", ["flat"], ["output0"], axis=1),
    ]
    values = [
        numpy_helper.from_array(weights[..., None, None].astype(np.float32), "weights"),
        numpy_helper.from_array(bias.astype(np.float32), "bias"),
        numpy_helper.from_array(np.array([1, len(LABELS)]), "shape"),
    ]
    return _save(path, nodes, values, {"output0": [1, len(LABELS)]})


def _save(
    path: Path, nodes: list[onnx.NodeProto], values: list[onnx.TensorProto], outputs: dict[str, list[int]]
) -> Path:
    graph = helper.make_graph(
        nodes,
        "tinted",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        values,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


def manifest_of(folder: Path, release: str, kind: str) -> ReleaseManifest:
    """The manifest of the `model.onnx` of a segmenter or classifier in `folder`."""
    return build_manifest(
        folder, release, kind=kind, engine=f"onnx_{kind}", roles={"model": "model.onnx"}, labels=LABELS,  # type: ignore[arg-type]
        input_size=(SIDE, SIDE), created="2026-01-01T00:00:00Z",
    )  # fmt: skip
