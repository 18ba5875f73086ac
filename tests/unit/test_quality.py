from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from edged.wire.messages import SampleEntry
from trainer import fleet
from trainer.cli import app
from trainer.core.provenance import agree
from trainer.database import Database
from trainer.datasets import LabelledBox, LabelledImage, write_folder
from trainer.quality import Sample, report

TEACHER = {"kind": "model", "who": "srv", "release": "digits-teacher@1.0"}
SEVEN, EIGHT = {"label": "7", "box": [1, 2, 9, 9]}, {"label": "8", "box": [1, 2, 9, 9]}


def picture(number: int, dim: float = 1.0) -> bytes:
    blocks = np.random.default_rng(number).uniform(0, 255, (6, 6, 3))
    return cv2.imencode(".png", (np.kron(blocks, np.ones((8, 8, 1))) * dim).astype(np.uint8))[1].tobytes()


def sample(number: int, *label: dict[str, Any], confidence: float = 0.9, **provenance: Any) -> Sample:
    said = {**TEACHER, **provenance}
    return Sample(f"s{number}", f"{number:064x}", f"d{number % 2}", list(label), confidence, said)


def judged(*samples: Sample, pixels: dict[str, bytes] | None = None) -> dict[str, Any]:
    held = pixels or {}
    found = report(
        "digits", samples, held.get, labels=["7", "8", "9"], confidence_min=0.5, class_boxes_min=2
    )  # fmt: skip
    return json.loads(json.dumps(found.to_dict()))


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ([SEVEN], [{"label": "7", "box": [1.5, 2, 9, 9.5]}], True),
        ([SEVEN], [EIGHT], False),
        ([SEVEN], [{"label": "7", "box": [6, 2, 14, 9]}], False),
        ([SEVEN, EIGHT], [EIGHT, SEVEN], True),
        ([SEVEN], [SEVEN, {"label": "8", "box": [20, 20, 30, 30]}], False),
        ([], [], True),
        ([SEVEN], [], False),
        ([{"text": "It is  seven."}], [{"text": "it is seven."}], True),
        ([{"text": "seven"}], [{"text": "eight"}], False),
        ([{"text": "seven"}], [], False),
    ],
)
def test_what_two_labels_agree_on(first: list[Any], second: list[Any], same: bool) -> None:
    assert agree(first, second) is same
    assert agree(second, first) is same


def test_who_labelled_how_surely() -> None:
    found = judged(
        sample(1, SEVEN), sample(2, SEVEN, confidence=0.4), sample(3, EIGHT, kind="person", who="ann", release=""),
        sample(4, EIGHT, release="digits@1.2"),
    )  # fmt: skip
    assert [(row["kind"], row["who"], row["release"], row["samples"]) for row in found["provenance"]] == [
        ("model", "srv", "digits-teacher@1.0", 2), ("model", "srv", "digits@1.2", 1), ("person", "ann", "", 1),
    ]  # fmt: skip
    assert found["provenance"][0]["confidence_mean"] == 0.65
    assert (found["below_floor"], found["own_predictions"]) == (1, 1)
    assert [(row["device"], row["samples"], row["below_floor"]) for row in found["devices"]] == [
        ("d0", 2, 1), ("d1", 2, 0),
    ]  # fmt: skip


def test_disagreements_are_listed_with_both_sides() -> None:
    def said(label: dict[str, Any], confidence: float) -> list[dict[str, Any]]:
        return [{"who": "mid", "release": "mid@1.0", "status": "labelled", "confidence": confidence, "label": [label]}]

    found = judged(
        sample(1, SEVEN, opinions=said(SEVEN, 0.95)),
        sample(2, SEVEN, opinions=said(EIGHT, 0.6)),  # less sure: it asked
        sample(3, SEVEN, opinions=said(EIGHT, 0.95)),
        sample(4, SEVEN, opinions=said(EIGHT, 0.3)),  # too unsure to count
        sample(5, SEVEN, kind="person", opinions=said(EIGHT, 0.95)),  # a person has decided
        sample(5, EIGHT, who="other"),  # the same pixels again
    )
    assert (found["disagreements"], found["disputed"]) == (4, 1)
    first = found["disagreement_list"][0]
    assert (first["sample"], first["label_by"], first["other_by"], first["disputed"]) == (
        "s3", "model digits-teacher@1.0", "model mid@1.0", True,
    )  # fmt: skip


