"""Small real releases, made on the spot: an ONNX network that answers with planted boxes, its golden set, its manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edged.core.confidence import stats_vector
from edged.engines.base import Detector, EngineOptions, open_engine
from edged.engines.letterbox import image_stats
from edged.wire.manifest import Calibration, Novelty, ReleaseManifest, ReleaseRef
from trainer.golden import write_detect_golden
from trainer.releases import build_manifest, canonical_bytes, reference

LABELS = ["cat", "dog", "owl"]
SIDE = 64  # of the network's input
PLAIN, STRANGE, DARK = 50, 220, 10  # grey values: of frames that the model knows, that it does not know, and black
HARD_WORK = 300  # products of `WORK` x `WORK` matrices: some tenths of a second
WORK = 256


def planted_network(
    path: Path, label: int = 0, *, products: int = 0, dark_fails: bool = False, blind_above: float = 1.0,
    dark_hangs: bool = False,
) -> None:  # fmt: skip
    """A network that finds one box of class `label` with score 0.9 in the middle of every image, after `products` matrix
    products of useless work (-1: it never ends). `dark_fails`: a picture below a tenth of white gives NaN. `blind_above`: in
    a picture with a mean above this share of white it finds nothing. `dark_hangs`: below a tenth of white, and there alone,
    the useless work never ends."""
    output = np.full((1, 4 + len(LABELS), 20), 0.01, dtype=np.float32)
    output[0, :4, 0] = 32, 32, 20, 20
    output[0, 4 + label, 0] = 0.9
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=0),
        helper.make_node("Sub", ["mean", "tenth"], ["above"]),
        helper.make_node("Sqrt" if dark_fails else "Abs", ["above"], ["root"]),
        helper.make_node("Mul", ["root", "zero"], ["nothing"]),
        helper.make_node("LessOrEqual", ["mean", "limit"], ["light"]),
        helper.make_node("Cast", ["light"], ["sight"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["planted", "sight"], ["seen"]),
    ]
    constants = [
        numpy_helper.from_array(output, "planted"),
        numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(np.float32(0.1), "tenth"),
        numpy_helper.from_array(np.float32(blind_above), "limit"),
        numpy_helper.from_array(np.array([0, 1, 2, 3]), "axes"),
    ]
    last = "nothing"
    if products or dark_hangs:
        turn = helper.make_graph(
            [
                helper.make_node("MatMul", ["matrix", "matrix_in"], ["matrix_out"]),
                helper.make_node("Identity", ["more_in"], ["more_out"]),
            ],
            "turn",
            [
                helper.make_tensor_value_info("number", TensorProto.INT64, []),
                helper.make_tensor_value_info("more_in", TensorProto.BOOL, []),
                helper.make_tensor_value_info("matrix_in", TensorProto.FLOAT, [WORK, WORK]),
            ],
            [
                helper.make_tensor_value_info("more_out", TensorProto.BOOL, []),
                helper.make_tensor_value_info("matrix_out", TensorProto.FLOAT, [WORK, WORK]),
            ],
        )
        endless = np.iinfo(np.int64).max
        turns = endless if products < 0 or dark_hangs else products
        constants += [
            numpy_helper.from_array(np.eye(WORK, dtype=np.float32), "matrix"),
            numpy_helper.from_array(np.array(turns, np.int64), "turns"),
            numpy_helper.from_array(np.array(True), "go"),
        ]
        nodes += [
            helper.make_node("Mul", ["nothing", "matrix"], ["first"]),
            helper.make_node("Loop", ["dark_turns" if dark_hangs else "turns", "go", "first"], ["product"], body=turn),
            helper.make_node("ReduceMax", ["product"], ["last"], keepdims=0),
        ]
        if dark_hangs:
            constants.append(numpy_helper.from_array(np.array(products, np.int64), "light_turns"))
            nodes[-2:-2] = [
                helper.make_node("Less", ["above", "zero"], ["is_dark"]),
                helper.make_node("Where", ["is_dark", "turns", "light_turns"], ["each_turns"]),
                helper.make_node("ReduceMax", ["each_turns"], ["dark_turns"], keepdims=0),
            ]
        last = "last"
    nodes.append(helper.make_node("Add", ["seen", last], ["output0"]))
    graph = helper.make_graph(
        nodes,
        "planted",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, list(output.shape))],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(path))


def calibration(sure: bool = True) -> Calibration:
    """One that trusts every answer on a PLAIN frame (or none), and none on a STRANGE one."""
    plain = stats_vector(image_stats(grey(PLAIN)))
    spread = np.zeros((len(plain), len(plain)))
    spread[0, 0] = 100.0  # only the brightness counts
    return Calibration(
        method="logistic",
        features=["kept"],
        mean=[0.0],
        scale=[1.0],
        weights=[0.0],
        bias=5.0 if sure else -5.0,
        items=100,
        novelty=Novelty(centres=[plain.tolist()], inverse_covariance=spread.tolist(), limit=1.0),
    )


def make_release(
    folder: Path, release: str = "toy@1.0", label: int = 0, *, products: int = 0, dark_fails: bool = False,
    blind_above: float = 1.0, sure: bool = True, golden_label: int | None = None, dark_hangs: bool = False,
    **manifest: Any,
) -> ReleaseRef:  # fmt: skip
    """A whole release in `folder`. With `golden_label` its golden set expects another class than it answers."""
    folder.mkdir(parents=True, exist_ok=True)
    planted_network(folder / "model.onnx", label if golden_label is None else golden_label, blind_above=blind_above)
    roles = {"model": "model.onnx"}
    plan = {
        "kind": "detect", "engine": "onnx_detect", "labels": LABELS, "input_size": (SIDE, SIDE),
        "calibration": calibration(sure), "created": "2026-01-01T00:00:00Z", **manifest,
    }  # fmt: skip
    engine = open_engine(folder, build_manifest(folder, release, roles=roles, **plan), EngineOptions())
    assert isinstance(engine, Detector)
    roles |= write_detect_golden(folder, engine, [grey(PLAIN), grey(STRANGE)], 0.25)
    engine.close()
    planted_network(
        folder / "model.onnx", label, products=products, dark_fails=dark_fails, blind_above=blind_above,
        dark_hangs=dark_hangs,
    )  # fmt: skip
    return write_manifest(folder, build_manifest(folder, release, roles=roles, **plan))


def write_manifest(folder: Path, manifest: ReleaseManifest) -> ReleaseRef:
    """Write `release.json` into `folder`."""
    (folder / "release.json").write_bytes(canonical_bytes(manifest))
    return reference(folder)


def copy_release(source: Path, target: Path, change: dict[str, Any]) -> ReleaseRef:
    """The release of `source` in `target` with other fields in its manifest."""
    shutil.copytree(source, target)
    fields = json.loads((source / "release.json").read_bytes()) | change
    return write_manifest(target, ReleaseManifest.model_validate(fields))


def grey(value: int, side: int = SIDE) -> np.ndarray:
    """An even picture."""
    return np.full((side, side, 3), value, dtype=np.uint8)


def picture(value: int = PLAIN, mark: int = 0, side: int = 0) -> bytes:
    """A PNG of one grey value; `mark` makes its bytes differ from all others. `side`: larger, and as many bytes as it has
    pixels."""
    image = grey(value, side or SIDE)
    image[0, :2] = [mark % 256, mark // 256 % 256, 7], [1, 2, 3]
    done, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 0] if side else [])
    assert done
    return data.tobytes()


def put_pictures(folder: Path, names: Sequence[str], value: int = PLAIN, side: int = 0) -> None:
    """Write pictures as a careful writer does: beside, then renamed. Each has other bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        beside = folder / f".{name}"
        beside.write_bytes(picture(value, number, side))
        beside.rename(folder / name)
