"""A person's review: written for people and Label Studio, taken back as that person's word, all of what can be read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from trainer.core.labels import Task
from trainer.database import Database
from trainer.formats.base import FormatError
from trainer.pool import Pool, PoolError, Record, Wanted
from trainer.review import judge, take_review, write_review

ROWS: dict[Task, tuple[dict[str, Any], ...]] = {
    "detect": ({"label": "cat", "box": [3.0, 5.0, 31.0, 41.0]}, {"label": "dog", "box": [0.0, 0.0, 64.0, 48.0]}),
    "segment": ({"label": "cat", "polygons": [[3.0, 5.0, 31.0, 5.5, 30.0, 41.0]], "box": [3.0, 5.0, 31.0, 41.0]},),
    "classify": ({"label": "cat"},),
    "text": ({"text": "Yes,\nit is."},),
}
SHOWN = {"detect": "rectanglelabels", "segment": "polygonlabels", "classify": "choices", "text": "textarea"}


def picture(value: int) -> bytes:
    return cv2.imencode(".png", np.full((48, 64, 3), value, np.uint8))[1].tobytes()


def filled(folder: Path, task: Task = "detect", count: int = 6) -> tuple[Pool, list[Record]]:
    from hashlib import sha256

    pool = Pool(Database(folder / "trainer.sqlite"), folder / "pool")
    items = []
    for value in range(count):
        data = f"=A seven? {value}".encode() if task == "text" else picture(value)
        digest = sha256(data).hexdigest()
        sure = 0.9 - value / 10
        items.append((Record(digest, "eye", task, ROWS[task], "model", "big1", "teacher@1.0", sure), data))
    pool.add(items, 1.0)
    return pool, [record for record, _ in items]


def sheet(path: Path) -> list[dict[str, str]]:
    with (path / "review.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fill(path: Path, rows: list[dict[str, str]]) -> None:
    with (path / "review.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_sheet_goes_out_least_sure_first_and_its_verdicts_come_back(tmp_path: Path) -> None:
    pool, records = filled(tmp_path)
    assert write_review(pool, Wanted(model="eye", confidence_max=0.8), tmp_path / "r", limit=4) == 4
    rows = sheet(tmp_path / "r")
    assert [row["id"] for row in rows] == [record.id for record in records[:1:-1]]
    assert (tmp_path / "r" / "images" / rows[0]["file"]).read_bytes() == pool.read(records[5].sha256)
    rows[0]["verdict"] = "accept"
    rows[1] |= {"verdict": "Correct", "label": json.dumps([{"label": "cat", "box": [1, 2, 9, 9]}])}
    rows[2]["verdict"] = "reject"
    fill(tmp_path / "r", rows)
    told = take_review(pool, tmp_path / "r", "ann", known=["cat", "dog"], clock=lambda: 7.0)
    assert (told.accepted, told.corrected, told.rejected, told.open, told.problems) == (1, 1, 1, 1, [])
    chosen = pool.labelled(Wanted(model="eye"))
    by_hash = {record.sha256: record for record in chosen.records}
    assert chosen.left_out == {"rejected": 1}
    assert records[3].sha256 not in by_hash
    accepted, corrected, still = (by_hash[records[n].sha256] for n in (5, 4, 2))
    assert (accepted.kind, accepted.who, accepted.confidence, accepted.label) == ("person", "ann", 1.0, ROWS["detect"])
    assert corrected.label == ({"label": "cat", "box": [1, 2, 9, 9]},)
    assert (corrected.kind, corrected.said, still.kind) == ("person", 7.0, "model")
    again = take_review(pool, tmp_path / "r", "ann", clock=lambda: 8.0)
    assert again.accepted == 1
    assert len(pool.records(Wanted(verdict=""))) == 9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verdict": "maybe"}, "'maybe': use accept, correct, reject"),
        ({"verdict": "correct", "label": "[{"}, "label: "),
        ({"verdict": "correct", "label": "7"}, "a list of objects"),
        ({"verdict": "correct", "label": '[{"label": "owl", "box": [1, 2, 3, 4]}]'}, "'owl' is none of cat, dog"),
        ({"verdict": "correct", "label": '[{"label": "cat", "box": [1, 2, 1, 4]}]'}, "has no area"),
        ({"verdict": "accept", "label": "[]"}, "label was changed: say correct"),
        ({"verdict": "accept", "id": "nobody"}, "'nobody' is not in the pool"),
    ],
)
def test_a_bad_row_is_named_and_the_others_count(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    pool, _ = filled(tmp_path, count=3)
    write_review(pool, Wanted(model="eye"), tmp_path / "r", limit=9)
    rows = [{**row, "verdict": "accept"} for row in sheet(tmp_path / "r")]
    rows[1] |= changes
    fill(tmp_path / "r", rows)
    told = take_review(pool, tmp_path / "r", "ann", known=["cat", "dog"])
    assert [("line 3" in each.place, said in each.reason) for each in told.problems] == [(True, True)], told.problems
    assert told.accepted == 2


def exported(task: dict[str, Any], result: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A task as Label Studio exports it after an annotation."""
    annotation = {"completed_by": {"email": "ann@plant"}, "was_cancelled": False, "result": result, **more}
    return {"id": 7, "data": task["data"], "annotations": [annotation], "predictions": []}


