"""YOLO: the folders that ultralytics trains on (https://docs.ultralytics.com/datasets).

Detect and segment: `data.yaml`, `images/SPLIT/NAME.png`, `labels/SPLIT/NAME.txt` with a line for each object, in shares of
the picture's sides: `class x_centre y_centre width height`, or `class x1 y1 x2 y2 x3 y3 ...`. Classify:
`SPLIT/CLASS/NAME.png`. Label Studio writes the older form: `classes.txt` with a class a line, `images/` and `labels/`.

Numbers are written with DIGITS digits: what is read again differs by less than 1e-4 pixels up to 8192 pixels. The format
has no place for who labelled, for scores, and for a polygon in parts (each becomes an object of its own, and is said).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.core.labels import Row, Task, names
from trainer.formats.base import (
    IMAGES,
    PICTURE_BYTES_MAX,
    SUFFIXES,
    Asked,
    Example,
    FormatError,
    Problem,
    Reading,
    examine,
    put,
    read_bounded,
    share_of,
    size_of,
    suffix,
    whole_folder,
)

TASKS: tuple[Task, ...] = ("detect", "segment", "classify")
YAML = "data.yaml"
CLASSES = "classes.txt"
LABELS = "labels"
SPLITS = ("train", "val", "test")
OTHER_SPLITS = {"valid": "val", "validation": "val"}
DIGITS = 9
DETECT_COLUMNS = 5


def read(path: Path, asked: Asked) -> Reading:
    """A data set: its data.yaml, the folder that holds it, or a folder of class folders. Raises FormatError."""
    if asked.images is not None:
        raise FormatError(f"--images {asked.images}: a YOLO data set says itself where its pictures are")
    task = asked.task
    file = _find(path, task)
    if file is None:
        found = sorted(_classified(path))
        if not found:
            raise FormatError(
                f"{path}: neither a {YAML}, nor {CLASSES} beside {IMAGES}/, nor class folders with pictures "
                "(train/CLASS/NAME.png)"
            )
        return Reading(len(found), _classes(path, found, asked), "classify")
    classes, folders = (_listed if file.name == CLASSES else _settings)(file, asked.rename)
    pictures = [picture for folder in folders for picture in _pictures(file, folder)]
    if not pictures:
        shown = ", ".join(map(str, folders))
        fix = "export it with its pictures" if file.name == CLASSES else "correct `path`, `train` and `val` in it"
        raise FormatError(f"{file}: no picture in {shown}: {fix}")
    if task is None:
        task = "segment" if any(_has_polygons(_label_file(picture)) for picture in pictures) else "detect"
    root = file.parent
    return Reading(len(pictures), _items(root, pictures, task, classes, asked), task)


def _find(path: Path, task: Task | None) -> Path | None:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FormatError(f"{path} does not exist: give {YAML}, or the data set's folder")
    if task == "classify":
        return None
    if (path / YAML).is_file():
        return path / YAML
    found = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    if len(found) > 1:
        shown = ", ".join(each.name for each in found)
        raise FormatError(f"{path} holds {len(found)} YAML files ({shown}): give one of them")
    if not found and (path / CLASSES).is_file() and (path / IMAGES).is_dir():
        return path / CLASSES
    return found[0] if found else None


def _listed(file: Path, rename: Mapping[str, str]) -> tuple[dict[int, str], list[Path]]:
    """The same of `classes.txt`, a class a line."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise FormatError(f"{file}: {error}") from None
    named = [line.strip() for line in lines]
    classes = {number: rename.get(name, name) for number, name in enumerate(named) if name}
    if not classes:
        raise FormatError(f"{file} is empty: it lists the classes, one a line")
    return classes, [file.parent.resolve() / IMAGES]


def _settings(file: Path, rename: Mapping[str, str]) -> tuple[dict[int, str], list[Path]]:
    """Class number -> name, and the folders or lists of pictures."""
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FormatError(f"{file}: {error}") from None
    given = value.get("names") if isinstance(value, dict) else None
    if isinstance(given, list):
        given = dict(enumerate(given))
    if not isinstance(given, dict) or not given or not all(isinstance(key, int) for key in given):
        raise FormatError(f"{file}: `names` is missing or empty: it lists the classes, by number")
    classes = {number: rename.get(str(name), str(name)) for number, name in given.items()}
    base = file.parent
    stated = Path(str(value.get("path") or "."))
    # Ultralytics looks for a relative path in the folder that it was started in, or in its settings; people mean the
    # YAML's own folder.
    root = next((each for each in (base / stated, stated) if each.is_dir()), base)
    found: list[Path] = []
    for split in (*SPLITS, *OTHER_SPLITS):
        entry = value.get(split)
        for each in entry if isinstance(entry, list) else [entry]:
            if isinstance(each, str):
                folder = root / each
                if not folder.exists() and each.startswith("../"):
                    folder = root / each[3:]  # as Roboflow writes it
                found.append(folder)
    if not found:
        raise FormatError(f"{file}: none of {', '.join(SPLITS)} is given: each names a folder of pictures")
    return classes, list(dict.fromkeys(each.resolve() for each in found))


