"""Own data in, a look at it, and out again or into a training, by the commands that a person types."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from edged.wire.manifest import TrainingManifest
from tests.support.models import make_release
from trainer.cli import app
from trainer.config import load_config
from trainer.database import Database
from trainer.datasets import read_folder, select_samples
from trainer.pool import Pool, Wanted
from trainer.pool_sets import labelled_images

CONFIG = """
name = "host"
data_dir = "data"
[models.toy]
checkpoint = "missing.pt"
labels = ["cat", "dog"]
imgsz = 32
holdout = "h"
holdout_clean = "hc"
calibration = "c"
"""


class Shell:
    """A folder with a configuration, and the program."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "trainer.toml"
        self.config.write_text(CONFIG)

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--config", str(self.config)])

    def told(self, *arguments: str) -> Any:
        done = self.run(*arguments, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    @property
    def pool(self) -> Pool:
        config = load_config(self.config)
        return Pool(Database(config.database_at), config.pool)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def picture(value: int) -> bytes:
    return cv2.imencode(".jpg", np.full((48, 64, 3), value * 20, np.uint8))[1].tobytes()


def coco(folder: Path, count: int = 5, *, owls: bool = False) -> Path:
    """A data set of another tool; with owls, every picture has one too, which is no class of the model."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for value in range(count):
        (folder / "images" / f"{value}.jpg").write_bytes(picture(value))
        images.append({"id": value + 100, "file_name": f"{value}.jpg", "width": 64, "height": 48})
        for number, category in enumerate((3, 7, 8) if owls else (3, 7)):
            box = [4 + value, 5 + number, 20, 30]
            annotations.append({"id": len(annotations), "image_id": value + 100, "category_id": category, "bbox": box})
    names = [{"id": 3, "name": "cat"}, {"id": 7, "name": "Hund"}, {"id": 8, "name": "owl"}]
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": names}))
    return file


COCO = ("--format", "coco", "--model", "toy")


def test_coco_goes_in_is_shown_and_goes_out_in_every_format(shell: Shell) -> None:
    file = coco(shell.folder / "own", owls=True)
    given = (str(file), *COCO, "--rename", "Hund=dog", "--who", "ann", "--device", "cam1")
    refused = shell.run("samples", "import", *given)
    assert refused.exit_code == 1 and "nothing could be taken in" in refused.stderr, "each picture has an owl too"
    assert "--allow-incomplete" in refused.stderr
    done = shell.run("samples", "import", *given, "--allow-incomplete")
    assert done.exit_code == 0, done.output
    assert "instances.json, image 1 (0.jpg), annotation 3: label 'owl' is none of cat, dog" in done.stderr
    assert "added: 5" in done.stdout
    assert "problems: {'annotation_bad': 5}" in done.stdout
    again = shell.told("samples", "import", str(file.parent), *given[1:9], "--allow-incomplete")
    assert (again["added"], again["known"], again["classes"]) == (0, 5, {"cat": 5, "dog": 5})
    assert len(again["named"]) == 5

    rows = shell.told("samples", "list", "--pool", "--class", "dog", "--device", "cam1", "--limit", "3")
    assert [len(row["label"]) for row in rows] == [2, 2, 2]
    assert "person" in shell.run("samples", "list", "--pool").stdout
    for format_ in ("coco", "yolo", "jsonl"):
        out = shell.folder / format_
        told = shell.told("samples", "export", str(out), "--format", format_, "--model", "toy")
        assert (told["read"], told["boxes"], told["problems"]) == (5, 10, {})
        back = shell.told("samples", "import", str(out), "--format", format_, "--model", "other", "--labels", "*")
        # YOLO has no place for who labelled: his word, without his name, is another's.
        assert (back["added"], back["known"]) == ((0, 5) if format_ == "jsonl" else (5, 0))
        assert back["classes"] == {"cat": 5, "dog": 5}


def test_what_judges_goes_into_a_folder_and_can_be_frozen(shell: Shell) -> None:
    """And not into the pool, from where it would train."""
    file, out = coco(shell.folder / "own"), shell.folder / "offered"
    told = shell.told("samples", "import", str(file), *COCO, "--rename", "Hund=dog", "--who", "ann", "--to", str(out))
    assert (told["added"], told["classes"], told["named"]) == (5, {"cat": 5, "dog": 5}, [])
    assert shell.told("samples", "list", "--pool") == []
    items = read_folder(out)
    assert [len(item.boxes) for item in items] == [2] * 5
    assert {(item.provenance["kind"], item.provenance["who"]) for item in items} == {("person", "ann")}
    assert shell.told("holdout", "freeze", "toy", "--from", str(out))["added"] == 5
    assert "not empty" in shell.run("samples", "import", str(file), *COCO, "--to", str(out)).output


def test_the_report_reads_the_pool(shell: Shell) -> None:
    shell.told("samples", "import", str(coco(shell.folder / "own")), *COCO, "--rename", "Hund=dog", "--who", "ann")
    told = shell.told("samples", "report", "toy", "--pool")
    assert (told["samples"], told["provenance"][0]["who"]) == (5, "ann")
    assert shell.told("samples", "report", "toy")["samples"] == 0
    assert "choose one" in shell.run("samples", "report", "toy", "--pool", "--from", "elsewhere").output


def test_what_is_in_the_pool_trains_by_a_manifest(shell: Shell) -> None:
    shell.told("samples", "import", str(coco(shell.folder / "own")), *COCO, "--rename", "Hund=dog", "--who", "ann")
    assert "no release of it is registered" in shell.run("samples", "manifest", "m.json", "--model", "toy").stderr
    make_release(shell.folder / "toy-1.0")
    assert shell.run("release", "add", str(shell.folder / "toy-1.0")).exit_code == 0
    out = shell.folder / "m.json"
    told = shell.told("samples", "manifest", str(out), "--model", "toy", "--copy-to", str(shell.folder / "pixels"))
    assert (told["source"], told["target"], told["count"], told["left_out"]) == ("toy@1.0", "toy@1.1", 5, {})

    manifest = TrainingManifest.model_validate_json(out.read_bytes())
    for folder in (shell.folder / "pixels", shell.pool.objects):
        chosen = select_samples(
            manifest, folder, labels=["cat", "dog"], confidence_min=0.5, held_out=frozenset(), calibration_share=0.0
        )
        assert chosen.left_out == {}
        assert {item.data for item in chosen.training} == {picture(value) for value in range(5)}
        assert {box.label for item in chosen.training for box in item.boxes} == {"cat", "dog"}
        assert {item.provenance["who"] for item in chosen.training} == {"ann"}
    planned = shell.run("train", "--model", "toy", "--manifest", str(out), "--samples", told["samples"], "--dry-run")
    assert json.loads(planned.stdout)["samples_usable"] == 5
    assert "models.toy.checkpoint" in planned.stderr, "this test makes no checkpoint"

    # What a person rejects, and what nobody is sure of, does not train.
    ids = [sample.id for sample in manifest.samples]
    assert shell.told("samples", "review", "--reject", ids[0], "--reject", ids[1], "--who", "bob")["rejected"] == 2
    again = shell.told("samples", "manifest", str(out), "--model", "toy")
    assert (again["count"], again["left_out"]) == (3, {"rejected": 2})
    assert again["job"] != told["job"]
    images = labelled_images(shell.pool, Wanted(model="toy"), labels=["cat"])
    assert (images.items, images.left_out) == ([], {"rejected": 2, "unknown_label": 3})
    images = labelled_images(shell.pool, Wanted(model="toy"), labels=["cat", "dog"])
    assert [item.sha256 for item in images.items] == [sha256(item.data).hexdigest() for item in images.items]
    assert {item.provenance["kind"] for item in images.items} == {"person"}


def test_labels_of_another_task_are_in_no_manifest(shell: Shell) -> None:
    """An outline is no box: of the same pictures the segmenter's label would take the box's place."""
    file = coco(shell.folder / "own")
    shell.told("samples", "import", str(file), *COCO, "--rename", "Hund=dog", "--who", "ann")
    told = json.loads(file.read_text())
    for each in told["annotations"]:
        each["segmentation"] = [[4, 5, 24, 5, 24, 35]]
    file.write_text(json.dumps(told))
    given = ("--rename", "Hund=dog", "--who", "ann", "--task", "segment")
    assert shell.told("samples", "import", str(file), *COCO, *given)["added"] == 5
    make_release(shell.folder / "toy-1.0")
    assert shell.run("release", "add", str(shell.folder / "toy-1.0")).exit_code == 0
    out = shell.folder / "m.json"
    made = shell.told("samples", "manifest", str(out), "--model", "toy")
    assert (made["count"], made["left_out"]) == (5, {"other_task": 5})
    rows = [row for sample in json.loads(out.read_text())["samples"] for row in sample["label"]["boxes"]]
    assert len(rows) == 10 and not any("polygons" in row for row in rows)


def test_a_classification_trains_as_a_box_around_the_picture(shell: Shell) -> None:
    for value, name in enumerate(("cat", "dog")):
        (shell.folder / "own" / "train" / name).mkdir(parents=True)
        (shell.folder / "own" / "train" / name / "x.jpg").write_bytes(picture(value))
    own = str(shell.folder / "own")
    told = shell.told("samples", "import", own, "--format", "yolo", "--model", "toy", "--task", "classify")
    assert told["classes"] == {"cat": 1, "dog": 1}
    items = labelled_images(shell.pool, Wanted(model="toy")).items
    assert {(box.label, box.box) for item in items for box in item.boxes} == {
        ("cat", (0, 0, 64, 48)), ("dog", (0, 0, 64, 48)),
    }  # fmt: skip


def test_a_review_by_sheet(shell: Shell) -> None:
    source = ("--kind", "model", "--release", "teacher@3.0", "--confidence", "0.6")
    shell.told("samples", "import", str(coco(shell.folder / "own")), *COCO, "--rename", "Hund=dog", *source)
    out = str(shell.folder / "review")
    assert shell.told("samples", "review", "--out", out, "--model", "toy", "--limit", "3")["count"] == 3
    sheet = shell.folder / "review" / "review.csv"
    sheet.write_text(sheet.read_text().replace('"""dog""', '"""dog""').replace(']",', ']",accept', 2))
    told = shell.told("samples", "review", "--take", out, "--who", "ann", "--model", "toy")
    assert (told["accepted"], told["open"], told["problems"]) == (2, 1, 0)
    assert {row["who"] for row in shell.told("samples", "list", "--pool")} == {"teacher@3.0", "ann"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["import", "nowhere", *COCO], "nowhere does not exist"),
        (["import", ".", "--format", "voc", "--model", "toy"], "--format voc: use one of coco, yolo, jsonl"),
        (["import", ".", "--format", "coco", "--model", "eye"], "--model eye: configured are toy; add [models.eye]"),
        (["import", ".", *COCO, "--task", "classify"], "cannot hold task 'classify': it holds detect, segment"),
        (["import", ".", *COCO, "--task", "sing"], "--task sing: use one of detect, segment, classify, text"),
        (["import", ".", *COCO, "--rename", "x"], "--rename x: use OLD=NEW"),
        (["import", ".", *COCO, "--kind", "model"], "--kind model: say which one"),
        (["import", ".", *COCO, "--kind", "dog"], "--kind dog: use person or model"),
        (["review"], "give one of --out FOLDER, --take FILE"),
        (["review", "--accept", "nobody"], "label 'nobody' is not in the pool: `trainer samples list --pool`"),
        (["review", "--out", "x", "--model", "toy"], "the pool has no such label"),
        (["list", "--pool", "--state", "used"], "--state used: in the pool a label is labelled or rejected"),
        (["pull"], "which ones?"),
        (["pull", "--model", "toy"], "no device has told of a labelled sample like that"),
        (["manifest", "m.json", "--model", "eye"], "models.eye: no such model; configured: toy"),
        (["export", "out", "--format", "coco", "--model", "none"], "the pool has no such label to write"),
    ],
)
def test_what_cannot_be_done_names_the_thing_and_the_fix(shell: Shell, arguments: list[str], said: str) -> None:
    done = shell.run("samples", *arguments)
    assert done.exit_code == 1
    assert said in done.stderr, done.output


def test_a_review_of_which_nothing_can_be_taken_is_a_failure(shell: Shell) -> None:
    (shell.folder / "review.csv").write_text("id,file,label,verdict\nnobody,x.png,[],accept\n")
    done = shell.run("samples", "review", "--take", str(shell.folder / "review.csv"), "--who", "ann", "--model", "toy")
    assert done.exit_code == 1
    assert "nothing could be taken" in done.stderr


@pytest.mark.parametrize(("limit", "name"), [("PICTURE_BYTES_MAX", "0.jpg"), ("DATA_BYTES_MAX", "instances.json")])
def test_a_file_that_is_too_large_is_named(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, limit: str, name: str
) -> None:
    file = coco(shell.folder / "own")
    monkeypatch.setattr(f"trainer.formats.base.{limit}", 100)
    done = shell.run("samples", "import", str(file), *COCO, "--rename", "Hund=dog")
    assert done.exit_code == 1
    assert f"{name}: larger than 100 bytes" in done.stderr


def test_nothing_that_could_be_taken_in_is_a_failure(shell: Shell) -> None:
    (shell.folder / "labels.jsonl").write_text("{\n")
    done = shell.run("samples", "import", str(shell.folder), "--format", "jsonl", "--model", "toy")
    assert done.exit_code == 1
    assert "labels.jsonl, line 1: no JSON" in done.stderr
    assert "nothing could be taken in" in done.stderr
