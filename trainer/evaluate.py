"""Runs a release on a labelled set with the very engine that devices run, and scores its answers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edged.core.matching import frame_right, pair
from edged.engines.base import Detections, Detector, EngineOptions, Image, ImageStats, open_engine
from edged.wire.manifest import ReleaseManifest, Thresholds
from trainer.calibrate import Item
from trainer.core.evaluation import Counts, Evaluation


class Labelled(NamedTuple):
    """One image (height, width, 3) BGR with its truth: boxes (n, 4) x1 y1 x2 y2 in pixels, classes (n,)."""

    image: Image
    boxes: NDArray[Any]
    classes: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Observed:
    """What the engine made of one image."""

    detections: Detections
    stats: ImageStats
    latency_ms: float


def image_sha256(image: Image) -> str:
    """Identity of an image's pixels, whatever file format they came in."""
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def observe(
    engine: Detector, images: Sequence[Image], clock: Callable[[], float] = time.perf_counter
) -> list[Observed]:
    """Run `engine` over `images` one by one; raises EngineError."""
    observed = []
    for image in images:
        start = clock()
        item = engine.prepare(image)
        detections = engine.infer([item])[0]
        observed.append(Observed(detections, item.stats, (clock() - start) * 1000))
    return observed


def calibration_items(observed: Sequence[Observed], items: Sequence[Labelled], thresholds: Thresholds) -> list[Item]:
    """What `trainer.calibrate.fit` takes: each answer, its input's statistics, and what of it was right."""
    rows = []
    for seen, (_, boxes, classes) in zip(observed, items, strict=True):
        found, answer = seen.detections, seen.detections.above(thresholds.score)
        right = frame_right(answer.boxes, answer.classes, answer.scores, boxes, classes)
        # The best scored choose first, so the weak candidates take nothing from the answered boxes.
        hits = pair(found.boxes, found.classes, found.scores, boxes, classes) >= 0
        rows.append(Item(found, seen.stats, right, hits))
    return rows


def evaluate(
    engine: Detector,
    items: Sequence[Labelled],
    thresholds: Thresholds,
    release: str = "",
    observed: Sequence[Observed] | None = None,
) -> Evaluation:
    """Score `engine` on `items`, or score what it `observed` on them earlier; raises EngineError.

    Of the truth, classes outside the engine's labels raise ValueError: the set and the release do not belong together.
    """
    observed = observe(engine, [item[0] for item in items]) if observed is None else observed
    counts: list[Counts] = []
    by_class = np.zeros((len(engine.labels), 3), dtype=np.int64)
    for seen, (_, boxes, classes) in zip(observed, items, strict=True):
        truth = np.asarray(classes, dtype=np.int64).ravel()
        if len(truth) and not 0 <= truth.min() <= truth.max() < len(engine.labels):
            raise ValueError(
                f"class {truth.max()} in the truth, but {release or 'the release'} has {len(engine.labels)} labels"
            )
        answer = seen.detections.above(thresholds.score)
        hits = pair(answer.boxes, answer.classes, answer.scores, boxes, truth) >= 0
        found = _per_class(answer.classes[hits], by_class)
        extra = _per_class(answer.classes[~hits], by_class)
        missed = _per_class(truth, by_class) - found
        by_class += np.stack([found, extra, missed], axis=1)
        counts.append((int(found.sum()), int(extra.sum()), int(missed.sum())))
    precision = _average_precision(observed, items, len(engine.labels))
    return Evaluation(
        release=release,
        labels=list(engine.labels),
        images=[image_sha256(item[0]) for item in items],
        counts=counts,
        class_counts=[(int(tp), int(fp), int(fn)) for tp, fp, fn in by_class],
        map50=precision[0],
        map50_95=precision[1],
        per_class_ap50=precision[2],
        latency_ms_median=float(np.median([seen.latency_ms for seen in observed])) if observed else float("nan"),
    )


def evaluate_release(
    folder: Path, manifest: ReleaseManifest, items: Sequence[Labelled], options: EngineOptions | None = None
) -> Evaluation:
    """Open the release in `folder` as a device would, score it on `items` and close it; raises EngineError."""
    engine = open_engine(folder, manifest, options or EngineOptions())
    if not isinstance(engine, Detector):
        engine.close()
        raise TypeError(f"release {manifest.release} is of kind {manifest.kind}; only detectors are scored on images")
    try:
        return evaluate(engine, items, manifest.thresholds, manifest.release)
    finally:
        engine.close()


def _per_class(classes: NDArray[np.int64], table: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.bincount(classes, minlength=len(table)).astype(np.int64)


def _average_precision(
    observed: Sequence[Observed], items: Sequence[Labelled], n_classes: int
) -> tuple[float, float, list[float]]:
    """mAP50, mAP50-95 and AP50 of each class by the COCO rules; NaN where the truth holds nothing."""
    nothing = [float("nan")] * n_classes
    if not any(len(item[2]) for item in items):
        return float("nan"), float("nan"), nothing
    import torch
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(backend="faster_coco_eval", class_metrics=True)
    metric.warn_on_many_detections = False
    answers = [
        {
            "boxes": torch.from_numpy(seen.detections.boxes.astype(np.float32)),
            "scores": torch.from_numpy(seen.detections.scores.astype(np.float32)),
            "labels": torch.from_numpy(seen.detections.classes.astype(np.int64)),
        }
        for seen in observed
    ]
    truths = [
        {
            "boxes": torch.from_numpy(np.asarray(boxes, dtype=np.float32).reshape(-1, 4)),
            "labels": torch.from_numpy(np.asarray(classes, dtype=np.int64).ravel()),
        }
        for _, boxes, classes in items
    ]
    metric.update(answers, truths)
    result = metric.compute()
    return float(result["map_50"]), float(result["map"]), _class_ap50(metric, answers, truths, n_classes)


def _class_ap50(metric: Any, answers: list[Any], truths: list[Any], n_classes: int) -> list[float]:
    """AP at IoU 0.5 of each class, NaN for a class without truth: the library gives classes only over all IoUs."""
    metric.reset()
    metric.iou_thresholds = [0.5]
    metric.update(answers, truths)
    result = metric.compute()
    values = [float("nan")] * n_classes
    for index, value in zip(
        result["classes"].reshape(-1).tolist(), result["map_per_class"].reshape(-1).tolist(), strict=True
    ):
        values[index] = float(value) if value >= 0 else float("nan")
    return values
