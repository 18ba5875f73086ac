"""What an ONNX export of ultralytics says about itself, checked against what its release says about it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edged.engines.ort import Value
from edged.wire.manifest import ReleaseManifest

# A file whose input trainer.export.uint8 rewrote carries this key: uint8 alone would not tell the order of the colours.
INPUT_KEY, INPUT_UINT8 = "edged.input", "uint8 height width BGR"

_OWN_HEADS = {"detect": "onnx_detect", "segment": "onnx_segment", "classify": "onnx_classify"}
_BOX = 4  # numbers of a box


@dataclass(frozen=True, slots=True)
class Export:
    """How to feed a model and how to read its answer.

    `form`: `float32` (batch, 3, height, width) RGB in 0..1, or `uint8` (batch, height, width, 3) BGR. `end_to_end`: the
    answer is (batch, boxes, 6 + masks) x1 y1 x2 y2 score class, suppressed already; otherwise it is plain,
    (batch, 4 + labels + masks, anchors) x y w h and a score for every label. `masks`: numbers a box has for its mask.
    """

    labels: tuple[str, ...]
    size: tuple[int, int]  # (height, width)
    form: str
    batched: bool  # whether the batch may differ from 1
    end_to_end: bool = False
    masks: int = 0


def read_export(
    task: str, inputs: Sequence[Value], outputs: Sequence[Value], metadata: Mapping[str, str], manifest: ReleaseManifest
) -> Export:
    """Recognise a model for `task` (detect, segment or classify); raises ValueError naming what does not fit."""
    _check_task(task, metadata, manifest)
    if len(inputs) != 1:
        raise ValueError(f"the model has inputs {[each.name for each in inputs]}; one is expected, the image")
    labels = _labels(metadata, manifest)
    form, size = _input(inputs[0], metadata, manifest)
    batched = not isinstance(inputs[0].shape[0], int)
    if task == "classify":
        _check_scores(outputs, len(labels))
        return Export(labels, size, form, batched)
    masks = _mask_numbers(outputs, size) if task == "segment" else 0
    return Export(labels, size, form, batched, _end_to_end(task, outputs, metadata, len(labels), masks), masks)


def _check_task(task: str, metadata: Mapping[str, str], manifest: ReleaseManifest) -> None:
    if manifest.kind != task:
        raise ValueError(f"the manifest's kind is {manifest.kind}, but its engine {manifest.engine} is for {task}")
    inside = metadata.get("task", task)
    if inside != task:
        other = _OWN_HEADS.get(inside)
        fix = f"the engine for it is {other}" if other else f"no engine runs it; known: {', '.join(_OWN_HEADS)}"
        raise ValueError(f"the manifest's kind is {task}, the model's metadata says task {inside!r}: {fix}")
    channels = metadata.get("channels", "3")
    if channels != "3":
        raise ValueError(f"the model's metadata says {channels} channels; images have 3")


def _labels(metadata: Mapping[str, str], manifest: ReleaseManifest) -> tuple[str, ...]:
    names = metadata.get("names")
    inside = _parse_names(names) if names else ()
    outside = tuple(manifest.labels)
    if not inside and not outside:
        raise ValueError("neither the manifest nor the model's metadata names its labels")
    if inside and outside and inside != outside:
        raise ValueError(f"labels differ: the manifest says {list(outside)}, the model's metadata {list(inside)}")
    return outside or inside


def _parse_names(text: str) -> tuple[str, ...]:
    """Labels from the metadata of an export, a Python literal `{0: 'cat', 1: 'dog'}`; raises ValueError."""
    names = _literal("names", text)
    try:
        return tuple(str(names[index]) for index in range(len(names)))
    except (TypeError, KeyError, IndexError):
        raise ValueError(f"the model's metadata has unreadable names {text[:200]!r}") from None


def _literal(key: str, text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"the model's metadata has unreadable {key} {text[:200]!r}") from None


def _input(value: Value, metadata: Mapping[str, str], manifest: ReleaseManifest) -> tuple[str, tuple[int, int]]:
    shape = value.shape
    if value.type == "tensor(float)" and len(shape) == 4 and _may_be(value, 1, 3):
        form, sides = "float32", shape[2:]
    elif value.type == "tensor(uint8)" and len(shape) == 4 and shape[3] == 3:
        if metadata.get(INPUT_KEY) != INPUT_UINT8:
            raise ValueError(
                f"model input is {value} without the metadata {INPUT_KEY} = {INPUT_UINT8!r}, so the order of its "
                "colours is unknown; rewrite the float export with trainer.export.uint8"
            )
        form, sides = "uint8", shape[1:3]
    else:
        raise ValueError(
            f"model input is {value}; this engine takes tensor(float) [batch, 3, height, width] "
            "or tensor(uint8) [batch, height, width, 3]"
        )
    return form, _size(value, sides, metadata, manifest)


def _size(
    value: Value, sides: Sequence[int | str | None], metadata: Mapping[str, str], manifest: ReleaseManifest
) -> tuple[int, int]:
    fixed = tuple(side if isinstance(side, int) else None for side in sides)
    wanted = manifest.input_size or fixed
    if wanted[0] is None or wanted[1] is None:
        raise ValueError(f"the model takes any size, {value}, and the manifest has no input_size; name one")
    if any(side is not None and side != want for side, want in zip(fixed, wanted, strict=True)):
        raise ValueError(f"the manifest says input_size {wanted}, the model takes {fixed}")
    stride = _literal("stride", metadata.get("stride", "1"))
    if not isinstance(stride, int) or stride < 1 or wanted[0] % stride or wanted[1] % stride:
        raise ValueError(f"input_size {wanted} is no multiple of the model's stride {stride}")
    return wanted[0], wanted[1]


def _check_scores(outputs: Sequence[Value], labels: int) -> None:
    first = outputs[0]
    if len(outputs) != 1 or first.type != "tensor(float)" or len(first.shape) != 2 or not _may_be(first, 1, labels):
        raise ValueError(
            f"model output is {_shown(outputs)}; with {labels} labels this engine reads one tensor(float) "
            f"[batch, {labels}]: export a classification model"
        )


def _mask_numbers(outputs: Sequence[Value], size: tuple[int, int]) -> int:
    """How many prototypes a segmentation model has, which is how many numbers a box has for its mask."""
    if len(outputs) == 2 and outputs[1].type == "tensor(float)" and len(outputs[1].shape) == 4:
        _, count, *sides = outputs[1].shape
        fits = all(not isinstance(side, int) or whole % side == 0 for side, whole in zip(sides, size, strict=True))
        if isinstance(count, int) and fits:
            return count
    raise ValueError(
        f"model output is {_shown(outputs)}; this engine reads boxes and tensor(float) [batch, masks, height, width] "
        f"prototypes whose sides divide {size}: export a segmentation model"
    )


def _end_to_end(task: str, outputs: Sequence[Value], metadata: Mapping[str, str], labels: int, masks: int) -> bool:
    """Which of the two heads the first output is, by the metadata, and by its shape where the metadata is silent."""
    first, rows, columns = outputs[0], _BOX + labels + masks, _BOX + 2 + masks
    boxes = len(outputs) == (2 if masks else 1) and first.type == "tensor(float)" and len(first.shape) == 3
    plain, suppressed = boxes and _may_be(first, 1, rows), boxes and _may_be(first, 2, columns)
    if "end2end" in metadata:
        arguments = _literal("args", metadata.get("args", "{}"))
        told = _literal("end2end", metadata["end2end"]) is True
        told = told or (isinstance(arguments, dict) and arguments.get("nms") is True)
    else:
        told = suppressed and not (plain and isinstance(first.shape[1], int))
    if told and suppressed:
        return True
    if not told and plain:
        return False
    head = "end-to-end" if told else "plain"
    raise ValueError(
        f"model output is {_shown(outputs)}; a {head} head for {task} with {labels} labels answers one tensor(float) "
        + (f"[batch, boxes, {columns}]" if told else f"[batch, {rows}, anchors]")
        + (f" and the prototypes of {masks} masks" if masks else "")
    )


def _may_be(value: Value, index: int, side: int) -> bool:
    """Whether this side of the shape is `side`, as far as the file says."""
    return not isinstance(value.shape[index], int) or value.shape[index] == side


def _shown(outputs: Sequence[Value]) -> str:
    return ", ".join(str(each) for each in outputs)
