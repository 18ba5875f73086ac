"""YOLO checkpoints as ONNX files for the device's engines, each with its parity: detect, segment, classify."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from edged.engines.base import Detector, EngineOptions, Image, open_engine
from edged.wire.manifest import Kind, ReleaseManifest, Thresholds
from trainer.checkpoints import CheckpointError
from trainer.core.parity import Exported
from trainer.export.gguf_architectures import ExportError
from trainer.export.golden_images import check_apart
from trainer.export.onnx import export_onnx
from trainer.export.parity import image_parity
from trainer.export.quantize import convert_fp16, quantize_dynamic_int8, quantize_static_int8
from trainer.export.uint8 import take_uint8
from trainer.releases import build_manifest
from trainer.tuners.yolo.weights import open_weights

PRECISIONS = ("fp32", "fp16", "int8", "int8-dynamic")
KINDS: tuple[Kind, ...] = ("detect", "segment", "classify")
MODEL = "model.onnx"
CALIBRATION_MAX = 128  # images: enough to see the activations' ranges
SIZE = 640  # pixels, of a checkpoint that does not say


@dataclass(frozen=True, slots=True)
class VisionModel:
    """What a .pt checkpoint says about itself: what it does, its labels, and the side of the images it was trained on."""

    kind: Kind
    labels: tuple[str, ...]
    imgsz: int


def vision_model(checkpoint: Path) -> VisionModel:
    """Read a .pt checkpoint of ultralytics; raises ExportError for one that devices have no engine for."""
    if not checkpoint.is_file():
        raise ExportError(f"checkpoint {checkpoint} does not exist; give the path of a trained .pt file")
    try:
        network = open_weights(checkpoint)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    kind, names = network.task, network.names
    if kind not in KINDS:
        raise ExportError(f"{checkpoint}: task {kind!r}; devices have engines for {', '.join(KINDS)}")
    size = network.overrides.get("imgsz") or getattr(network.model, "args", {}).get("imgsz") or SIZE
    labels = tuple(str(names[index]) for index in range(len(names)))
    return VisionModel(cast(Kind, kind), labels, int(size[0] if isinstance(size, (list, tuple)) else size))


def vision_manifest(
    folder: Path, release: str, kind: Kind, *, labels: Sequence[str], imgsz: int, thresholds: Thresholds, **more: Any
) -> ReleaseManifest:
    """The manifest of a folder with a `model.onnx`, and whatever else `more` says."""
    roles = {"model": MODEL, **more.pop("roles", {})}
    return build_manifest(
        folder, release, kind=kind, engine=f"onnx_{kind}", labels=list(labels), input_size=(imgsz, imgsz),
        thresholds=thresholds, roles=roles, **more,
    )  # fmt: skip


def export_vision(
    checkpoint: Path,
    folder: Path,
    precision: str = "int8",
    *,
    golden: Sequence[Image],
    calibration: Sequence[Image] = (),
    imgsz: int | None = None,
    thresholds: Thresholds | None = None,
    seed: int = 0,
) -> Exported:
    """Write a .pt checkpoint as `model.onnx` into `folder`, in a precision of PRECISIONS.

    `golden` images are those that parity is judged on; `calibration` images, others, show int8 the activations' ranges and
    must have trained nothing. int8 takes uint8 pixels, the others float32. Judged in two steps: the float32 export, whose
    tolerances are tight, and what the precision did to it. Raises ExportError, EngineError, ValueError for too few images
    or for the same on both sides.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"precision {precision!r}: vision models are written as {', '.join(PRECISIONS)}")
    notes = check_apart(golden, calibration) if precision == "int8" else ()
    model = vision_model(checkpoint)
    fields: dict[str, Any] = {"labels": model.labels, "imgsz": imgsz or model.imgsz,
                              "thresholds": thresholds or Thresholds()}  # fmt: skip

    def manifest(where: Path) -> ReleaseManifest:
        return vision_manifest(where, "export@1", model.kind, **fields)

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
        single = Path(scratch)
        source = export_onnx(checkpoint, single / MODEL, fields["imgsz"])
        first = image_parity(checkpoint, single, manifest(single), golden, "fp32")
        if precision == "fp32":
            source.replace(folder / MODEL)
            return Exported({"model": MODEL}, (first,))
        if precision == "fp16":
            convert_fp16(source, folder / MODEL)
        elif precision == "int8-dynamic":
            quantize_dynamic_int8(source, folder / MODEL)
        else:
            inputs = _inputs(single, manifest(single), calibration, seed)
            take_uint8(quantize_static_int8(source, single / "int8.onnx", inputs), folder / MODEL)
    last = image_parity(checkpoint, folder, manifest(folder), golden, precision)
    return Exported({"model": MODEL}, (first, last), notes)


def _inputs(folder: Path, manifest: ReleaseManifest, images: Sequence[Image], seed: int) -> list[Any]:
    """Some of the images as the network takes them: (1, 3, height, width) float32 each."""
    # A fixed draw: the images may be sorted by kind, and every kind shapes the activations' ranges.
    order = np.random.default_rng(seed).permutation(len(images))[:CALIBRATION_MAX]
    engine = open_engine(folder, manifest, EngineOptions())
    assert isinstance(engine, Detector)
    try:
        return [engine.prepare(images[index]).tensor[None].copy() for index in order]
    finally:
        engine.close()