@pytest.mark.parametrize("kind", list(ROWS))
def test_label_studio_gets_tasks_and_its_export_comes_back(tmp_path: Path, kind: Task) -> None:
    pool, records = filled(tmp_path, kind, 5)
    write_review(pool, Wanted(model="eye"), tmp_path / "r", ["cat", "dog"], limit=9)
    tasks = json.loads((tmp_path / "r" / "tasks.json").read_text())
    assert 'toName="' in (tmp_path / "r" / "labels.xml").read_text()
    results = tasks[0]["predictions"][0]["result"]
    assert {each["type"] for each in results} == {SHOWN[kind]}
    if kind == "detect":
        sides = {"x": 3 / 0.64, "y": 5 / 0.48, "width": 28 / 0.64, "height": 36 / 0.48, "rotation": 0}
        value = results[0]["value"]
        assert value["rectanglelabels"] == ["cat"]
        assert {key: value[key] for key in sides} == pytest.approx(sides)
        assert (results[0]["original_width"], results[0]["original_height"]) == (64, 48)
    if kind == "text":
        assert tasks[0]["data"]["text"].startswith("=A seven?")
    else:
        assert tasks[0]["data"]["image"] == f"/data/local-files/?d=images/{tasks[0]['data']['record']}.png"

    wrong = {"from_name": "verdict", "to_name": "image", "type": "choices", "value": {"choices": ["reject"]}}
    other = [{**results[0], "value": _other(kind, results[0]["value"])}]
    back = [
        exported(tasks[0], results), exported(tasks[1], other), exported(tasks[2], [*results, wrong]),
        exported(tasks[3], [], was_cancelled=True), {**exported(tasks[4], []), "annotations": []},
        {"data": {"record": "nobody"}, "annotations": []}, 7,
    ]  # fmt: skip
    (tmp_path / "export.json").write_text(json.dumps(back))
    told = take_review(pool, tmp_path / "export.json", "bob")
    assert (told.accepted, told.corrected, told.rejected, told.open) == (1, 1, 1, 2)
    assert [each.place for each in told.problems] == ["export.json, task 6", "export.json, task 7"]
    persons = {record.sha256: record for record in pool.records(Wanted(kind="person"))}
    assert {record.who for record in persons.values()} == {"ann@plant"}
    accepted = persons[next(r.sha256 for r in records if r.id == tasks[0]["data"]["record"])]
    assert len(accepted.label) == len(ROWS[kind])


def _other(kind: Task, value: dict[str, Any]) -> dict[str, Any]:
    if kind == "text":
        return {"text": ["No."]}
    return {**value, SHOWN[kind]: ["dog"]}


def test_a_box_that_is_turned_is_named(tmp_path: Path) -> None:
    pool, _ = filled(tmp_path, count=1)
    write_review(pool, Wanted(model="eye"), tmp_path / "r", limit=9)
    (task,) = json.loads((tmp_path / "r" / "tasks.json").read_text())
    task["predictions"][0]["result"][0]["value"]["rotation"] = 30
    (tmp_path / "x.json").write_text(json.dumps([exported(task, task["predictions"][0]["result"])]))
    told = take_review(pool, tmp_path / "x.json", "ann")
    assert "turned by 30 degrees" in told.problems[0].reason


def test_by_id_all_or_none(tmp_path: Path) -> None:
    pool, records = filled(tmp_path, count=3)
    with pytest.raises(PoolError, match="'nobody' is not in the pool"):
        judge(pool, [records[0].id, "nobody"], [], "ann", 2.0)
    with pytest.raises(PoolError, match="accepted and rejected"):
        judge(pool, [records[0].id], [records[0].id], "ann", 2.0)
    assert pool.records(Wanted(kind="person", verdict="")) == []
    judge(pool, [records[0].id], [records[1].id], "ann", 2.0)
    assert pool.labelled(Wanted(model="eye")).left_out == {"rejected": 1}


def test_what_cannot_be_reviewed_says_so(tmp_path: Path) -> None:
    pool, _ = filled(tmp_path, count=1)
    with pytest.raises(FormatError, match="no such label"):
        write_review(pool, Wanted(model="ear"), tmp_path / "r", limit=9)
    (tmp_path / "x.csv").write_text("id,label\n")
    with pytest.raises(FormatError, match="column verdict is missing"):
        take_review(pool, tmp_path / "x.csv", "ann")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(FormatError, match="a list of tasks"):
        take_review(pool, tmp_path / "x.json", "ann")
