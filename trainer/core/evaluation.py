"""What a release did on a labelled set, as plain data: made by `trainer.evaluate`, judged by `trainer.core.gate`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from edged.core.matching import f1

Counts = tuple[int, int, int]  # true positives, false positives, false negatives at IoU 0.5


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results on one labelled set. Lists run over the images in order; class results follow the release's labels.

    `per_class_ap50` is NaN (None in JSON) for a class without a box in the truth. `map50`/`map50_95` count detections
    from the engine's weak floor up; F1 and `frame_accuracy` count the answer, above the release's score threshold.
    """

    release: str
    labels: list[str]
    images: list[str]  # sha256 of the pixels of each image (`trainer.evaluate.image_sha256`)
    counts: list[Counts]  # of each image
    class_counts: list[Counts]  # of each class, summed over the images
    map50: float
    map50_95: float
    per_class_ap50: list[float]
    latency_ms_median: float  # prepare and infer, one image at a time

    @property
    def n_images(self) -> int:
        """How many images."""
        return len(self.counts)

    @property
    def n_boxes(self) -> int:
        """How many boxes the truth holds."""
        return sum(tp + fn for tp, _, fn in self.counts)

    @property
    def f1(self) -> float:
        """F1 at IoU 0.5 over all boxes."""
        tp, fp, fn = (sum(column) for column in zip(*self.counts, strict=True)) if self.counts else (0, 0, 0)
        return f1(tp, fp, fn)

    @property
    def frame_accuracy(self) -> float:
        """Share of the images whose whole answer is right; 0 without images."""
        return sum(fp == 0 and fn == 0 for _, fp, fn in self.counts) / max(len(self.counts), 1)

    @property
    def class_f1(self) -> dict[str, float]:
        """F1 at IoU 0.5 of each class."""
        return {label: f1(*counts) for label, counts in zip(self.labels, self.class_counts, strict=True)}

    def summary(self) -> dict[str, Any]:
        """The figures without the lists over images, JSON-able (NaN becomes None): for a release's manifest."""
        per_class = dict(zip(self.labels, map(_number, self.per_class_ap50), strict=True))
        return {
            "release": self.release,
            "n_images": self.n_images,
            "n_boxes": self.n_boxes,
            "map50": _number(self.map50),
            "map50_95": _number(self.map50_95),
            "per_class_ap50": per_class,
            "f1": self.f1,
            "class_f1": self.class_f1,
            "frame_accuracy": self.frame_accuracy,
            "latency_ms_median": _number(self.latency_ms_median),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able: `from_dict` reads it back."""
        values = asdict(self)
        for name in ("map50", "map50_95", "latency_ms_median"):
            values[name] = _number(values[name])
        values["per_class_ap50"] = [_number(each) for each in self.per_class_ap50]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        """The evaluation that `to_dict` wrote; raises TypeError on unknown or missing keys."""
        values = dict(values)
        for name in ("map50", "map50_95", "latency_ms_median"):
            values[name] = _float(values[name])
        values["per_class_ap50"] = [_float(each) for each in values["per_class_ap50"]]
        for name in ("counts", "class_counts"):
            values[name] = [(int(tp), int(fp), int(fn)) for tp, fp, fn in values[name]]
        return cls(**values)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _float(value: float | None) -> float:
    return float("nan") if value is None else float(value)
