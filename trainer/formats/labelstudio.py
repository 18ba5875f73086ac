"""Label Studio: tasks to be labelled, with what was said so far, and the JSON of its export taken back.

Coordinates there are per cent of the picture's sides (https://labelstud.io/guide/export). A task's `data.record` is the id
of the pool's record that is reviewed. `labels.xml` is the labelling configuration; its choice `reject` says that a label is
wrong without saying what is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import quoteattr

from trainer.core.labels import Row, Task
from trainer.formats.base import FormatError

VERDICT, REJECT = "verdict", "reject"
_TYPES: dict[Task, str] = {
    "detect": "rectanglelabels", "segment": "polygonlabels", "classify": "choices", "text": "textarea",
}  # fmt: skip
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Judged:
    """What a person says of a record: `label` None means that it is wrong. `unchanged`: it is right as it was."""

    record: str
    who: str
    label: tuple[Row, ...] | None
    unchanged: bool = False


def task(
    record: str, kind: Task, data: Mapping[str, str], label: Sequence[Row], size: Size, who: str, sure: float
) -> dict[str, Any]:
    """A task with what `who` said as its prediction; `data` is what is shown (`image` or `text`)."""
    results = [each for number, row in enumerate(label) for each in _results(f"{record}-{number}", kind, row, size)]
    prediction = {"model_version": who, "score": sure, "result": results}
    return {"data": {**data, "record": record}, "predictions": [prediction]}


def _results(key: str, kind: Task, row: Row, size: Size) -> list[dict[str, Any]]:
    shown = "text" if kind == "text" else "image"
    common: dict[str, Any] = {"id": key, "type": _TYPES[kind], "from_name": "label", "to_name": shown}
    if kind == "text":
        return [{**common, "value": {"text": [row["text"]]}}]
    if kind == "classify":
        return [{**common, "value": {"choices": [row["label"]]}}]
    common |= {"original_width": size[0], "original_height": size[1], "image_rotation": 0}
    if kind == "segment":
        found = []
        for number, polygon in enumerate(row["polygons"]):
            points = [[x * 100 / size[0], y * 100 / size[1]] for x, y in zip(polygon[0::2], polygon[1::2], strict=True)]
            value = {"points": points, "polygonlabels": [row["label"]], "closed": True}
            found.append({**common, "id": f"{key}-{number}", "value": value})
        return found
    x1, y1, x2, y2 = row["box"]
    sides = {
        "x": x1 * 100 / size[0], "y": y1 * 100 / size[1], "width": (x2 - x1) * 100 / size[0],
        "height": (y2 - y1) * 100 / size[1],
    }  # fmt: skip
    return [{**common, "value": {**sides, "rotation": 0, "rectanglelabels": [row["label"]]}}]


def configuration(kind: Task, labels: Sequence[str]) -> str:
    """The labelling configuration, for the project's settings."""
    shown = (
        '<Text name="text" value="$text"/>' if kind == "text" else '<Image name="image" value="$image" zoom="true"/>'
    )
    target = "text" if kind == "text" else "image"
    named = "".join(f"<Label value={quoteattr(label)}/>" for label in labels)
    choices = "".join(f"<Choice value={quoteattr(label)}/>" for label in labels)
    asked = {
        "detect": f'<RectangleLabels name="label" toName="image">{named}</RectangleLabels>',
        "segment": f'<PolygonLabels name="label" toName="image">{named}</PolygonLabels>',
        "classify": f'<Choices name="label" toName="image" choice="single">{choices}</Choices>',
        "text": '<TextArea name="label" toName="text" editable="true" maxSubmissions="1"/>',
    }[kind]
    verdict = f'<Choices name="{VERDICT}" toName="{target}"><Choice value="{REJECT}"/></Choices>'
    return f"<View>{shown}{asked}{verdict}</View>\n"


def judged(row: Any, kinds: Mapping[str, tuple[Task, Size]], who: str) -> list[Judged]:
    """The annotations of an exported task, skipped ones left out; `kinds`: record -> its task and the picture's size.

    Raises FormatError naming what cannot be read.
    """
    data = row.get("data") if isinstance(row, dict) else None
    record = data.get("record") if isinstance(data, dict) else None
    if not isinstance(record, str) or record not in kinds:
        raise FormatError(f"record {record!r} is not in the pool: import the tasks that `trainer samples review` wrote")
    annotations = row.get("annotations")
    if not isinstance(annotations, list):
        raise FormatError("no list `annotations`: export as JSON, not as JSON-MIN")
    found = []
    for annotation in annotations:
        if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
            continue
        by = annotation.get("completed_by")
        named = by.get("email") if isinstance(by, dict) else None
        results = annotation.get("result")
        if not isinstance(results, list):
            raise FormatError("an annotation without a list `result`")
        found.append(Judged(record, str(named or who), _label(results, *kinds[record])))
    return found


def _label(results: list[Any], kind: Task, size: Size) -> tuple[Row, ...] | None:
    rows: list[Row] = []
    for result in results:
        value = result.get("value") if isinstance(result, dict) else None
        if not isinstance(value, dict):
            raise FormatError("a result without `value`")
        if result.get("from_name") == VERDICT:
            if REJECT in value.get("choices", []):
                return None
            continue
        if result.get("type") != _TYPES[kind]:
            raise FormatError(f"a result of type {result.get('type')!r}, {_TYPES[kind]} is wanted for {kind}")
        try:
            rows.append(_row(value, kind, size))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise FormatError(f"a result that cannot be read: {type(error).__name__}: {error}") from None
    return tuple(rows)


def _row(value: dict[str, Any], kind: Task, size: Size) -> Row:
    if kind == "text":
        text = value["text"]
        return {"text": text if isinstance(text, str) else "\n".join(text)}
    (label,) = value[_TYPES[kind]]
    if kind == "classify":
        return {"label": label}
    if value.get("rotation"):
        raise ValueError(f"a box turned by {value['rotation']} degrees: draw it upright, or as a polygon")
    if kind == "segment":
        points = [float(side) * size[index] / 100 for point in value["points"] for index, side in enumerate(point)]
        return {"label": label, "polygons": [points]}
    x, y = value["x"] * size[0] / 100, value["y"] * size[1] / 100
    return {"label": label, "box": [x, y, x + value["width"] * size[0] / 100, y + value["height"] * size[1] / 100]}
