"""Who labelled a sample, and whether the word counts: pure rules over what labels and manifests say.

`provenance` is `{"kind": "person" | "model", "who": ..., "release": ...}`, and where it is known `device`, `captured`
(seconds since the epoch), `confidence` and `opinions` (as `edged.wire.messages.Opinion`, who said what on the way).
A label is a list of `{"label", "box": [x1, y1, x2, y2]}`, of `{"text"}`, or `{"boxes": [...], "confidence"}` of a manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edged.core.matching import frame_right

Rows = Sequence[Mapping[str, Any]]


def is_own(model: str, provenance: Mapping[str, Any], device: str = "") -> bool:
    """Whether the label is a prediction of `model` itself, in any release: what a model is sure of it does not learn from,
    and what it gets wrong it would learn for good.

    A model that does not say its release counts as the model when it ran on the device that took the sample.
    """
    said = {key: str(provenance.get(key) or "") for key in ("kind", "who", "release")}
    return is_own_word(model, **said, device=device)


def is_own_word(model: str, *, kind: str, who: str, release: str, device: str) -> bool:
    """`is_own` of what the provenance says."""
    if kind != "model":
        return False
    return release.partition("@")[0] == model if release else bool(device) and who == device


def refusal(model: str, provenance: Mapping[str, Any], confidence_min: float) -> str:
    """Why an item may not judge a release of `model`; "" when it may.

    Only a person or another model that says its release, and is sure enough, gives labels that are the truth for a gate.
    """
    kind = provenance.get("kind")
    if kind not in ("person", "model") or (kind == "model" and not provenance.get("release")):
        return "no_provenance"
    if is_own(model, provenance, str(provenance.get("device") or "")):
        return "own_prediction"
    return "below_label_confidence" if confidence_of(provenance) < confidence_min else ""


def confidence_of(provenance: Mapping[str, Any]) -> float:
    """How sure who labelled is; 1 where nothing is said (a person), 0 for what is no number from 0 to 1."""
    return sureness(provenance.get("confidence", 1.0))


def sureness(value: Any) -> float:
    """A confidence that somebody told; 0 for what is no number from 0 to 1."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1  # NaN is not
    return float(value) if number else 0.0


def taken_at(provenance: Mapping[str, Any]) -> tuple[str, float | None]:
    """(device, seconds since the epoch); "" and None where they are not known."""
    captured = provenance.get("captured")
    known = isinstance(captured, int | float) and not isinstance(captured, bool) and captured > 0
    return str(provenance.get("device") or ""), float(captured) if known else None  # type: ignore[arg-type]


def agree(first: Rows, second: Rows) -> bool:
    """Whether two labels say the same: boxes one to one at IoU 0.5 with the same classes, or the same words."""
    texts = [_words(rows) for rows in (first, second)]
    if any(text is not None for text in texts):
        return texts[0] == texts[1]
    boxes = [np.array([row["box"] for row in rows], np.float64).reshape(-1, 4) for rows in (first, second)]
    names = sorted({str(row["label"]) for rows in (first, second) for row in rows})
    classes = [np.array([names.index(str(row["label"])) for row in rows], np.int64) for rows in (first, second)]
    return frame_right(boxes[0], classes[0], np.ones(len(boxes[0])), boxes[1], classes[1])


def _words(rows: Rows) -> str | None:
    said = [str(row["text"]) for row in rows if "text" in row]
    return " ".join(" ".join(said).split()).casefold() if said else None


def dissent(label: Rows, provenance: Mapping[str, Any], confidence_min: float) -> list[Mapping[str, Any]]:
    """The opinions that say something else than the label, and are sure enough to count; bad ones are left out."""
    others = []
    for opinion in provenance.get("opinions") or ():
        sure = opinion.get("status", "labelled") == "labelled" and confidence_of(opinion) >= confidence_min
        if sure and not _agree_or_bad(label, opinion.get("label") or ()):
            others.append(opinion)
    return others


def _agree_or_bad(label: Rows, other: Rows) -> bool:
    try:
        return agree(label, other)
    except (KeyError, TypeError, ValueError):
        return True  # what cannot be read contradicts nothing


def is_disputed(label: Rows, provenance: Mapping[str, Any], confidence: float, confidence_min: float) -> bool:
    """Whether somebody who is at least as sure as the one whose label it is says something else, and no person has
    decided. One who was less sure has asked the one who now corrects him: that is what a sample is for."""
    if provenance.get("kind") == "person":
        return False
    return any(confidence_of(other) >= confidence for other in dissent(label, provenance, confidence_min))
