"""Runs a release on a labelled set with the very engine that devices run, and scores its answers.

A detector's answer is right by its boxes, a segmenter's by its masks, a classifier's by its best label.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edged.core.matching import IOU_MIN, assign, iou_matrix
from edged.engines.base import Detections, Detector, EngineOptions, Image, ImageStats, open_engine
from edged.wire.manifest import Kind, ReleaseManifest, Thresholds
from trainer.average_precision import Precision, Shapes, average_precision, filled, mask_overlaps, run_lengths
from trainer.calibrate import Item
from trainer.core.evaluation import ClassRow, Counts, Evaluation


class Labelled(NamedTuple):
    """One image (height, width, 3) BGR with its truth: boxes (n, 4) x1 y1 x2 y2 in pixels, classes (n,), and for a
    segmenter of each box the (k, 2) polygon of its mask in pixels, filled by the even-odd rule. A classifier's truth is one
    box around the whole image."""

    image: Image
    boxes: NDArray[Any]
    classes: NDArray[Any]
    outlines: tuple[NDArray[Any], ...] | None = None


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


def kind_of(engine: Detector) -> Kind:
    """What kind of release an opened engine runs."""
    from edged.engines.onnx_classify import OnnxClassifier
    from edged.engines.onnx_segment import OnnxSegmenter

    if isinstance(engine, OnnxClassifier):
        return "classify"
    return "segment" if isinstance(engine, OnnxSegmenter) else "detect"


def calibration_items(observed: Sequence[Observed], items: Sequence[Labelled], thresholds: Thresholds) -> list[Item]:
    """What `trainer.calibrate.fit` takes: each answer, its input's statistics, and what of it was right."""
    rows = []
    for seen, item in zip(observed, items, strict=True):
        found = seen.detections
        # The best scored choose first, so the weak candidates take nothing from the answered boxes.
        hits = _hits(found, item, found.outlines is not None and item.outlines is not None)
        answered = found.scores >= thresholds.score
        right = bool(hits[answered].all()) and int(hits[answered].sum()) == len(item.classes)
        rows.append(Item(found, seen.stats, right, hits))
    return rows


def evaluate(
    engine: Detector,
    items: Sequence[Labelled],
    thresholds: Thresholds,
    release: str = "",
    observed: Sequence[Observed] | None = None,
    kind: Kind | None = None,
) -> Evaluation:
    """Score `engine` on `items`, or score what it `observed` on them earlier; raises EngineError.

    `kind` is the engine's own by default. Raises ValueError for a truth that this kind of release cannot be held against:
    classes outside the engine's labels, no outlines for a segmenter, not one class for a classifier.
    """
    kind = kind_of(engine) if kind is None else kind
    for index, item in enumerate(items):
        _check_truth(index, item, kind, engine.labels, release)
    observed = observe(engine, [item.image for item in items]) if observed is None else observed
    rows: list[ClassRow] = []
    table = np.zeros((len(items), 3), dtype=np.int64)
    by_class = np.zeros((len(engine.labels), 3), dtype=np.int64)
    for index, (seen, item) in enumerate(zip(observed, items, strict=True)):
        counts = _count(seen.detections, item, kind, thresholds.score, len(engine.labels))
        rows += [(index, n, tp, fp, fn) for n, (tp, fp, fn) in enumerate(counts.tolist()) if tp or fp or fn]
        table[index] = counts.sum(axis=0)
        by_class += counts
    nothing = Precision(float("nan"), float("nan"), [float("nan")] * len(engine.labels))
    precision = nothing if kind == "classify" else _precision(observed, items, kind, len(engine.labels))
    return Evaluation(
        release=release,
        labels=list(engine.labels),
        images=[image_sha256(item.image) for item in items],
        counts=_tuples(table),
        class_counts=_tuples(by_class),
        map50=precision.map50,
        map50_95=precision.map50_95,
        per_class_ap50=precision.per_class_ap50,
        latency_ms_median=float(np.median([seen.latency_ms for seen in observed])) if observed else float("nan"),
        kind=kind,
        class_rows=rows,
    )


