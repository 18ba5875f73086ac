"""Labels of images by kind of model: outlines for a segmenter, one class for a classifier; and which of them stop a
training."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from edged.wire.manifest import TrainingManifest, TrainingSample
from tests.unit.test_training_sets import hashes, image, job
from trainer.average_precision import filled
from trainer.cli import app
from trainer.config import ConfigError, Model, load_config
from trainer.core.split import SplitRules, held_back
from trainer.datasets import (
    DatasetError,
    LabelledBox,
    LabelledImage,
    frozen_hash,
    hold_back,
    read_folder,
    select_samples,
    shuffle_labels,
    write_folder,
)
from trainer.jobfile import dataset_job
from trainer.kinds.vision_sets import examples, read_sets
from trainer.shapes import outline

SQUARE = (2.0, 2.0, 10.0, 2.0, 10.0, 10.0, 2.0, 10.0)
SMALL = (20.0, 4.0, 26.0, 4.0, 23.0, 12.0)
OVER = (6.0, 6.0, 14.0, 6.0, 14.0, 14.0, 6.0, 14.0)  # over a corner of SQUARE


def labelled(value: int, *boxes: LabelledBox) -> LabelledImage:
    data = cv2.imencode(".png", np.full((16, 32, 3), value, np.uint8))[1].tobytes()
    return LabelledImage(sha256(data).hexdigest(), data, boxes, {"kind": "person", "who": "ann"})


def shaped(label: str, *polygons: tuple[float, ...]) -> LabelledBox:
    xs, ys = [x for each in polygons for x in each[0::2]], [y for each in polygons for y in each[1::2]]
    return LabelledBox(label, (min(xs), min(ys), max(xs), max(ys)), polygons)


def test_outlines_go_from_the_folder_to_the_truth_and_to_the_tuner(tmp_path: Path) -> None:
    items = [labelled(1, shaped("a", SQUARE), shaped("b", SMALL)), labelled(2)]
    write_folder(tmp_path, items)
    assert read_folder(tmp_path) == items
    truth = read_folder(tmp_path)[0].decode(["a", "b"], "segment")
    assert truth.outlines is not None
    assert [each.reshape(-1).tolist() for each in truth.outlines] == [list(SQUARE), list(SMALL)]
    assert items[1].decode(["a", "b"], "segment").outlines == ()  # a picture of nothing
    settings = model(tmp_path, kind="segment")
    first, second = examples(items, settings, frozenset({items[1].sha256}))
    assert first.outlines is not None
    assert [np.asarray(each).reshape(-1).tolist() for each in first.outlines] == [list(SQUARE), list(SMALL)]
    assert (np.asarray(first.classes).tolist(), first.replay, second.replay) == ([0, 1], False, True)


@pytest.mark.parametrize("parts", [(SQUARE, SMALL), (SQUARE, OVER), (SQUARE, SMALL, OVER)])
def test_an_object_in_parts_is_all_of_them(parts: tuple[tuple[float, ...], ...]) -> None:
    """Parts that lie over each other are no hole, though outlines are filled by the even-odd rule."""
    wanted = np.maximum.reduce([filled(np.array(each), (16, 32)) for each in parts])
    assert np.array_equal(filled(outline(parts, (16, 32)), (16, 32)), wanted)


def test_a_moved_outline_moves_its_box(tmp_path: Path) -> None:
    write_folder(tmp_path, [labelled(1, shaped("a", SQUARE))])
    path = tmp_path / "labels.jsonl"
    row = json.loads(path.read_text())
    row["boxes"][0]["polygons"] = [SMALL]
    path.write_text(json.dumps(row))
    assert read_folder(tmp_path)[0].boxes[0].box == (20.0, 4.0, 26.0, 12.0)


def test_the_identity_of_a_set_knows_its_outlines() -> None:
    """Or whoever moves the outlines of a frozen holdout moves the gate."""
    one, other = (labelled(1, LabelledBox("a", (2, 2, 26, 12), parts)) for parts in ((SQUARE,), (SMALL,)))
    bare = labelled(1, LabelledBox("a", (2, 2, 26, 12)))
    assert len({frozen_hash([item]) for item in (one, other, bare)}) == 3


@pytest.mark.parametrize(
    ("boxes", "kind", "said"),
    [
        ([LabelledBox("a", (1, 1, 5, 5)), shaped("b", SMALL)], "segment", "1 of 2 boxes have no polygon"),
        ([], "classify", "0 labels; a classifier's image has exactly one"),
        ([LabelledBox("a", (1, 1, 5, 5)), LabelledBox("b", (1, 1, 5, 5))], "classify", "2 labels"),
    ],
)
def test_a_label_of_another_kind_is_named(boxes: list[LabelledBox], kind: Any, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        labelled(1, *boxes).decode(["a", "b"], kind)


@pytest.mark.parametrize("polygon", [[1, 1, 5, 5], [1, 1, 5, 5, 9, 9], [1, 1, 5, 1, 5], [1, 1, 5, 1, float("nan"), 5]])
def test_a_polygon_without_area_is_named(tmp_path: Path, polygon: list[float]) -> None:
    write_folder(tmp_path, [labelled(1, shaped("a", SQUARE))])
    row = json.loads((tmp_path / "labels.jsonl").read_text())
    row["boxes"][0]["polygons"] = [polygon]
    (tmp_path / "labels.jsonl").write_text(json.dumps(row))
    with pytest.raises(DatasetError, match=r"labels\.jsonl, line 1: ValueError: polygon of \d numbers has no area"):
        read_folder(tmp_path)


def selected(tmp_path: Path, kind: Any, label: list[dict[str, Any]]) -> tuple[list[LabelledImage], dict[str, int]]:
    item = labelled(1)
    (tmp_path / item.sha256).write_bytes(item.data)
    sample = TrainingSample(
        id="s", device="d", sha256=item.sha256, label={"boxes": label, "confidence": 0.9},
        provenance={"kind": "model", "who": "big", "release": "big@1.0"},
    )  # fmt: skip
    manifest = TrainingManifest(
        job="j", model="eye", source="eye@1.0", target="eye@1.1", created="", config={}, samples=[sample]
    )
    found = select_samples(
        manifest, tmp_path, labels=["a", "b"], confidence_min=0.5, held_out=frozenset(), calibration_share=0, kind=kind
    )
    return found.training, found.left_out


def test_a_box_without_an_outline_does_not_train_a_segmenter(tmp_path: Path) -> None:
    bare = {"label": "a", "box": [2, 2, 10, 10]}
    assert selected(tmp_path, "segment", [bare]) == ([], {"no_outline": 1})
    assert selected(tmp_path, "detect", [bare])[1] == {}
    trained, left_out = selected(tmp_path, "segment", [{**bare, "polygons": [SQUARE]}])
    assert (trained[0].boxes[0].polygons, left_out) == ((SQUARE,), {})


def test_of_a_teachers_answer_the_best_class_is_meant(tmp_path: Path) -> None:
    """A classifier answers with its best labels, each around the whole picture."""
    rows = [{"label": name, "box": [0, 0, 32, 16], "score": score} for name, score in (("b", 0.3), ("a", 0.6))]
    trained, left_out = selected(tmp_path, "classify", rows)
    assert (left_out, trained[0].boxes) == ({}, (LabelledBox("a", (0, 0, 32, 16)),))
    assert selected(tmp_path, "classify", []) == ([], {"unusable": 1})


def test_class_folders_become_the_labelled_folder_of_a_classifier(tmp_path: Path) -> None:
    """The README's way: what judges is imported into a folder, what trains is named by a data set."""
    for name, value in (("cat", 10), ("cat", 60), ("dog", 200)):
        (tmp_path / "own" / name).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "own" / name / f"{value}.png"), np.full((8, 12, 3), value, np.uint8))
    config = tmp_path / "trainer.toml"
    config.write_text(
        f'data_dir = "{tmp_path}/data"\n[models.pets]\nkind = "classify"\ncheckpoint = "c.pt"\nlabels = ["cat", "dog"]\n'
        'holdout = "h"\nholdout_clean = "hc"\ncalibration = "c"\n'
    )
    arguments = ["samples", "import", str(tmp_path / "own"), "--format", "yolo", "--model", "pets", "--who", "ann"]
    done = CliRunner().invoke(app, [*arguments, "--to", str(tmp_path / "out"), "--config", str(config)])
    assert done.exit_code == 0, done.output
    items = [item.decode(["cat", "dog"], "classify") for item in read_folder(tmp_path / "out")]
    assert sorted(int(item.classes[0]) for item in items) == [0, 0, 1]
    assert all(item.boxes.tolist() == [[0, 0, 12, 8]] for item in items)
    from tests.support.models import make_release
    from trainer.releases import Registry

    make_release(tmp_path / "r", "pets@1.0", 1)
    text = (tmp_path / "r" / "release.json").read_text()
    (tmp_path / "r" / "release.json").write_text(text.replace('"detect"', '"classify"'))
    Registry(tmp_path / "data" / "releases").register(tmp_path / "r")
    made = dataset_job(load_config(config), "pets", "yolo", tmp_path / "out", tmp_path / "run", created="", job="j")
    assert sorted(sample.label["boxes"][0]["label"] for sample in made.manifest.samples) == ["cat", "cat", "dog"]


