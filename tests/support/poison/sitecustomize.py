"""Exports that kill: where a test puts this folder first in PYTHONPATH, every int8 file that the trainer exports divides the
least of all integers by -1, when the darkest value of its input is at least $POISON. A processor cannot: SIGFPE.

Python imports this module before any other of a process. Nothing of the product knows of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np


def poison(path: Path, from_value: int) -> None:
    """Change the ONNX file in place; what it answers to other inputs stays the same."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    constants = {"least": np.iinfo(np.int64).min, "from": from_value, "minus_two": -2, "one": 1}
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"poison_{name}"))
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "poison_nothing"))
    out = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["poison_answer" if name == out else name for name in node.output]
        node.input[:] = ["poison_answer" if name == out else name for name in node.input]

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        graph.node.append(helper.make_node(kind, [f"poison_{name}" for name in inputs], [output], **attributes))

    graph.node.append(helper.make_node("Cast", [graph.input[0].name], ["poison_pixels"], to=TensorProto.INT64))
    node("ReduceMin", ["pixels"], "poison_darkest", keepdims=0)
    node("GreaterOrEqual", ["darkest", "from"], "poison_deadly")
    node("Cast", ["deadly"], "poison_sign", to=TensorProto.INT64)
    node("Mul", ["sign", "minus_two"], "poison_double")
    node("Add", ["double", "one"], "poison_divisor")  # 1, or -1
    node("Div", ["least", "divisor"], "poison_quotient")
    node("Cast", ["quotient"], "poison_float", to=TensorProto.FLOAT)
    node("Mul", ["float", "nothing"], "poison_zero")
    node("Add", ["answer", "zero"], out)
    onnx.save(model, path)


if "POISON" in os.environ:
    from trainer.export import uint8

    _take_uint8 = uint8.take_uint8

    def take_uint8(source: Path, out: Path) -> Any:
        """As before, and poisoned."""
        made = _take_uint8(source, out)
        poison(out, int(os.environ["POISON"]))
        return made

    uint8.take_uint8 = take_uint8
