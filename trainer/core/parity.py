"""How far an exported file is off from the checkpoint that it was made of: pure comparisons, and what is allowed.

Law of this file: every metric is a distance, 0 for the same, and what cannot be computed is NaN, which no tolerance allows.

Texts, over all positions of all golden texts: `logits_max` and `logits_mean`, absolute difference in standard deviations of
the checkpoint's logits; `top1_changed`, share of positions with another best token; `kl`, mean Kullback-Leibler divergence
from the checkpoint's distribution, in nats; `tokens_changed`, share of texts that become other tokens; `effect_off`, of what
an adapter does to the logits, the share (of its Euclidean norm) that the file does otherwise.

Images: `boxes_changed`, share of the sure boxes of either side without a partner on the other; `iou_off`, mean of 1 - IoU of
the pairs; `score_off`, mean absolute difference of their scores; `mask_off`, mean of 1 - IoU of their masks;
`labels_changed`, share of images with another best label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edged.core.matching import iou_matrix, pair

SURE_BOXES_MIN = 8  # so many boxes are compared, though they score less than the release asks for: few prove little
PARITY_KEY = "export_parity"  # of a release's lineage
EDGE = 0.1  # of a score: a box this close to the threshold may come or go
FLOOR = 0.05  # of a score; below it engines answer nothing

_LOGITS = ("logits_max", "logits_mean", "top1_changed", "kl")
_ROUNDED = _LOGITS[1:]  # the largest of 100 000 differences says little of rounded weights
_BOXES = ("boxes_changed", "iou_off", "score_off", "mask_off", "labels_changed")


def _row(names: Sequence[str], *limits: float, **more: float) -> dict[str, float]:
    return dict(zip(names, limits, strict=True)) | more


# format -> metric -> tolerance. What was measured, and what the tolerances must still catch: docs/export.md. A file of
# rounded weights is judged after the file that it was made of, whose tolerances see a single wrong row.
TEXT_TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": _row(_LOGITS, 0.01, 0.001, 0.01, 0.0005),
    "fp16": _row(_LOGITS, 0.2, 0.02, 0.05, 0.005),
    "int8-dynamic": _row(_ROUNDED, 0.4, 0.6, 0.25),
    "F32": _row(_LOGITS, 0.05, 0.005, 0.02, 0.001, tokens_changed=0),
    "F16": _row(_LOGITS, 0.1, 0.01, 0.03, 0.005, tokens_changed=0),
    "Q8": _row(_ROUNDED, 0.08, 0.15, 0.02, tokens_changed=0),
    "Q6": _row(_ROUNDED, 0.15, 0.3, 0.05, tokens_changed=0),
    "Q5": _row(_ROUNDED, 0.3, 0.5, 0.25, tokens_changed=0),
    "Q4": _row(_ROUNDED, 0.4, 0.6, 0.3, tokens_changed=0),
    "Q3": _row(_ROUNDED, 0.5, 0.75, 0.5, tokens_changed=0),
    "Q2": _row(_ROUNDED, 0.6, 0.85, 0.7, tokens_changed=0),
    "lora": _row(_LOGITS, 0.1, 0.01, 0.03, 0.005, effect_off=0.1),
}
IMAGE_TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": _row(_BOXES, 0.02, 0.01, 0.005, 0.02, 0.0),
    "fp16": _row(_BOXES, 0.05, 0.02, 0.02, 0.05, 0.02),
    "int8": _row(_BOXES, 0.15, 0.1, 0.12, 0.15, 0.1),
    "int8-dynamic": _row(_BOXES, 0.15, 0.1, 0.12, 0.15, 0.1),
}


class ParityFailed(ValueError):
    """An exported file computes something else than its checkpoint; the message says what is off, by how much."""


@dataclass(frozen=True, slots=True)
class Parity:
    """One comparison: of `what` (logits, tokens, boxes, ...), by which `metric`, how far off, and what is allowed."""

    what: str
    metric: str
    value: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is near enough; NaN never is."""
        return self.value <= self.tolerance

    def __str__(self) -> str:
        return f"{self.what} {self.metric} {self.value:.3g}, at most {self.tolerance:g}"


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All comparisons of one exported file: its `format`, how many golden `items` (texts or images) were compared."""

    format: str
    items: int
    rows: tuple[Parity, ...]

    @property
    def passed(self) -> bool:
        """Whether there is a comparison, and every one is near enough."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def check(self) -> ParityReport:
        """This report; raises ParityFailed when it did not pass."""
        if not self.passed:
            off = "; ".join(str(row) for row in self.rows if not row.passed) or "nothing was compared"
            raise ParityFailed(
                f"the exported {self.format} file computes something else than its checkpoint on {self.items} golden "
                f"inputs: {off}. Export a wider format, or give golden inputs that the checkpoint answers"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, null for what could not be computed."""
        rows = [
            {
                "what": row.what, "metric": row.metric, "passed": row.passed, "tolerance": row.tolerance,
                "value": round(row.value, 6) if math.isfinite(row.value) else None,
            }
            for row in self.rows
        ]  # fmt: skip
        return {"format": self.format, "items": self.items, "passed": self.passed, "metrics": rows}


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export made: its files by role, how far each step is off (the unrounded file first, then what ships), and
    what a person should know."""

    roles: Mapping[str, str]
    parity: tuple[ParityReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there is a report, and every one passed."""
        return bool(self.parity) and all(report.passed for report in self.parity)

    def check(self) -> Exported:
        """This export; raises ParityFailed when it is off by more than is allowed."""
        for report in self.parity:
            report.check()
        if not self.parity:
            raise ParityFailed("an export without parity proves nothing; give golden inputs")
        return self

    def lineage(self) -> list[dict[str, Any]]:
        """For a release's lineage, under PARITY_KEY."""
        return [report.to_dict() for report in self.parity]


def text_tolerances(form: str) -> dict[str, float]:
    """What a language model's file of this format may be off: `Q4_K_M` and `IQ4_NL` are of the family `Q4`. Raises
    ValueError."""
    for name in (form, form.split("_")[0].removeprefix("I")):
        if name in TEXT_TOLERANCES:
            return TEXT_TOLERANCES[name]
    raise ValueError(f"format {form!r}: no tolerances are stated for it; known: {', '.join(TEXT_TOLERANCES)}")


def rows_of(what: str, values: Mapping[str, float], tolerances: Mapping[str, float]) -> tuple[Parity, ...]:
    """The measured values of those metrics that have a tolerance."""
    return tuple(
        Parity(what, metric, float(value), tolerances[metric])
        for metric, value in values.items()
        if metric in tolerances
    )


def compare_logits(expected: NDArray[Any], found: NDArray[Any]) -> dict[str, float]:
    """Metrics of logits (positions, vocabulary), the checkpoint's and the file's; NaN without a position."""
    if expected.shape != found.shape or not expected.size or not np.isfinite(found).all():
        return dict.fromkeys(_LOGITS, math.nan)
    first, second = expected.astype(np.float64), found.astype(np.float64)
    off = np.abs(first - second) / max(float(first.std()), 1e-12)
    logs = [_log_softmax(logits) for logits in (first, second)]
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1)
    changed = first.argmax(axis=-1) != second.argmax(axis=-1)
    return {
        "logits_max": float(off.max()),
        "logits_mean": float(off.mean()),
        "top1_changed": float(changed.mean()),
        "kl": float(divergence.mean()),
    }


def effect_off(
    base: NDArray[Any], adapted: NDArray[Any], found_base: NDArray[Any], found_adapted: NDArray[Any]
) -> float:
    """Of what an adapter changes in the logits, the share that the file changes otherwise; NaN when it changes nothing."""
    expected, found = adapted.astype(np.float64) - base, found_adapted.astype(np.float64) - found_base
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / size if size > 0 else math.nan


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    out: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


@dataclass(frozen=True, slots=True)
class Answer:
    """Boxes of one image, best first: (n, 4) x1 y1 x2 y2, scores (n,), classes (n,); `masks` one (height, width) bool each,
    or None where a box has none. Of a classifier: no boxes, its labels with their probabilities."""

    boxes: NDArray[Any]
    scores: NDArray[Any]
    classes: NDArray[Any]
    masks: Sequence[NDArray[np.bool_] | None] = ()


def compare_boxes(expected: Sequence[Answer], found: Sequence[Answer], score: float) -> dict[str, float]:
    """Metrics of the boxes of all images, of which those are sure that score well above `score`; every answer reaches down
    to FLOOR. NaN when the checkpoint finds nothing, because then nothing is shown."""
    scores = np.sort(np.concatenate([answer.scores for answer in expected] or [np.empty(0)]))[::-1]
    if not len(scores):
        return dict.fromkeys(_BOXES[:3], math.nan)
    sure = min(score + EDGE, float(scores[min(SURE_BOXES_MIN, len(scores)) - 1]))
    low = max(FLOOR, sure - EDGE)
    judged = changed = 0
    ious: list[float] = []
    offs: list[float] = []
    masks: list[float] = []
    for first, second in zip(expected, found, strict=True):
        partner = _partners(first, second, low)
        told = np.flatnonzero(first.scores >= sure)
        judged += len(told) + int((second.scores >= sure).sum())
        changed += int((partner[told] < 0).sum())
        lonely = (second.scores >= sure) & ~np.isin(np.arange(len(second.scores)), partner)
        changed += int(lonely.sum())
        overlap = iou_matrix(first.boxes, second.boxes)
        for row in told[partner[told] >= 0]:
            column = int(partner[row])
            ious.append(1 - float(overlap[row, column]))
            offs.append(abs(float(first.scores[row]) - float(second.scores[column])))
            if first.masks and second.masks:
                masks += _mask_off(first.masks[row], second.masks[column])
    values = {"boxes_changed": changed / judged, "iou_off": _mean(ious), "score_off": _mean(offs)}
    return values | ({"mask_off": _mean(masks)} if any(answer.masks for answer in expected) else {})


def compare_labels(expected: Sequence[Answer], found: Sequence[Answer]) -> dict[str, float]:
    """Metrics of a classifier's probabilities: of each label that either side answers with. NaN without an image."""
    changed: list[float] = []
    offs: list[float] = []
    for first, second in zip(expected, found, strict=True):
        told = dict(zip(first.classes.tolist(), first.scores.tolist(), strict=True))
        best = int(second.classes[0])
        # Of two labels as good as equal, either may come first.
        changed.append(float(max(told.values()) - told.get(best, 0.0) > EDGE / 2))
        offs += [
            abs(told.get(int(kind), 0.0) - float(value))
            for kind, value in zip(second.classes, second.scores, strict=True)
        ]
    return {"labels_changed": _mean(changed), "score_off": _mean(offs)}


def _partners(first: Answer, second: Answer, low: float) -> NDArray[np.int64]:
    """For every box of `first` the index of its partner in `second` that scores at least `low`, or -1."""
    kept = np.flatnonzero(second.scores >= low)
    rows = pair(
        first.boxes, first.classes, first.scores, np.asarray(second.boxes).reshape(-1, 4)[kept], second.classes[kept]
    )
    return np.where(rows >= 0, kept[rows] if len(kept) else -1, -1)


def _mask_off(first: NDArray[np.bool_] | None, second: NDArray[np.bool_] | None) -> list[float]:
    if first is None or second is None or not (first | second).any():
        return []
    return [1 - float((first & second).sum() / (first | second).sum())]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