def evaluate_release(
    folder: Path, manifest: ReleaseManifest, items: Sequence[Labelled], options: EngineOptions | None = None
) -> Evaluation:
    """Open the release in `folder` as a device would, score it on `items` and close it; raises EngineError."""
    engine = open_engine(folder, manifest, options or EngineOptions())
    if not isinstance(engine, Detector):
        engine.close()
        raise TypeError(f"release {manifest.release} is of kind {manifest.kind}; it is not scored on images")
    try:
        return evaluate(engine, items, manifest.thresholds, manifest.release, kind=manifest.kind)
    finally:
        engine.close()


def _check_truth(index: int, item: Labelled, kind: Kind, labels: Sequence[str], release: str) -> None:
    truth, whose = np.asarray(item.classes, dtype=np.int64).ravel(), release or "the release"
    if len(truth) and not 0 <= truth.min() <= truth.max() < len(labels):
        raise ValueError(f"class {truth.max()} in the truth, but {whose} has {len(labels)} labels")
    if kind == "segment" and len(truth) != len(item.outlines or ()):
        raise ValueError(
            f"image {index} of the truth has {len(truth)} boxes and {len(item.outlines or ())} outlines: {whose} is a "
            "segmenter and is judged by its masks; label the outlines too"
        )
    if kind == "classify" and len(truth) != 1:
        raise ValueError(
            f"image {index} of the truth has {len(truth)} classes: {whose} is a classifier, give each image one"
        )


def _hits(found: Detections, item: Labelled, by_masks: bool) -> NDArray[np.bool_]:
    """Which of the found boxes are right, by the overlap of their masks or of the boxes themselves."""
    if by_masks:
        size = item.image.shape[0], item.image.shape[1]
        overlap = mask_overlaps(_masks(found.outlines or (), size), _masks(item.outlines or (), size))
    else:
        overlap = iou_matrix(found.boxes, item.boxes)
    return assign(overlap, found.classes, found.scores, np.asarray(item.classes).ravel(), IOU_MIN) >= 0


def _masks(outlines: Sequence[NDArray[Any]], size: tuple[int, int]) -> list[dict[str, Any]]:
    return [run_lengths(filled(outline, size)) for outline in outlines]


def _count(found: Detections, item: Labelled, kind: Kind, score: float, n_classes: int) -> NDArray[np.int64]:
    """True positives, false positives and false negatives of each class: (classes, 3)."""
    truth = np.asarray(item.classes, dtype=np.int64).ravel()
    if kind == "classify":
        answer = found.classes[np.argsort(-found.scores, kind="stable")[:1]]
        hits = answer == truth[: len(answer)]
    else:
        kept = found.above(score)
        answer, hits = kept.classes, _hits(kept, item, kind == "segment")
    right, extra = (np.bincount(each, minlength=n_classes) for each in (answer[hits], answer[~hits]))
    missed = np.bincount(truth, minlength=n_classes) - right
    return np.stack([right, extra, missed], axis=1).astype(np.int64)


def _tuples(table: NDArray[np.int64]) -> list[Counts]:
    return [(int(tp), int(fp), int(fn)) for tp, fp, fn in table]


def _precision(observed: Sequence[Observed], items: Sequence[Labelled], kind: Kind, n_classes: int) -> Precision:
    """AP of all that the engine found; of masks: of what has one."""
    found, truth = [], []
    for seen, item in zip(observed, items, strict=True):
        size, each = (item.image.shape[0], item.image.shape[1]), seen.detections
        if kind == "segment":
            told = [index for index, outline in enumerate(each.outlines or ()) if len(outline)]
            masks = _masks([each.outlines[index] for index in told], size) if each.outlines else []
            found.append(Shapes(each.boxes[told], each.classes[told], each.scores[told], masks))
            truth.append(Shapes(item.boxes, item.classes, masks=_masks(item.outlines or (), size)))
        else:
            found.append(Shapes(each.boxes, each.classes, each.scores))
            truth.append(Shapes(item.boxes, item.classes))
    return average_precision(found, truth, n_classes)