def model(folder: Path, **keys: Any) -> Model:
    paths = {name: folder / name for name in ("checkpoint", "holdout", "holdout_clean", "calibration")}
    return Model.model_validate({**paths, "labels": ["a", "b"], **keys})


UNITS = [f"cam\0{n // 10}" for n in range(100)]


@pytest.mark.parametrize(
    ("units", "share", "count"),
    [
        (UNITS, 0.1, 10), (UNITS, 0.25, 30), (UNITS[:20], 0.01, 10), (UNITS[:10], 0.5, 0), ([], 0.1, 0),
        (["a"] * 80 + ["b"] * 20, 0.1, 20), ([str(n) for n in range(50)], 0.1, 5),
    ],
)  # fmt: skip
def test_whole_units_are_held_back(units: list[str], share: float, count: int) -> None:
    rows = held_back(units, share)
    assert len(rows) == count
    chosen = {units[row] for row in rows}
    assert chosen.isdisjoint(name for row, name in enumerate(units) if row not in rows)
    backwards = held_back(units[::-1], share)
    assert {units[::-1][row] for row in backwards} == chosen  # in whatever order they come


def test_what_is_nearly_trained_on_stops_nothing() -> None:
    """Pictures that are nearly the same stay together: they all train."""
    same = [image(120, compression) for compression in range(10)]
    trains, stops = hold_back(same, 0.3, SplitRules())
    assert (len(trains), stops) == (10, [])


