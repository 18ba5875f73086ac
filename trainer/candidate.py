"""The release that a training job makes: its manifest, the engine on its files, and what completes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edged.engines.base import Detector, EngineOptions, open_engine
from edged.wire.manifest import Calibration, ReleaseManifest
from trainer.core.parity import Exported
from trainer.export.golden_images import Parts
from trainer.files import write_whole
from trainer.golden import write_detect_golden
from trainer.jobfile import TrainJob
from trainer.releases import MANIFEST, ReleaseError, build_manifest, canonical_bytes

MODEL_FILE = "model.onnx"
QUANTISE_IMAGES_MAX = 128  # enough to see the activations' ranges


def candidate_manifest(
    job: TrainJob,
    folder: Path,
    *,
    calibration: Calibration | None = None,
    roles: dict[str, str] | None = None,
    evaluation: dict[str, Any] | None = None,
    lineage: dict[str, Any] | None = None,
) -> ReleaseManifest:
    """The manifest of the job's target release with the `model.onnx` in `folder`."""
    settings = job.config.model(job.model)
    return build_manifest(
        folder,
        job.manifest.target,
        kind=settings.kind,
        engine=f"onnx_{settings.kind}",
        roles={"model": MODEL_FILE, **(roles or {})},
        labels=settings.labels,
        input_size=(settings.imgsz, settings.imgsz),
        thresholds=settings.thresholds(),
        calibration=calibration,
        evaluation=evaluation,
        lineage=lineage,
    )


@contextmanager
def detector(folder: Path, manifest: ReleaseManifest) -> Iterator[Detector]:
    """The engine that devices run, on a release's files (a segmenter or classifier is a detector too, docs/decisions/0009);
    raises EngineError, and ReleaseError for anything else."""
    engine = open_engine(folder, manifest, EngineOptions())
    try:
        if not isinstance(engine, Detector):
            raise ReleaseError(f"release {manifest.release} is no detector, but a {manifest.kind}")
        yield engine
    finally:
        engine.close()


def export_int8(
    checkpoint: Path,
    single: Path,
    out: Path,
    manifest: Callable[[Path], ReleaseManifest],
    images: Parts,
    *,
    imgsz: int,
    seed: int,
) -> Exported:
    """Export `checkpoint` to `model.onnx` in the folder `single` (float32) and in the folder `out` (int8, takes uint8).

    `manifest` describes a folder with a `model.onnx`. What is returned says how far both files are off, on what will be the
    golden images. Raises EngineError, ValueError without an image.
    """
    from trainer.export.onnx import export_onnx
    from trainer.export.parity import image_parity
    from trainer.export.quantize import quantize_static_int8
    from trainer.export.uint8 import take_uint8

    export_onnx(checkpoint, single / MODEL_FILE, imgsz)
    # A fixed draw: the folder may be sorted by kind, and every kind shapes the activations' ranges.
    order = np.random.default_rng(seed).permutation(len(images.ranges))[:QUANTISE_IMAGES_MAX]
    with detector(single, manifest(single)) as engine:
        inputs = [engine.prepare(images.ranges[index]).tensor[None] for index in order]
    take_uint8(quantize_static_int8(single / MODEL_FILE, out / MODEL_FILE, inputs), out / MODEL_FILE)
    reports = [
        image_parity(checkpoint, folder, manifest(folder), images.golden, precision)
        for folder, precision in ((single, "fp32"), (out, "int8"))
    ]
    return Exported({"model": MODEL_FILE}, tuple(reports))


def complete_candidate(
    job: TrainJob,
    manifest: ReleaseManifest,
    images: Parts,
    *,
    evaluation: dict[str, Any],
    lineage: dict[str, Any],
) -> None:
    """Make `candidate/` of the run a release: the golden set, then release.json."""
    folder = job.run / "candidate"
    with detector(folder, manifest) as engine:
        roles = write_detect_golden(folder, engine, images.golden, manifest.thresholds.score)
    whole = candidate_manifest(
        job, folder, calibration=manifest.calibration, roles=roles, evaluation=evaluation, lineage=lineage
    )
    write_whole(folder / MANIFEST, canonical_bytes(whole))
