"""What a release did on a labelled set, as plain data: made by `trainer.evaluate`, judged by `trainer.core.gate`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edged.core.matching import f1

Counts = tuple[int, int, int]  # true positives, false positives, false negatives at IoU 0.5
ClassRow = tuple[int, int, int, int, int]  # number of the image, of the class, and its counts, which are not all 0

# What `f1` is called by kind of release: of one answer an image it is the share that is right.
FIGURES = {"detect": "F1", "segment": "mask F1", "classify": "accuracy", "llm": "accuracy"}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results on one labelled set. Lists run over the images in order; class results follow the release's labels.

    `kind` is the release's. Of a segmenter all IoU is that of the masks. A classifier's answer is its best label, and a
    language model's its text: one true positive, or one false positive and one false negative. They have no AP (NaN).
    `per_class_ap50` is NaN (None in JSON) for a class without a box in the truth. `map50`/`map50_95` count detections
    from the engine's weak floor up (masks: from the release's threshold up, the engine makes no others); F1 and
    `frame_accuracy` count the answer, above the release's score threshold.
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
    kind: str = "detect"
    class_rows: list[ClassRow] = field(default_factory=list)  # `class_counts` by image, by image and class

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
    def figure(self) -> str:
        """What `f1` is called for this kind of release."""
        return FIGURES.get(self.kind, "F1")

    @property
    def metrics(self) -> dict[str, float]:
        """The figures that this kind of release must have, by name; NaN for those that the truth does not allow."""
        right = {self.figure: self.f1 if self.n_boxes else float("nan")}
        return right | ({"mAP50": self.map50, "mAP50-95": self.map50_95} if self.has_ap else {})

    @property
    def has_ap(self) -> bool:
        """Whether average precision is defined: for what answers with places."""
        return self.kind in ("detect", "segment")

    @property
    def quality(self) -> float:
        """One figure to compare two files of one model by: mAP50, or the accuracy of what has no places."""
        return self.map50 if self.has_ap else self.f1 if self.n_boxes else float("nan")

    def by_class(self) -> NDArray[np.int64]:
        """Counts (images, classes, 3); raises ValueError when `class_rows` are not what `class_counts` sums up."""
        table = np.zeros((self.n_images, len(self.labels), 3), dtype=np.int64)
        for image, label, tp, fp, fn in self.class_rows:
            table[image, label] = tp, fp, fn
        if table.sum(axis=0).tolist() != [list(counts) for counts in self.class_counts]:
            raise ValueError(f"{self.release}: the counts of single images do not add up to those of the classes")
        return table

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
            "kind": self.kind,
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
        values["class_rows"] = [
            (int(n), int(c), int(tp), int(fp), int(fn)) for n, c, tp, fp, fn in values["class_rows"]
        ]
        return cls(**values)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _float(value: float | None) -> float:
    return float("nan") if value is None else float(value)
