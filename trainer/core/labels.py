"""What a label may say, by task, and which of several opinions about the same pixels counts.

Rows of a label, coordinates in pixels of the image as it is decoded:
`detect`    {"label", "box": [x1, y1, x2, y2], "score"?}, any number; none: nothing is there
`segment`   the same with "polygons": [[x1, y1, x2, y2, ...], ...]; "box" is what encloses them
`classify`  {"label", "score"?}, exactly one
`text`      {"text"}, exactly one: the answer to a prompt
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from trainer.core.provenance import is_own_word

Row = dict[str, Any]
Task = Literal["detect", "segment", "classify", "text"]
TASKS: tuple[Task, ...] = ("detect", "segment", "classify", "text")
IMAGE_TASKS: tuple[Task, ...] = ("detect", "segment", "classify")
GRAIN_PX = 0.01  # labels whose corners differ by less are the same label
CLIP_PX = 1e-3  # how far outside the image a corner may be without being counted as clipped
AREA_PX_MIN = 1e-6  # of a box or polygon: less is no area


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that cannot be used: its number in the label as it was given, from 1, and why."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Checked:
    """The usable rows of a label, the others, and how many were cut at the image's border."""

    rows: list[Row]
    bad: list[Bad] = field(default_factory=list)
    clipped: int = 0


class Wrong(ValueError):
    """A row of a label cannot be used; the message says why."""


def check(
    task: Task, rows: Sequence[Mapping[str, Any]], size: tuple[int, int], known: Collection[str] | None
) -> Checked:
    """The rows of a label of an image of `size` (width, height); labels must be in `known`, when it is given.

    A box that reaches over the border is cut there and counted; one that is outside, without area or not finite is bad.
    """
    good: list[Row] = []
    bad: list[Bad] = []
    clipped = 0
    for number, row in enumerate(rows, start=1):
        try:
            if task == "text":
                made, cut = _text(row), False
            elif task == "classify":
                made, cut = _named(row, known), False
            else:
                made, cut = _boxed(task, row, size, known)
            good.append(made)
            clipped += cut
        except Wrong as error:
            bad.append(Bad(number, str(error)))
    if task in ("text", "classify") and len(good) > 1:
        bad += [Bad(number, f"a {task} label has one row, this is another") for number in range(2, len(good) + 1)]
        good = good[:1]
    return Checked(good, bad, clipped)


def _text(row: Mapping[str, Any]) -> Row:
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise Wrong("`text` is missing or empty: give the answer")
    return {"text": text}


def _named(row: Mapping[str, Any], known: Collection[str] | None) -> Row:
    label = row.get("label")
    if not isinstance(label, str) or not label:
        raise Wrong(f"label {label!r} is no name: give the class as text")
    if known is not None and label not in known:
        shown = ", ".join(sorted(known)[:20])
        raise Wrong(f"label {label!r} is none of {shown}: add it to the model's labels, or rename it")
    score = row.get("score")
    if score is None:
        return {"label": label}
    value = _number(score, "score")
    if not 0 <= value <= 1:
        raise Wrong(f"score {score!r} is no share: use 0 to 1")
    return {"label": label, "score": value}


def _boxed(
    task: Task, row: Mapping[str, Any], size: tuple[int, int], known: Collection[str] | None
) -> tuple[Row, bool]:
    made = _named(row, known)
    if task == "detect":
        made["box"], cut = _clip_box(_floats(row.get("box"), "box"), size)
        return made, cut
    given = row.get("polygons")
    if not isinstance(given, list | tuple) or not given:
        raise Wrong("a segment has no polygon: give `polygons`, or import it as boxes (task detect)")
    polygons, cut = [], False
    for polygon in given:
        whole, shortened = _clip_polygon(_floats(polygon, "polygon"), size)
        polygons.append(whole)
        cut = cut or shortened
    made["box"], made["polygons"] = list(enclosing(polygons)), polygons
    return made, cut


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Wrong(f"{what} {value!r} is no number")
    try:
        number = float(value)
    except OverflowError:
        raise Wrong(f"{what} {str(value)[:20]}... is too large") from None
    if not math.isfinite(number):
        raise Wrong(f"{what} {value!r} is not finite")
    return number


def _floats(values: Any, what: str) -> list[float]:
    if not isinstance(values, list | tuple):
        raise Wrong(f"{what} {values!r} is no list of numbers")
    return [_number(value, what) for value in values]


