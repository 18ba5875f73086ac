"""Releases that fail in a way of their own while they are proven."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edged.wire.manifest import ReleaseManifest, ReleaseRef
from tests.support.models import make_release, write_manifest
from trainer.releases import file_entry


def make_crashing(folder: Path, release: str) -> ReleaseRef:
    """A release that loads, and whose first answer ends its process with SIGFPE: it divides the least 64-bit number by -1,
    which ONNX Runtime does not look at and an x86 processor does not do."""
    make_release(folder, release, 1)
    path = folder / "model.onnx"
    model = onnx.load(str(path))
    graph, last = model.graph, model.graph.node[-1]
    found, last.output[0] = last.output[0], "all_but_the_trap"
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(np.iinfo(np.int64).min), "least"),
            numpy_helper.from_array(np.array(-1), "minus_one"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("Cast", ["nothing"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Add", ["whole", "least"], ["dividend"]),
            helper.make_node("Add", ["whole", "minus_one"], ["divisor"]),
            helper.make_node("Div", ["dividend", "divisor"], ["quotient"]),
            helper.make_node("Cast", ["quotient"], ["trap"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["all_but_the_trap", "trap"], [found]),
        ]
    )
    onnx.save(model, str(path))
    fields = json.loads((folder / "release.json").read_bytes())
    fields["files"]["model"] = file_entry(path).model_dump(mode="json")
    return write_manifest(folder, ReleaseManifest.model_validate(fields))


def without_golden_set(folder: Path, release: str) -> ReleaseRef:
    """A release that has nothing to be proven with."""
    make_release(folder, release, 1)
    fields = json.loads((folder / "release.json").read_bytes())
    fields["files"] = {role: entry for role, entry in fields["files"].items() if not role.startswith("golden")}
    return write_manifest(folder, ReleaseManifest.model_validate(fields))
