"""COCO: one instances JSON and a folder of pictures (https://cocodataset.org/#format-data).

Read: boxes [x, y, width, height] and polygons in pixels, categories with any ids, pictures without annotations; a picture
with a crowd (iscrowd 1) is left out and counted, for its boxes are not all there. Written: `annotations/instances.json` and
`images/`, a picture's name is its SHA-256.
A picture's key `edged` says whose label it is; it counts at an import only while the label is the one it was written with.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.core.labels import Row, Task, area, names
from trainer.formats.base import (
    IMAGES,
    SIZE_SLACK_PX,
    Asked,
    Example,
    FormatError,
    Problem,
    Reading,
    examine,
    mark,
    put,
    read_inside,
    read_json,
    size_of,
    suffix,
    whole_folder,
)

TASKS: tuple[Task, ...] = ("detect", "segment")
# As tools name it; the last: the only JSON file that is there.
NAMES = (
    "annotations/instances*.json", "instances*.json", "labels.json", "result.json", "_annotations.coco.json",
    "annotations.json", "*.json",
)  # fmt: skip
OURS = "edged"


def read(path: Path, asked: Asked) -> Reading:
    """A data set: the JSON file, or a folder that holds one. Raises FormatError."""
    file = _find(path)
    value = read_json(file)
    if not isinstance(value, dict) or not isinstance(value.get("images"), list):
        raise FormatError(f"{file}: no COCO instances file: it has no list `images`")
    categories = _categories(file, value, asked.rename)
    ids = (row.get("id") for row in value["images"] if isinstance(row, dict))
    annotations, stray = _by_image(value, {each for each in ids if isinstance(each, int | str)})
    task = asked.task
    if task is None:
        several = any(_polygons(row) for rows in annotations.values() for _, row in rows if not _crowd(row))
        task = "segment" if several else "detect"
    if task not in TASKS:
        raise FormatError(f"task {task}: COCO has boxes and polygons only; use yolo or jsonl")
    folder = asked.images or _folder(file, value["images"])
    reading = Reading(len(value["images"]), iter(()), task)
    reading.items = _items(file, folder, value["images"], annotations, stray, categories, asked, reading)
    return reading


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FormatError(f"{path} does not exist: give the COCO JSON file, or the folder that holds it")
    for pattern in NAMES:
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            shown = ", ".join(str(each.relative_to(path)) for each in found)
            raise FormatError(f"{path} holds {len(found)} COCO files ({shown}): give one of them")
    raise FormatError(f"{path} holds none of {', '.join(NAMES)}: give the COCO JSON file itself")


def _folder(file: Path, images: list[Any]) -> Path:
    """Where the pictures lie: the first usual place that has one of them."""
    base = file.parent
    split = file.stem.removeprefix("instances_")
    usual = [
        base / IMAGES, base / "data", base.parent / IMAGES, base.parent / split, base.parent / IMAGES / split,
        base.parent / "data", base, base.parent,
    ]  # fmt: skip
    named = [row["file_name"] for row in images if isinstance(row, dict) and isinstance(row.get("file_name"), str)]
    for folder in usual:
        if any((folder / name).is_file() for name in named[:100]):
            return folder
    return base / IMAGES


def _categories(file: Path, value: dict[str, Any], rename: Mapping[str, str]) -> dict[Any, str]:
    found: dict[Any, str] = {}
    rows = value.get("categories")
    for number, row in enumerate(rows if isinstance(rows, list) else [], start=1):
        name = row.get("name") if isinstance(row, dict) else None
        key = row.get("id") if isinstance(row, dict) else None
        if not isinstance(name, str) or not isinstance(key, int | str):
            raise FormatError(f"{file}, category {number}: an object with `id` and `name` is wanted, found {row!r}")
        called = rename.get(name, name)
        if found.setdefault(key, called) != called:
            raise FormatError(f"{file}, category {number}: id {key!r} is {found[key]!r} already")
    return found


def _by_image(value: dict[str, Any], known: set[Any]) -> tuple[dict[Any, list[tuple[int, dict[str, Any]]]], list[int]]:
    """Image id -> its annotations with their numbers in the file, and the numbers of those without an image."""
    found: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
    stray = []
    rows = value.get("annotations")
    for number, row in enumerate(rows if isinstance(rows, list) else [], start=1):
        image = row.get("image_id") if isinstance(row, dict) else None
        if not isinstance(image, int | str) or image not in known:
            stray.append(number)
        else:
            found.setdefault(image, []).append((number, row))
    return found, stray


def _items(
    file: Path,
    folder: Path,
    images: list[Any],
    annotations: dict[Any, list[tuple[int, dict[str, Any]]]],
    stray: list[int],
    categories: dict[Any, str],
    asked: Asked,
    reading: Reading,
) -> Iterator[Example | Problem]:
    for number in stray:
        yield Problem("annotation_bad", f"{file.name}, annotation {number}", "it names no image of this file")
    seen: set[Any] = set()
    for number, image in enumerate(images, start=1):
        place = f"{file.name}, image {number}"
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
            yield Problem("image_bad", place, "an object with `id` and `file_name` is wanted")
            continue
        place += f" ({image['file_name']})"
        if not isinstance(image["id"], int | str) or image["id"] in seen:
            yield Problem("image_bad", place, f"id {image['id']!r} is no number or is used twice")
            continue
        seen.add(image["id"])
        try:
            data = read_inside(folder, image["file_name"])
        except FormatError as error:
            yield Problem("image_missing", place, str(error))
            continue
        yield from _image(image, data, place, annotations.get(image["id"], []), categories, asked, reading)


def _image(
    image: dict[str, Any],
    data: bytes,
    place: str,
    annotations: list[tuple[int, dict[str, Any]]],
    categories: dict[Any, str],
    asked: Asked,
    reading: Reading,
) -> Iterator[Example | Problem]:
    size, stated = size_of(data), (image.get("width"), image.get("height"))
    if size is not None and all(isinstance(side, int) for side in stated) and not _alike(size, stated):
        reason = (
            f"the file says {stated[0]}x{stated[1]} pixels, the picture has {size[0]}x{size[1]}: the boxes are not of "
            "these pixels; export it again, or correct width and height"
        )
        yield Problem("image_bad", place, reason)
        return
    rows, numbers, spoilt = [], [], 0
    for number, annotation in annotations:
        if _crowd(annotation):
            reading.skipped["crowd"] = reading.skipped.get("crowd", 0) + 1
            spoilt += 1
            continue
        try:
            rows.append(_row(annotation, categories, reading.task))
            numbers.append(number)
        except FormatError as error:
            yield Problem("annotation_bad", f"{place}, annotation {number}", str(error))
            spoilt += 1
    fields: dict[str, Any] = {"captured": _captured(image)}
    ours = image.get(OURS)
    for item in examine(data, reading.task, rows, asked, place, spoilt=spoilt, **fields):
        if isinstance(item, Problem) and item.kind == "annotation_bad":
            inner = int(item.place.rpartition(" ")[2])  # of the rows that were left; the file's number is meant
            yield Problem(item.kind, f"{place}, annotation {numbers[inner - 1]}", item.reason)
        elif isinstance(item, Example) and isinstance(ours, dict) and ours.get("label") == mark(item.label):
            yield Example(
                item.data, item.task, item.label, place, item.captured, str(ours.get("device") or ""),
                ours.get("provenance") if isinstance(ours.get("provenance"), dict) else {},  # type: ignore[arg-type]
            )  # fmt: skip
        else:
            yield item


def _alike(size: tuple[int, int], stated: tuple[Any, Any]) -> bool:
    return all(abs(a - b) <= SIZE_SLACK_PX for a, b in zip(size, stated, strict=True))


def _crowd(annotation: dict[str, Any]) -> bool:
    return annotation.get("iscrowd") in (1, True)


def _polygons(annotation: dict[str, Any]) -> list[Any]:
    found = annotation.get("segmentation")
    return found if isinstance(found, list) else []


def _row(annotation: dict[str, Any], categories: dict[Any, str], task: Task) -> Row:
    category = annotation.get("category_id")
    if not isinstance(category, int | str) or category not in categories:
        raise FormatError(f"category_id {category!r} is none of this file's categories")
    row: Row = {"label": categories[category]}
    if annotation.get("score") is not None:
        row["score"] = annotation["score"]
    if task == "segment":
        if isinstance(annotation.get("segmentation"), dict):
            raise FormatError("its mask is run-length encoded: export polygons, or import it as boxes (--task detect)")
        return row | {"polygons": _polygons(annotation)}
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        raise FormatError(f"bbox {box!r}: [x, y, width, height] in pixels is wanted")
    x, y, width, height = box
    return row | {"box": [x, y, x + width, y + height]}


def _captured(image: dict[str, Any]) -> float:
    try:
        when = datetime.datetime.fromisoformat(str(image.get("date_captured")).replace("Z", "+00:00"))
    except ValueError:
        return 0.0
    return (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).timestamp()


def write(folder: Path, examples: Iterable[Example], labels: Iterable[str] = ()) -> list[Problem]:
    """Write a data set into a new folder; `labels` come first among the categories, in this order. What COCO cannot hold
    is returned. Raises FormatError and OSError."""
    categories = {name: number for number, name in enumerate(dict.fromkeys(labels), start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    problems = []
    with whole_folder(folder) as beside:
        for example in examples:
            size = size_of(example.data)
            if example.task not in TASKS or size is None:
                problems.append(Problem("not_expressible", example.place, f"COCO cannot hold a {example.task} label"))
                continue
            name = f"{example.sha256}{suffix(example.data)}"
            put(beside / IMAGES / name, example.data)
            image = len(images) + 1
            images.append(_image_row(image, name, size, example))
            for label in sorted(names(example.label)):
                categories.setdefault(label, len(categories) + 1)
            for row in example.label:
                annotations.append(_annotation(len(annotations) + 1, image, categories[row["label"]], row))
        value = {
            "info": {"description": "labelled samples", "version": "1"},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name, "supercategory": ""} for name, number in categories.items()],
        }
        put(beside / "annotations" / "instances.json", json.dumps(value).encode())
    return problems


def _image_row(number: int, name: str, size: tuple[int, int], example: Example) -> dict[str, Any]:
    row: dict[str, Any] = {"id": number, "file_name": name, "width": size[0], "height": size[1]}
    if example.captured:
        row["date_captured"] = datetime.datetime.fromtimestamp(example.captured, datetime.UTC).isoformat()
    return row | {
        OURS: {"device": example.device, "provenance": dict(example.provenance), "label": mark(example.label)}
    }


def _annotation(number: int, image: int, category: int, row: Row) -> dict[str, Any]:
    x1, y1, x2, y2 = row["box"]
    polygons = row.get("polygons", [])
    made: dict[str, Any] = {
        "id": number, "image_id": image, "category_id": category, "iscrowd": 0,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": sum(area(polygon) for polygon in polygons) if polygons else (x2 - x1) * (y2 - y1),
        "segmentation": [list(polygon) for polygon in polygons],
    }  # fmt: skip
    return made | ({"score": row["score"]} if "score" in row else {})
