from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edged.wire.manifest import TrainingManifest, TrainingSample
from trainer.datasets import (
    DatasetError,
    LabelledBox,
    LabelledImage,
    check_frozen,
    choose_replay,
    read_folder,
    select_samples,
    shuffle_labels,
    write_folder,
)


def image(value: int, label: str = "a") -> LabelledImage:
    data = cv2.imencode(".png", np.full((8, 8, 3), value, np.uint8))[1].tobytes()
    return LabelledImage(sha256(data).hexdigest(), data, (LabelledBox(label, (1.0, 2.0, 5.0, 6.5)),), {"who": "me"})


def sample(item: LabelledImage, confidence: float = 0.9, **label: Any) -> TrainingSample:
    boxes = [{"label": box.label, "box": list(box.box)} for box in item.boxes]
    return TrainingSample(
        id=f"s-{item.sha256[:8]}", device="d1", sha256=item.sha256, provenance={"kind": "model"},
        label={"boxes": boxes, "confidence": confidence, **label},
    )  # fmt: skip


def manifest(*samples: TrainingSample) -> TrainingManifest:
    return TrainingManifest(
        job="j", model="digits", source="digits@1.0", target="digits@1.1", created="", config={}, samples=list(samples)
    )


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    items = [image(1), image(2, "b"), LabelledImage(image(3).sha256, image(3).data, ())]
    write_folder(tmp_path, items)
    assert read_folder(tmp_path) == items
    decoded = items[1].decode(["a", "b"])
    assert (decoded.image[0, 0, 0], decoded.boxes.tolist(), decoded.classes.tolist()) == (2, [[1, 2, 5, 6.5]], [1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "none.png"}, "line 2.*none.png: No such file"),
        ({"sha256": "0" * 64}, "line 2.*the image was changed"),
        ({"boxes": [{"label": "a", "box": [5, 5, 5, 9]}]}, "line 2.*has no area"),
        ({"boxes": [{"label": "a", "box": [0, 0, float("nan"), 9]}]}, "line 2.*has no area"),
        ({"boxes": None}, "line 2: TypeError"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_folder(tmp_path, [image(1), image(2)])
    lines = (tmp_path / "labels.jsonl").read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    with pytest.raises(DatasetError, match=message):
        read_folder(tmp_path)


def test_a_label_that_the_model_lacks_is_named() -> None:
    with pytest.raises(DatasetError, match="label 'z' is none of a, b"):
        image(1, "z").decode(["a", "b"])


def test_a_holdout_may_not_move(tmp_path: Path) -> None:
    record = tmp_path / "holdouts.json"
    first = [image(1), image(2)]
    assert check_frozen(record, "digits/target", first) == check_frozen(record, "digits/target", first[::-1])
    for other in ([image(1)], [image(1), image(2, "b")], [image(1), image(2), image(3)]):
        with pytest.raises(DatasetError, match="holdout digits/target has changed"):
            check_frozen(record, "digits/target", other)
    assert check_frozen(record, "digits/base", [image(3)])


def test_only_what_may_train_is_selected(tmp_path: Path) -> None:
    good, unsure, held, lost, broken, unknown = (image(value) for value in range(1, 7))
    unknown = image(6, "z")
    for item in (good, unsure, held, unknown):
        (tmp_path / item.sha256).write_bytes(item.data)
    (tmp_path / broken.sha256).write_bytes(b"not what the hash says")
    given = [
        sample(good),
        sample(good),
        sample(unsure, 0.4),
        sample(held),
        sample(lost),
        sample(broken),
        sample(unknown),
    ]
    selected = select_samples(
        manifest(*given),
        tmp_path,
        labels=["a"],
        confidence_min=0.5,
        held_out=frozenset({held.sha256}),
        calibration_share=0,
    )
    assert [item.sha256 for item in selected.training] == [good.sha256]
    assert selected.left_out == {
        "duplicate": 1, "below_label_confidence": 1, "in_holdout": 1, "no_pixels": 1, "unusable": 2,
    }  # fmt: skip


def test_an_image_falls_on_the_same_side_in_every_job(tmp_path: Path) -> None:
    items = [image(value) for value in range(100)]
    for item in items:
        (tmp_path / item.sha256).write_bytes(item.data)

    def split(chosen: list[LabelledImage]) -> set[str]:
        given = manifest(*(sample(item) for item in chosen))
        found = select_samples(
            given, tmp_path, labels=["a"], confidence_min=0.5, held_out=frozenset(), calibration_share=0.2
        )
        assert len(found.training) + len(found.calibration) == len(chosen)
        return {item.sha256 for item in found.calibration}

    everything = split(items)
    assert 10 <= len(everything) <= 30
    assert split(items[:50]) <= everything


def test_replay_is_drawn_by_seed_and_leaves_out_what_it_must() -> None:
    items = [image(value) for value in range(20)]
    drawn = choose_replay(items, 5, 1, frozenset({items[0].sha256}))
    assert drawn == choose_replay(items, 5, 1, frozenset({items[0].sha256}))
    assert drawn != choose_replay(items, 5, 2, frozenset({items[0].sha256}))
    assert len(choose_replay(items, 50, 1, frozenset({items[0].sha256}))) == 19


def test_shuffled_labels_keep_the_images() -> None:
    items = [image(value, str(value)) for value in range(20)]
    shuffled = shuffle_labels(items, 1)
    assert [item.data for item in shuffled] == [item.data for item in items]
    assert sum(a.boxes == b.boxes for a, b in zip(items, shuffled, strict=True)) < 6
    assert sorted(item.boxes[0].label for item in shuffled) == sorted(item.boxes[0].label for item in items)