def test_classes_that_are_rare_or_absent_are_named() -> None:
    found = judged(*(sample(number, SEVEN, SEVEN) for number in range(150)), sample(151, EIGHT))
    assert found["classes"] == {
        "7": {"examples": 300, "images": 150}, "8": {"examples": 1, "images": 1}, "9": {"examples": 0, "images": 0},
    }  # fmt: skip
    assert (found["imbalance"], found["absent"], found["few"]) == (300.0, ["9"], ["8", "9"])
    assert found["too_few_to_judge"] == ["8", "9"]


def test_pictures_that_repeat_are_grouped() -> None:
    data = {f"{number:064x}": picture(number) for number in (1, 2)}
    data |= {f"{number:064x}": picture(1, dim=1 - number / 100) for number in (10, 20)}
    data[f"{3:064x}"] = b"not an image"
    found = judged(*(sample(number, SEVEN) for number in (1, 2, 3, 4, 10, 20)), pixels=data)["near_duplicates"]
    assert found == {"compared": 4, "not_compared": 2, "groups": 1, "repeats": 2, "largest": [["s1", "s10", "s20"]]}


def test_nothing_is_a_report_too() -> None:
    found = judged()
    assert (found["samples"], found["imbalance"], found["absent"]) == (0, None, ["7", "8", "9"])


TOML = """
data_dir = "data"
[models.digits]
checkpoint = "a.pt"
labels = ["7", "8"]
holdout = "target"
holdout_clean = "base"
calibration = "calibration"
"""


def test_the_command_reads_what_devices_keep_and_folders(tmp_path: Path) -> None:
    """L2: counts and quality of the samples that devices keep."""
    (tmp_path / "trainer.toml").write_text(TOML)
    database = Database(tmp_path / "data" / "trainer.sqlite")
    (tmp_path / "data" / "samples").mkdir()
    for number in (1, 2):
        data = picture(1, dim=1.0 / number)
        (tmp_path / "data" / "samples" / sha256(data).hexdigest()).write_bytes(data)
        entry = SampleEntry(
            id=f"m{number}", ts=1.0, boot="b", seq=1, sample=f"s{number}", pipeline="p", task="detect", model="digits",
            release="digits@1.0", state="labelled", sha256=sha256(data).hexdigest(), bytes=3, captured=1.0, label=[SEVEN],
            label_confidence=0.8, provenance=TEACHER,
            opinions=[
                {"who": who, "status": "labelled", "confidence": 0.9, "label": [label]}
                for who, label in (("mid", EIGHT), ("srv", SEVEN))
            ],
        )  # fmt: skip
        with database.write() as connection:
            fleet.take_sample(connection, "d1", entry)
    database.close()
    config = ["--config", str(tmp_path / "trainer.toml")]
    done = CliRunner().invoke(app, ["samples", "report", "digits", "--json", *config])
    found = json.loads(done.output)
    assert (found["samples"], found["disputed"], found["near_duplicates"]["repeats"]) == (2, 2, 1)
    shown = CliRunner().invoke(app, ["samples", "report", "digits", *config], env={"COLUMNS": "140"}).output
    assert "digits-teacher@1.0" in shown
    assert "2 classes have fewer than 300 examples: 7, 8" in shown
    data = picture(5)
    item = LabelledImage(sha256(data).hexdigest(), data, (LabelledBox("8", (1.0, 2.0, 5.0, 6.5)),), {"kind": "person"})
    write_folder(tmp_path / "folder", [item])
    done = CliRunner().invoke(
        app, ["samples", "report", "digits", "--from", str(tmp_path / "folder"), "--json", *config]
    )
    assert json.loads(done.output)["classes"]["8"] == {"examples": 1, "images": 1}
    assert CliRunner().invoke(app, ["samples", "report", "nosuch", *config]).exit_code == 1
