"""Releases that need much memory: by their weights, which the file shows, or by what they compute, which it does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edged.wire.manifest import ReleaseManifest, ReleaseRef
from tests.support.models import make_release, write_manifest
from trainer.releases import file_entry

MIB = 1 << 20


def make_heavy(
    folder: Path, release: str, label: int = 0, *, weights_mib: int = 0, computed_mib: int = 0
) -> ReleaseRef:  # fmt: skip
    """A release as `make_release` makes it, with so many MiB of weights, or of results between, that change nothing."""
    make_release(folder, release, label)
    path = folder / "model.onnx"
    model = onnx.load(str(path))
    graph, last = model.graph, model.graph.node[-1]
    found, last.output[0] = last.output[0], "all_but_heavy"
    if weights_mib:
        graph.initializer.append(numpy_helper.from_array(np.zeros(weights_mib * MIB // 4, np.float32), "weights"))
        # Which of them is taken depends on the picture, so that all of them have to be kept.
        graph.node.append(helper.make_node("Cast", ["nothing"], ["index"], to=TensorProto.INT64))
        graph.node.append(helper.make_node("Gather", ["weights", "index"], ["heavy"]))
    else:
        graph.initializer.append(numpy_helper.from_array(np.array([computed_mib * MIB // 4], np.int64), "size"))
        graph.node.append(helper.make_node("Expand", ["nothing", "size"], ["wide"]))
        graph.node.append(helper.make_node("ReduceMax", ["wide"], ["heavy"], keepdims=0))
    graph.node.append(helper.make_node("Add", ["all_but_heavy", "heavy"], [found]))
    onnx.save(model, str(path))
    fields = json.loads((folder / "release.json").read_bytes())
    fields["files"]["model"] = file_entry(path).model_dump(mode="json")
    return write_manifest(folder, ReleaseManifest.model_validate(fields))