def test_a_camera_holds_back_other_minutes_than_it_trains_on() -> None:
    items = []
    for number in range(120):
        data = cv2.imencode(".png", np.full((8, 8, 3), 2 * number + 5, np.uint8))[1].tobytes()
        said = {"device": "cam", "captured": 1_700_000_000.0 + 15 * number}
        items.append(LabelledImage(sha256(data).hexdigest(), data, (), said))
    trains, stops = hold_back(items, 0.2, SplitRules(block_s=60.0))
    minutes = [{item.provenance["captured"] // 60 for item in each} for each in (trains, stops)]
    assert 10 <= len(stops) <= 30
    assert not minutes[0] & minutes[1]
    assert hold_back(items[::-1], 0.2, SplitRules(block_s=60.0))[1] == stops[::-1]


def test_what_stops_a_training_is_of_the_training_side_alone(tmp_path: Path) -> None:
    task, settings = job(tmp_path, [image(value) for value in range(100, 200, 2)])
    plain = read_sets(task, settings)
    assert (plain.validation, plain.validation_replay) == ([], [])
    sets = read_sets(task, settings.model_copy(update={"patience": 3, "validation_share": 0.3}))
    stops = hashes(sets.validation)
    assert len(stops) >= 3
    assert stops | hashes(sets.selected.training) == hashes(plain.selected.training)
    assert hashes(sets.calibration) == hashes(plain.calibration)
    old = hashes(sets.validation_replay)
    assert old
    judges = hashes(sets.target) | hashes(sets.base) | hashes(sets.calibration)
    assert not (stops | old) & (judges | hashes(sets.selected.training) | hashes(sets.replay))


def test_what_was_trained_on_before_and_comes_again_trains_once(tmp_path: Path) -> None:
    """Devices send pictures of the replay's folder again."""
    task, settings = job(tmp_path, [image(value) for value in range(30, 60)])
    settings = settings.model_copy(update={"patience": 3, "validation_share": 0.4, "calibration_share": 0.1})
    sets = read_sets(task, settings)
    parts = [sets.selected.training, sets.validation, sets.replay, sets.validation_replay]
    assert sets.selected.training and sets.validation
    assert sum(map(len, parts)) == len(set().union(*map(hashes, parts)))


def test_shuffled_labels_take_their_outlines_along() -> None:
    items = [labelled(value, shaped("a", SQUARE)) for value in range(3)] + [labelled(9, shaped("b", SMALL))]
    mixed = shuffle_labels(items, 1)
    assert sorted(item.boxes[0].polygons for item in mixed) == sorted(item.boxes[0].polygons for item in items)
    assert [item.sha256 for item in mixed] == [item.sha256 for item in items]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ('kind = "pose"', r"models\.eye\.kind = 'pose'.*use one of the values named"),
        ('method = "all"', r"models\.eye\.method = 'all'.*use one of the values named"),
        ('device = "gpu"', r"models\.eye\.device = 'gpu': use \"auto\", \"cpu\", \"cuda\" or \"cuda:NUMBER\""),
        ("patience = -1", r"models\.eye\.patience = '-1'.*use a larger number"),
        ("validation_share = 0.6", r"models\.eye\.validation_share = '0\.6'.*use a smaller number"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, keys: str, said: str) -> None:
    (tmp_path / "trainer.toml").write_text(
        f'[models.eye]\ncheckpoint = "c"\nlabels = ["a"]\nholdout = "h"\nholdout_clean = "b"\ncalibration = "c"\n{keys}\n'
    )
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "trainer.toml")