def _clip_box(box: list[float], size: tuple[int, int]) -> tuple[list[float], bool]:
    if len(box) != 4:
        raise Wrong(f"box {box} has {len(box)} numbers: corners are x1 y1 x2 y2 in pixels")
    x1, y1, x2, y2 = box
    if (x2 - x1) <= 0 or (y2 - y1) <= 0 or (x2 - x1) * (y2 - y1) < AREA_PX_MIN:
        raise Wrong(f"box {box} has no area: corners are x1 y1 x2 y2 in pixels")
    inside, cut = _clip(box, size)
    x1, y1, x2, y2 = inside
    if (x2 - x1) * (y2 - y1) < AREA_PX_MIN:
        raise Wrong(f"box {box} is outside of the image of {size[0]}x{size[1]} pixels")
    return inside, cut


def _clip_polygon(points: list[float], size: tuple[int, int]) -> tuple[list[float], bool]:
    if len(points) < 6 or len(points) % 2:
        raise Wrong(f"polygon of {len(points)} numbers: give x and y of at least 3 points")
    if area(points) < AREA_PX_MIN:
        raise Wrong("polygon has no area")
    inside, cut = _clip(points, size)
    if area(inside) < AREA_PX_MIN:
        raise Wrong(f"polygon is outside of the image of {size[0]}x{size[1]} pixels")
    return inside, cut


def _clip(points: list[float], size: tuple[int, int]) -> tuple[list[float], bool]:
    inside = [min(max(value, 0.0), float(size[number % 2])) for number, value in enumerate(points)]
    return inside, max(abs(a - b) for a, b in zip(points, inside, strict=True)) > CLIP_PX


def area(points: Sequence[float]) -> float:
    """The area of a polygon x1 y1 x2 y2 ... in square pixels (the shoelace formula)."""
    xs, ys = points[0::2], points[1::2]
    turns = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return abs(sum(x * below - right * y for x, y, right, below in turns)) / 2


def enclosing(polygons: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """The box x1 y1 x2 y2 around polygons."""
    xs = [value for polygon in polygons for value in polygon[0::2]]
    ys = [value for polygon in polygons for value in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def canonical(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a label says, the same text for the same label: rows in any order, corners to GRAIN_PX, scores left out."""

    def plain(row: Mapping[str, Any]) -> Row:
        said = {key: row[key] for key in ("label", "text") if key in row}
        # A polygon says its box: two roundings of one box are not two labels.
        if "polygons" in row:
            said["polygons"] = [[_grains(value) for value in polygon] for polygon in row["polygons"]]
        elif "box" in row:
            said["box"] = [_grains(value) for value in row["box"]]
        return said

    return json.dumps(sorted(json.dumps(plain(row), sort_keys=True) for row in rows))


def _grains(value: float) -> int:
    return round(value / GRAIN_PX)


def best(rows: Sequence[Row]) -> list[Row]:
    """What a classifier's answer means: the row that scores best, the first of equals, as the only one."""
    return sorted(rows, key=lambda row: -float(1.0 if row.get("score") is None else row["score"]))[:1]


def names(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """The classes that a label names."""
    return {row["label"] for row in rows if "label" in row}


class Opinion(Protocol):
    """What somebody said about pixels: a pool's record."""

    @property
    def label(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def verdict(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def who(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def release(self) -> str: ...
    @property
    def confidence(self) -> float: ...
    @property
    def said(self) -> float: ...


def last_word(opinions: Sequence[Opinion]) -> int | None:
    """Which opinion is the last word of a person, a rejection too; None when no person has said anything."""
    said = [number for number, each in enumerate(opinions) if each.kind == "person"]
    return max(said, key=lambda number: opinions[number].said) if said else None


def choose(opinions: Sequence[Opinion], model: str, confidence_min: float = 0.0) -> tuple[int | None, str]:
    """Which of the opinions about one image (for one model and task) is its label: its index, or None with the reason.

    A person's word counts more than a model's, a later word of a person more than an earlier one, a surer model's more
    than another's. A label that a person has rejected since is none, and a model's own predictions never are.
    """
    rejected: dict[str, float] = {}
    for each in opinions:
        if each.verdict == "rejected":
            key = canonical(each.label)
            rejected[key] = max(each.said, rejected.get(key, -math.inf))
    found: list[int] = []
    reason = "none"
    for number, each in enumerate(opinions):
        if each.verdict == "rejected":
            continue
        if each.said <= rejected.get(canonical(each.label), -math.inf):
            reason = "rejected"
        elif is_own_word(model, kind=each.kind, who=each.who, release=each.release, device=each.device):
            reason = "own_prediction"
        elif each.confidence < confidence_min:
            reason = "below_label_confidence"
        else:
            found.append(number)
    if not found:
        return None, reason

    def weight(number: int) -> tuple[bool, float, float]:
        each = opinions[number]
        person = each.kind == "person"
        return person, each.said if person else each.confidence, each.said

    return max(found, key=weight), ""
