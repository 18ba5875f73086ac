"""COCO, YOLO and JSONL: what goes out comes back, other tools read it, and a bad record costs only itself."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.core.labels import Task, area, enclosing
from trainer.database import Database
from trainer.datasets import read_folder
from trainer.exchange import FORMATS, HOLD, Source, Summary, export_all, import_all, read
from trainer.formats.base import FormatError, share_of
from trainer.pool import Pool, Record, Wanted

TOLERANCE_PX = {"coco": 1e-9, "jsonl": 0.0, "yolo": 1e-4}
SOURCE = Source("eye", "person", "ann")
CLASSES = ["cat", "dog: big", "Vögel\u2028", "7", "it's"]
ENDS = {".png": ".png", ".jpg": ".jpg", ".bmp": ".bmp"}


def picture(value: int, width: int = 64, height: int = 48, end: str = ".png") -> bytes:
    noise = np.random.default_rng(value).integers(0, 255, (height, width, 3), np.uint8)
    return cv2.imencode(end, noise)[1].tobytes()


@contextmanager
def new_pool() -> Iterator[tuple[Pool, Path]]:
    folder = Path(tempfile.mkdtemp())
    database = Database(folder / "trainer.sqlite")
    try:
        yield Pool(database, folder / "pool"), folder
    finally:
        database.close()
        shutil.rmtree(folder)


def take(pool: Pool, format_: str, path: Path, **options: Any) -> Summary:
    asked = {"task": None, "known": None, "rename": {}, **options}
    return import_all(pool, read(format_, path, **asked), SOURCE, 1.0)


def coordinates(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_subnormal=False)


@st.composite
def labels(draw: st.DrawFn, task: Task, width: int, height: int) -> tuple[dict[str, Any], ...]:
    name = st.sampled_from(CLASSES)
    if task == "classify":
        return ({"label": draw(name)},)
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        x1, y1 = draw(coordinates(0, width - 2)), draw(coordinates(0, height - 2))
        x2, y2 = draw(coordinates(x1 + 1, width)), draw(coordinates(y1 + 1, height))
        row: dict[str, Any] = {"label": draw(name), "box": [x1, y1, x2, y2]}
        if task == "segment":
            polygon = [x1, y1, x2, y1, x2, y2, (x1 + x2) / 2, draw(coordinates((y1 + y2) / 2, y2)), x1, y2]
            row |= {"polygons": [polygon], "box": list(enclosing([polygon]))}
        rows.append(row)
    return tuple(rows)


@st.composite
def pools(draw: st.DrawFn, task: Task) -> dict[bytes, tuple[dict[str, Any], ...]]:
    found = {}
    for value in draw(st.lists(st.integers(0, 1000), min_size=1, max_size=2, unique=True)):
        width, height = draw(st.integers(8, 90)), draw(st.integers(8, 90))
        data = picture(value, width, height, draw(st.sampled_from(sorted(ENDS))))
        found[data] = draw(labels(task, width, height))
    return found


@pytest.mark.parametrize(("format_", "task"), [(f, t) for f in FORMATS for t in HOLD[f] if t != "text"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_goes_out_comes_back(format_: str, task: Task, data: st.DataObject) -> None:
    """The same pixels byte for byte, the same rows in the same order within the stated rounding."""
    given_ = data.draw(pools(task))
    with new_pool() as (first, folder), new_pool() as (second, _):
        made = [
            (Record(_sha(content), "eye", task, rows, "person", "ann", captured=5.5, device="cam"), content)
            for content, rows in given_.items()
        ]
        first.add(made, 1.0)
        told = export_all(first, Wanted(model="eye"), format_, folder / "out", CLASSES, val_share=0.3)
        assert (told.read, told.problems, told.skipped) == (len(made), {}, {})
        back = take(second, format_, folder / "out", task=task, known=CLASSES)
        assert (back.added, back.problems) == (len(made), {})
        by_hash = {record.sha256: record for record in second.records()}
        for record, content in made:
            found = by_hash[record.sha256]
            assert second.read(record.sha256) == content
            assert _alike(record.label, found.label, TOLERANCE_PX[format_])
            if format_ != "yolo":
                assert (found.who, found.captured, found.device) == ("ann", 5.5, "cam")
        again = take(first, format_, folder / "out", task=task)
        assert again.added == 0 or format_ == "yolo"  # 0.005 px may round to either side


def _sha(data: bytes) -> str:
    from hashlib import sha256

    return sha256(data).hexdigest()


def _alike(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_alike(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key], tolerance) for key in a)
    return bool(abs(a - b) <= tolerance) if isinstance(a, float) else bool(a == b)


POLYGON = [4.0, 4.0, 30.5, 6.0, 28.0, 40.25, 6.0, 30.0]


def filled(pool: Pool, task: Task, count: int = 8) -> None:
    items = []
    for value in range(count):
        data = picture(value)
        rows: tuple[dict[str, Any], ...] = (
            {"label": "cat", "box": [1.0, 2.0, 20.5, 30.25]},
            {"label": "dog: big", "box": [10.0, 20.0, 40.0, 48.0]},
        )
        if task == "segment":
            rows = ({"label": "dog: big", "box": list(enclosing([POLYGON])), "polygons": [POLYGON]},)
        if task == "classify":
            rows = ({"label": ("cat", "dog: big")[value % 2]},)
        if value == 5 and task != "classify":
            rows = ()
        items.append((Record(_sha(data), "eye", task, rows, "person", "ann"), data))
    pool.add(items, 1.0)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_coco_is_what_pycocotools_reads(task: Task) -> None:
    from pycocotools.coco import COCO

    with new_pool() as (pool, folder):
        filled(pool, task)
        export_all(pool, Wanted(model="eye"), "coco", folder / "out", ["cat", "dog: big"])
        coco = COCO(folder / "out" / "annotations" / "instances.json")
        assert {row["name"] for row in coco.loadCats(coco.getCatIds())} == {"cat", "dog: big"}
        assert len(coco.getImgIds()) == 8
        for image in coco.loadImgs(coco.getImgIds()):
            pixels = cv2.imread(str(folder / "out" / "images" / image["file_name"]))
            assert pixels.shape[:2] == (image["height"], image["width"])
        ids = coco.getAnnIds(catIds=coco.getCatIds(["dog: big"]))
        assert len(ids) == 7  # one picture has nothing
        annotation = coco.loadAnns(ids)[0]
        if task == "detect":
            assert annotation["bbox"] == [10, 20, 30, 28]
        else:
            mask = coco.annToMask(annotation)
            assert mask.shape == (48, 64)
            assert mask.sum() == pytest.approx(area(POLYGON), rel=0.05)
            assert annotation["area"] == pytest.approx(area(POLYGON))


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_yolo_is_what_ultralytics_reads(task: Task) -> None:
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    with new_pool() as (pool, folder):
        filled(pool, task, 24)
        export_all(pool, Wanted(model="eye"), "yolo", folder / "out", ["cat", "dog: big"], val_share=0.25)
        described = check_det_dataset(folder / "out" / "data.yaml")
        assert described["names"] == {0: "cat", 1: "dog: big"}
        found = {}
        for split in ("train", "val"):
            config = get_cfg(overrides={"task": task, "imgsz": 64})
            dataset = build_yolo_dataset(config, described[split], 4, described, mode="val")
            found |= {Path(each["im_file"]).stem: each for each in dataset.labels}
        assert len(found) == 24
        for record in pool.records():
            label = found[record.sha256]
            assert [described["names"][int(number)] for number in label["cls"][:, 0]] == [
                r["label"] for r in record.label
            ]
            size = np.array([64, 48, 64, 48])
            for row, box, segment in zip(record.label, label["bboxes"], [*label["segments"], None, None], strict=False):
                x, y, width, height = box * size
                corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
                assert corners == pytest.approx(row["box"], abs=1e-3)
                if task == "segment":
                    assert segment is not None
                    assert (segment * size[:2]).flatten().tolist() == pytest.approx(row["polygons"][0], abs=1e-3)


def test_class_folders_are_what_ultralytics_reads() -> None:
    from ultralytics.cfg import get_cfg
    from ultralytics.data.dataset import ClassificationDataset
    from ultralytics.data.utils import check_cls_dataset

    with new_pool() as (pool, folder):
        filled(pool, "classify", 24)
        rare = picture(92)  # the only one of its class, and the only one in val
        pool.add([(Record(_sha(rare), "eye", "classify", ({"label": "ant"},), "person", "ann"), rare)], 1.0)
        alone = sorted(share_of(record.sha256) for record in pool.records())
        share = share_of(_sha(rare)) + 1e-9
        export_all(pool, Wanted(model="eye"), "yolo", folder / "out", [], val_share=share)
        described = check_cls_dataset(folder / "out")
        assert described["names"] == {0: "ant", 1: "cat", 2: "dog: big"}
        truth = {record.sha256: record.label[0]["label"] for record in pool.records()}
        found = {}
        for split in ("train", "val"):
            dataset = ClassificationDataset(str(described[split]), get_cfg(overrides={"task": "classify", "imgsz": 64}))
            found |= {Path(row[0]).stem: described["names"][row[1]] for row in dataset.samples}
            assert len(dataset.samples) == sum((each < share) == (split == "val") for each in alone)
        assert found == truth


def test_boxes_in_jsonl_are_a_labelled_folder_that_training_reads() -> None:
    with new_pool() as (pool, folder):
        filled(pool, "detect")
        export_all(pool, Wanted(model="eye"), "jsonl", folder / "out", [])
        items = read_folder(folder / "out")
        assert sorted(item.sha256 for item in items) == sorted(record.sha256 for record in pool.records())
        assert items[0].boxes[1].box == (10, 20, 40, 48)
        assert items[0].provenance["who"] == "ann"


def coco(folder: Path, **changes: Any) -> Path:
    """A COCO data set as other tools make it: odd ids, a crowd, a picture without annotations."""
    (folder / "images").mkdir(parents=True)
    for name, value in (("a.png", 1), ("b.png", 2)):
        (folder / "images" / name).write_bytes(picture(value))
    size = {"width": 64, "height": 48}
    value = {
        "images": [{"id": 900, "file_name": "a.png", **size}, {"id": "b", "file_name": "b.png", **size}],
        "categories": [{"id": 17, "name": "cat"}, {"id": 90, "name": "dog"}],
        "annotations": [
            {"id": 5, "image_id": 900, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 200, "iscrowd": 0},
            {"id": 5, "image_id": 900, "category_id": 17, "bbox": [0, 0, 5, 5], "iscrowd": 1},
            {"id": 6, "image_id": 900, "category_id": 17, "bbox": [3.5, 2, 10, 20], "iscrowd": 0},
        ],
    }
    (folder / "annotations.json").write_text(json.dumps({**value, **changes}))
    return folder / "annotations.json"


def test_ids_of_any_kind_crowds_and_pictures_without_annotations(tmp_path: Path) -> None:
    with new_pool() as (pool, _):
        summary = take(pool, "coco", coco(tmp_path), rename={"dog": "hound"})
        assert (summary.read, summary.skipped) == (1, {"crowd": 1}), "a crowd's picture has not all of its boxes"
        assert summary.problems == {"label_incomplete": 1} and "1 of 3 annotations" in summary.named[0].reason
        assert [record.label for record in pool.records()] == [()]
        summary = take(pool, "coco", tmp_path / "annotations.json", rename={"dog": "hound"}, incomplete=True)
        assert (summary.read, summary.added, summary.skipped, summary.problems) == (2, 1, {"crowd": 1}, {})
        found = {record.sha256: record for record in pool.records()}
        assert found[_sha(picture(1))].label == (
            {"label": "hound", "box": [1, 2, 11, 22]}, {"label": "cat", "box": [3.5, 2, 13.5, 22]},
        )  # fmt: skip
        assert found[_sha(picture(2))].label == ()
        assert {(record.kind, record.who) for record in found.values()} == {("person", "ann")}


def annotation(**changes: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": 900, "category_id": 17, "bbox": [1, 2, 3, 4], **changes}


@pytest.mark.parametrize(
    ("changes", "place", "said"),
    [
        ({"annotations": [annotation(category_id=3)]}, "image 1 (a.png), annotation 1", "category_id 3 is none"),
        ({"annotations": [annotation(), annotation(bbox=[1, 2, 0, 4])]}, "(a.png), annotation 2", "has no area"),
        ({"annotations": [annotation(iscrowd=1), annotation(bbox=[99, 2, 9, 4])]}, "annotation 2", "is outside"),
        ({"annotations": [annotation(bbox=None)]}, "annotation 1", "bbox None"),
        ({"annotations": [annotation(bbox=["1", 2, 3, 4])]}, "annotation 1", "[x, y, width, height]"),
        ({"annotations": [annotation(image_id=3)]}, "annotation 1", "names no image"),
        ({"annotations": [7]}, "annotation 1", "names no image"),
        ({"images": [{"id": 900, "file_name": "no.png"}]}, "image 1 (no.png)", "No such file"),
        ({"images": [{"id": 900, "file_name": "../../../etc/passwd"}]}, "image 1", "leads out of"),
        ({"images": [{"id": 900, "file_name": "a.png", "width": 640, "height": 480}]}, "image 1", "has 64x48"),
        ({"images": [{"file_name": "a.png"}]}, "image 1", "`id` and `file_name`"),
        ({"images": [[]]}, "image 1", "`id` and `file_name`"),
    ],
)
def test_a_bad_record_of_coco_is_named_and_the_others_come(
    tmp_path: Path, changes: dict[str, Any], place: str, said: str
) -> None:
    more = {"id": "good", "file_name": "b.png"}
    if "images" in changes:
        changes["images"].append(more)
    with new_pool() as (pool, _):
        summary = take(pool, "coco", coco(tmp_path, **changes))
        assert any(place in each.place and said in each.reason for each in summary.named), summary.named
        records = {record.sha256: record for record in pool.records()}
        assert _sha(picture(2)) in records
        # Never is a picture taken as one where less is to be seen than its file says.
        told = [row for row in changes.get("annotations", []) if isinstance(row, dict) and row["image_id"] == 900]
        assert not told or _sha(picture(1)) not in records


def test_a_broken_import_takes_nothing_from_a_good_label(tmp_path: Path) -> None:
    with new_pool() as (pool, _):
        whole = [annotation(), annotation(bbox=[20, 2, 9, 9]), annotation(bbox=[30, 20, 9, 9])]
        take(pool, "coco", coco(tmp_path / "good", annotations=whole))
        whole[1]["category_id"] = 5
        summary = take(pool, "coco", coco(tmp_path / "broken", annotations=whole))
        assert summary.problems == {"annotation_bad": 1, "label_incomplete": 1}
        counts = {record.sha256: len(record.label) for record in pool.labelled(Wanted(model="eye")).records}
        assert counts == {_sha(picture(1)): 3, _sha(picture(2)): 0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"), ("[]", "no COCO instances file"), ('{"images": []}x', "no JSON"),
        ('{"images": [], "categories": [{"id": 1}]}', "category 1"),
        ('{"images": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "id 1 is 'a' already"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_coco_says_so(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FormatError, match=said):
        read("coco", tmp_path / "x.json", task=None, known=None, rename={})


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["mine.json"], ""),
        (["mine.json", "annotations.json"], ""),
        (["mine.json", "yours.json"], r"holds 2 COCO files \(mine.json, yours.json\): give one of them"),
        ([], "give the COCO JSON file itself"),
    ],
)
def test_the_file_of_a_folder_is_found_where_there_is_no_doubt(tmp_path: Path, names: list[str], said: str) -> None:
    content = coco(tmp_path / "made").read_bytes()
    for name in names:
        (tmp_path / name).write_bytes(content)
    if said:
        with pytest.raises(FormatError, match=said):
            read("coco", tmp_path, task=None, known=None, rename={})
    else:
        assert read("coco", tmp_path, task=None, known=None, rename={}).total == 2


def test_a_mask_in_run_lengths_is_named_and_as_boxes_it_comes(tmp_path: Path) -> None:
    both = [annotation(segmentation={"counts": "xx", "size": [48, 64]}), annotation(segmentation=[POLYGON])]
    path = coco(tmp_path, annotations=both)
    with new_pool() as (pool, _):
        assert take(pool, "coco", path).problems == {"annotation_bad": 1, "label_incomplete": 1}
        summary = take(pool, "coco", path, incomplete=True)
        assert [each.reason[:21] for each in summary.named] == ["its mask is run-lengt"]
        assert sum("polygons" in row for record in pool.records() for row in record.label) == 1
    with new_pool() as (pool, _):
        assert take(pool, "coco", path, task="detect").boxes == 2


def yolo(folder: Path, lines: str) -> Path:
    for name, value in (("a", 1), ("b", 2), ("c", 3)):
        for kind in ("images", "labels"):
            (folder / kind / "train").mkdir(parents=True, exist_ok=True)
        (folder / "images" / "train" / f"{name}.png").write_bytes(picture(value))
    (folder / "labels" / "train" / "a.txt").write_text(lines)
    (folder / "labels" / "train" / "b.txt").write_text("1 0.5 0.5 0.25 0.25\n")
    (folder / "data.yaml").write_text(yaml.safe_dump({"path": ".", "train": "images/train", "names": ["cat", "dog"]}))
    return folder


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("2 0.5 0.5 0.1 0.1", "class 2 is none"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5 is none"),
        ("nan 0.5 0.5 0.1 0.1", "class nan is none"),
        ("0 0.5 0.5 0.1", "4 columns"),
        ("0 0.5 0.5 0 0.1", "has no area"),
        ("0 5 5 0.1 0.1", "is outside"),
        ("0 x 0.5 0.1 0.1", "numbers are wanted"),
        ("0 nan 0.5 0.1 0.1", "not finite"),
        ("0 0.1 0.1 0.2 0.2 0.1 0.2 0.3", "points come in pairs"),
    ],
)
def test_a_bad_line_of_yolo_is_named_and_the_others_come(tmp_path: Path, line: str, said: str) -> None:
    with new_pool() as (pool, _):
        folder = yolo(tmp_path, f"0 0.5 0.5 0.5 0.5\n\n{line}\n1 0.25 0.25 0.5 0.5\n")
        assert take(pool, "yolo", folder, task="detect").read == 2, "its label is not all there"
        summary = take(pool, "yolo", folder, task="detect", incomplete=True)
        assert [("images/train/a.png, a.txt line 3" in p.place, said in p.reason) for p in summary.named] == [
            (True, True)
        ]
        assert (summary.read, summary.boxes, summary.classes) == (3, 3, {"cat": 1, "dog": 2})


def test_polygons_among_boxes_are_said(tmp_path: Path) -> None:
    with new_pool() as (pool, _):
        summary = take(pool, "yolo", yolo(tmp_path, "0 0.1 0.1 0.2 0.2 0.1 0.2\n"))
        assert [each.kind for each in summary.named] == ["line_bad", "label_incomplete"]
        assert "b.txt line 1" in summary.named[0].place
        assert "--task detect" in summary.named[0].reason
        assert {record.task for record in pool.records()} == {"segment"}


def test_bad_lines_of_jsonl_are_named_and_the_others_come(tmp_path: Path) -> None:
    with new_pool() as (pool, folder):
        filled(pool, "detect", 3)
        export_all(pool, Wanted(model="eye"), "jsonl", folder / "out", [])
        lines = [json.loads(line) for line in (folder / "out" / "labels.jsonl").read_text().splitlines()]
        bad = [
            "{", "[]", '"x"', "[" * 100_000, json.dumps({**lines[0], "file": "no.png"}),
            json.dumps({**lines[0], "sha256": "0" * 64}), json.dumps({**lines[0], "boxes": None}),
            json.dumps({**lines[0], "task": "sing"}), "{}", json.dumps({"prompt": "x", "text": 3}),
            json.dumps({**lines[1], "provenance": {"kind": "model", "who": "m", "confidence": 7}}),
        ]  # fmt: skip
        good = [json.dumps(lines[2]), json.dumps({"prompt": "A seven?\u2028", "text": "Yes."}, ensure_ascii=False)]
        (folder / "out" / "labels.jsonl").write_bytes("\n".join([good[0], "", *bad, good[1]]).encode() + b"\n\xff\xfe")
        with new_pool() as (other, _):
            summary = take(other, "jsonl", folder / "out")
            assert {record.task for record in other.records()} == {"detect", "text"}
            numbers = [int(each.place.split("line ")[1].split(",")[0]) for each in summary.named]
            assert numbers == [*range(3, 14), 15]
            assert sum(summary.problems.values()) == 12


def test_texts_and_the_lines_of_dataset_jsonl_come_back(tmp_path: Path) -> None:
    row = {
        "goal": "A seven?", "context_summary": "", "plan": [{"tool": "generate", "arguments": {}}],
        "execution": [{"tool": "generate", "status": "success", "output": "No."}], "summary": "Yes.",
    }  # fmt: skip
    (tmp_path / "dataset.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "{}", "text": "ä"}) + "\n")
    with new_pool() as (pool, folder):
        assert take(pool, "jsonl", tmp_path / "dataset.jsonl").added == 2
        export_all(pool, Wanted(model="eye"), "jsonl", folder / "out", [])
        lines = [json.loads(line) for line in (folder / "out" / "labels.jsonl").read_text().splitlines()]
        found = next(line for line in lines if "goal" in line)
        assert {key: found[key] for key in row} == row
        assert next((line["prompt"], line["text"]) for line in lines if "prompt" in line) == ("{}", "ä")
        assert take(pool, "jsonl", folder / "out").known == 2


@pytest.mark.parametrize("format_", ["coco", "jsonl"])
def test_a_label_that_another_tool_changed_is_no_longer_the_models(format_: str) -> None:
    with new_pool() as (pool, folder):
        data = picture(1)
        rows = ({"label": "cat", "box": [1.0, 2.0, 9.0, 9.0]},)
        said = Record(_sha(data), "eye", "detect", rows, "model", "big1", "teacher@1.0", 0.7)
        pool.add([(said, data)], 1.0)
        export_all(pool, Wanted(model="eye"), format_, folder / "out", ["cat"])
        assert take(pool, format_, folder / "out").known == 1  # as it was: nothing new is said
        file = folder / "out" / ("annotations/instances.json" if format_ == "coco" else "labels.jsonl")
        file.write_text(file.read_text().replace("[1.0, 2.0, ", "[3.0, 4.0, "))
        assert take(pool, format_, folder / "out").added == 1
        changed = next(record for record in pool.records() if record.id != said.id)
        assert (changed.kind, changed.who, changed.release) == ("person", "ann", "")


def test_an_export_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_pool() as (pool, folder):
        filled(pool, "detect")
        calls = []

        def full(path: Path, data: bytes) -> None:
            calls.append(path)
            if len(calls) > 5:
                raise OSError(28, "No space left on device", str(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

        monkeypatch.setattr("trainer.formats.yolo.put", full)
        with pytest.raises(OSError, match="No space"):
            export_all(pool, Wanted(model="eye"), "yolo", folder / "out", [])
        assert sorted(path.name for path in folder.iterdir() if "sqlite" not in path.name) == ["pool"]
        monkeypatch.undo()
        export_all(pool, Wanted(model="eye"), "yolo", folder / "out", [])
        with pytest.raises(FormatError, match="is there and not empty"):
            export_all(pool, Wanted(model="eye"), "yolo", folder / "out", [])


def test_a_damaged_object_is_named_and_left_out() -> None:
    with new_pool() as (pool, folder):
        filled(pool, "detect", 3)
        victim = pool.records()[1]
        pool.path(victim.sha256).write_bytes(b"no picture")
        summary = export_all(pool, Wanted(model="eye"), "coco", folder / "out", [])
        assert [each.place for each in summary.named] == [f"record {victim.id}"]
        assert take(pool, "coco", folder / "out").known == 2


def test_several_tasks_are_not_mixed_in_one_yolo_data_set() -> None:
    with new_pool() as (pool, folder):
        filled(pool, "detect", 2)
        data = picture(70)
        pool.add(
            [(replace(pool.records()[0], sha256=_sha(data), task="classify", label=({"label": "cat"},)), data)], 1.0
        )
        with pytest.raises(FormatError, match="classify and detect cannot be in one"):
            export_all(pool, Wanted(model="eye"), "yolo", folder / "out", [])