def _pictures(file: Path, place: Path) -> list[Path]:
    """The pictures of a folder, or those that a text file lists."""
    if place.is_file():
        lines = place.read_text(encoding="utf-8", errors="replace").split("\n")
        return [place.parent / line.strip() for line in lines if line.strip()]
    if not place.is_dir():
        return []
    return sorted(each for each in place.rglob("*") if each.suffix.lower() in SUFFIXES)


def _label_file(picture: Path) -> Path:
    parts = list(picture.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == IMAGES:
            parts[index] = LABELS
            break
    return Path(*parts).with_suffix(".txt")


def _has_polygons(file: Path) -> bool:
    try:
        return any(len(line.split()) > DETECT_COLUMNS + 1 for line in file.read_bytes().split(b"\n"))
    except OSError:
        return False


def _items(
    root: Path, pictures: Sequence[Path], task: Task, classes: dict[int, str], asked: Asked
) -> Iterator[Example | Problem]:
    for picture in pictures:
        place = str(picture.relative_to(root)) if picture.is_relative_to(root) else str(picture)
        file = _label_file(picture)
        try:
            data = read_bounded(picture, PICTURE_BYTES_MAX)
            # No label file: nothing is in the picture, as ultralytics takes it.
            said = read_bounded(file, PICTURE_BYTES_MAX) if file.exists() else b""
            text = said.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
        except FormatError as error:
            yield Problem("image_missing", place, str(error))
            continue
        except OSError as error:
            yield Problem("image_missing", place, f"{error.filename}: {error.strerror}")
            continue
        size = size_of(data)
        if size is None:
            yield Problem("image_unreadable", place, f"{len(data)} bytes that do not decode as a picture")
            continue
        rows, numbers, spoilt = [], [], 0
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append(_row(line.split(), task, classes, size))
                numbers.append(number)
            except FormatError as error:
                yield Problem("line_bad", f"{place}, {file.name} line {number}", str(error))
                spoilt += 1
        for item in examine(data, task, rows, asked, place, "line", spoilt=spoilt):
            if isinstance(item, Problem) and item.kind == "line_bad":
                inner = int(item.place.rpartition(" ")[2])
                yield Problem(item.kind, f"{place}, {file.name} line {numbers[inner - 1]}", item.reason)
            else:
                yield item


def _row(words: list[str], task: Task, classes: dict[int, str], size: tuple[int, int]) -> Row:
    try:
        number, values = float(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        raise FormatError(f"{' '.join(words)[:60]!r}: numbers are wanted") from None
    if number not in classes:
        raise FormatError(f"class {words[0]} is none of the data set's {len(classes)} names")
    row: Row = {"label": classes[int(number)]}
    polygon = len(words) > DETECT_COLUMNS + 1
    if not polygon and len(words) not in (DETECT_COLUMNS, DETECT_COLUMNS + 1):
        raise FormatError(f"{len(words)} columns: `class x y width height`, or a class and 3 or more points, is wanted")
    if polygon:
        if len(values) % 2:
            raise FormatError(f"{len(values)} numbers after the class: points come in pairs")
        points = [value * size[index % 2] for index, value in enumerate(values)]
        if task == "segment":
            return row | {"polygons": [points]}
        return row | {"box": [min(points[0::2]), min(points[1::2]), max(points[0::2]), max(points[1::2])]}
    if task == "segment":
        raise FormatError("a box in a data set of polygons: draw its outline, or import all as boxes (--task detect)")
    x, y, width, height = (value * size[index % 2] for index, value in enumerate(values[:4]))
    score = {"score": values[4]} if len(values) > 4 else {}
    return row | {"box": [x - width / 2, y - height / 2, x + width / 2, y + height / 2]} | score


def _classified(root: Path) -> Iterator[tuple[str, Path]]:
    """(class, picture) below `root`: train/CLASS/NAME, or CLASS/NAME without splits."""
    splits = [root / name for name in (*SPLITS, *OTHER_SPLITS) if (root / name).is_dir()]
    for base in splits or [root]:
        for folder in sorted(each for each in base.iterdir() if each.is_dir()):
            for picture in sorted(folder.rglob("*")):
                if picture.suffix.lower() in SUFFIXES:
                    yield folder.name, picture


def _classes(root: Path, found: Sequence[tuple[str, Path]], asked: Asked) -> Iterator[Example | Problem]:
    for name, picture in found:
        place = str(picture.relative_to(root))
        try:
            data = read_bounded(picture, PICTURE_BYTES_MAX)
        except (FormatError, OSError) as error:
            yield Problem("image_missing", place, getattr(error, "strerror", None) or str(error))
            continue
        rows = [{"label": asked.rename.get(name, name)}]
        yield from examine(data, "classify", rows, asked, place, "class")


def write(folder: Path, examples: Iterable[Example], labels: Iterable[str], *, val_share: float = 0.1) -> list[Problem]:
    """Write a data set into a new folder. `labels`: the classes by number; a label that is none of them comes after them.
    `val_share` of the pictures, by hash, go to `val`. What YOLO cannot hold is returned. Raises FormatError and OSError."""
    problems: list[Problem] = []
    classes = {name: number for number, name in enumerate(dict.fromkeys(labels))}
    tasks: set[Task] = set()
    with whole_folder(folder) as beside:
        for example in examples:
            size = size_of(example.data)
            if example.task not in TASKS or size is None:
                problems.append(Problem("not_expressible", example.place, f"YOLO cannot hold a {example.task} label"))
                continue
            tasks.add(example.task)
            if len(tasks) > 1:
                raise FormatError(f"{' and '.join(sorted(tasks))} cannot be in one YOLO data set: give --task")
            split = "val" if share_of(example.sha256) < val_share else "train"
            name = f"{example.sha256}{suffix(example.data)}"
            if example.task == "classify":
                _write_class(beside, split, name, example, problems)
                continue
            put(beside / IMAGES / split / name, example.data)
            for label in sorted(names(example.label)):
                classes.setdefault(label, len(classes))
            text = "".join(_line(row, classes, size, example.place, problems) for row in example.label)
            put(beside / LABELS / split / f"{example.sha256}.txt", text.encode())
        if tasks == {"classify"}:
            _same_folders(beside)
        else:
            _write_yaml(beside, classes)
    return problems


def _line(row: Row, classes: dict[str, int], size: tuple[int, int], place: str, problems: list[Problem]) -> str:
    number = classes[row["label"]]
    if "polygons" not in row:
        x1, y1, x2, y2 = row["box"]
        values = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
        return f"{number} {_shares(values, size)}\n"
    if len(row["polygons"]) > 1:
        problems.append(Problem("split", place, f"{row['label']}: {len(row['polygons'])} parts became objects each"))
    return "".join(f"{number} {_shares(polygon, size)}\n" for polygon in row["polygons"])


def _shares(values: Sequence[float], size: tuple[int, int]) -> str:
    return " ".join(f"{value / size[index % 2]:.{DIGITS}f}" for index, value in enumerate(values))


def _write_class(folder: Path, split: str, name: str, example: Example, problems: list[Problem]) -> None:
    label = str(example.label[0]["label"])
    if label in (".", "..") or "/" in label or "\0" in label or len(label.encode()) > 255:
        problems.append(Problem("not_expressible", example.place, f"class {label!r} cannot be a folder's name"))
        return
    put(folder / split / label / name, example.data)


def _same_folders(folder: Path) -> None:
    """Every class has a folder in both splits: ultralytics numbers the classes of each split by its folders."""
    found = {each.name for split in SPLITS for each in (folder / split).glob("*") if each.is_dir()}
    for split in ("train", "val"):
        for name in found:
            (folder / split / name).mkdir(parents=True, exist_ok=True)


def _write_yaml(folder: Path, classes: dict[str, int]) -> None:
    here: dict[str, Any] = {
        split: f"{IMAGES}/{split}" for split in ("train", "val") if (folder / IMAGES / split).is_dir()
    }
    # Ultralytics wants both: with too few pictures for a share of them, the same ones stand for both.
    only = next(iter(here.values()), f"{IMAGES}/train")
    value = {
        "train": here.get("train", only),
        "val": here.get("val", only),
        "names": {number: name for name, number in classes.items()},
    }
    put(folder / YAML, yaml.safe_dump(value, allow_unicode=True, sort_keys=False).encode())
