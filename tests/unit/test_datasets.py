from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edged.wire.manifest import TrainingManifest, TrainingSample
from trainer.core.split import SplitRules
from trainer.datasets import (
    Apart,
    DatasetError,
    LabelledBox,
    LabelledImage,
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


def test_only_what_may_train_is_selected(tmp_path: Path) -> None:
    """L6, L15: labels below the floor never train."""
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


def scene(number: int, dim: float = 1.0) -> LabelledImage:
    """A picture of blocks, drawn by its number; `dim` changes its light only."""
    blocks = np.random.default_rng(number).uniform(0, 255, (6, 6, 3))
    data = cv2.imencode(".png", (np.kron(blocks, np.ones((8, 8, 1))) * dim).astype(np.uint8))[1].tobytes()
    return LabelledImage(sha256(data).hexdigest(), data, (LabelledBox("a", (1.0, 2.0, 5.0, 6.5)),), {"kind": "person"})


def chosen(folder: Path, *samples: tuple[LabelledImage, dict[str, Any]], **options: Any) -> Any:
    """What is selected of scenes, each with what its sample says otherwise than usual."""
    given = []
    for item, changes in samples:
        (folder / item.sha256).write_bytes(item.data)
        given.append(sample(item).model_copy(update=changes))
    rules = {"labels": ["a"], "confidence_min": 0.5, "held_out": frozenset(), "calibration_share": 0.0}
    return select_samples(manifest(*given), folder, **{**rules, **options})


def by(release: str, **others: Any) -> dict[str, Any]:
    return {"provenance": {"kind": "model", "who": "srv", "release": release, **others}}


def test_a_models_own_predictions_never_train(tmp_path: Path) -> None:
    found = chosen(
        tmp_path,
        (scene(1), by("digits@1.0")), (scene(2), by("digits@7.3")), (scene(3), by("digits-teacher@1.0")),
        (scene(4), {"provenance": {"kind": "model", "who": "d1"}}),
        (scene(5), {"provenance": {"kind": "person", "who": "d1"}}),
    )  # fmt: skip
    assert found.left_out == {"own_prediction": 3}
    assert [item.sha256 for item in found.training] == [scene(3).sha256, scene(5).sha256]


MOVED, OTHER = [{"label": "a", "box": [20, 20, 30, 30]}], [{"label": "b", "box": [1.0, 2.0, 5.0, 6.5]}]
SAME = [{"label": "a", "box": [1.2, 2.0, 5.0, 6.6]}]


@pytest.mark.parametrize(
    ("said", "confidence", "status", "kind", "disputed"),
    [
        (MOVED, 0.95, "labelled", "model", True),
        (OTHER, 0.95, "labelled", "model", True),
        ([], 0.95, "labelled", "model", True),
        (SAME, 0.95, "labelled", "model", False),
        (MOVED, 0.6, "labelled", "model", False),  # who was less sure asked the one who corrects him
        (MOVED, 0.95, "unresolved", "model", False),
        (MOVED, 0.95, "labelled", "person", False),  # a person has decided
        ([{"label": "a"}], 0.95, "labelled", "model", False),  # no label that can be read
    ],
)
def test_labels_that_are_disputed_do_not_train(
    tmp_path: Path, said: list[Any], confidence: float, status: str, kind: str, disputed: bool
) -> None:
    opinion = {"who": "other", "status": status, "confidence": confidence, "label": said}
    changes = by("digits-teacher@1.0", opinions=[opinion])
    changes["provenance"]["kind"] = kind
    found = chosen(tmp_path, (scene(1), changes))
    assert found.left_out == ({"disputed": 1} if disputed else {})


def test_what_looks_like_a_judge_does_not_train(tmp_path: Path) -> None:
    again, calibrates, free = scene(1, 0.8), scene(2, 0.8), scene(3)
    apart = Apart([scene(1)], [scene(2)])
    found = chosen(tmp_path, (again, {}), (calibrates, {}), (free, {}), apart=apart)
    assert found.left_out == {"near_holdout": 2}
    assert [item.sha256 for item in found.training] == [free.sha256]
    found = chosen(tmp_path, (again, {}), (calibrates, {}), (free, {}), apart=apart, calibration_share=1.0)
    assert found.left_out == {"near_holdout": 1}  # what calibrates may be like what calibrates
    assert not found.training


def test_what_looks_like_new_calibration_does_not_train(tmp_path: Path) -> None:
    number = next(
        n for n in range(100) if int(scene(n).sha256[:8], 16) < 0x40000000 <= int(scene(n, 0.8).sha256[:8], 16)
    )
    found = chosen(tmp_path, (scene(number), {}), (scene(number, 0.8), {}), calibration_share=0.25)
    assert [item.sha256 for item in found.calibration] == [scene(number).sha256]
    assert found.left_out == {"near_holdout": 1}


def test_what_was_taken_beside_a_judge_does_not_train(tmp_path: Path) -> None:
    judge = LabelledImage(scene(1).sha256, scene(1).data, (), {"kind": "person", "device": "d1", "captured": 1000.0})
    times = {2: 1003.0, 3: 1006.0}
    samples = [(scene(n), {"provenance": {"kind": "person", "captured": at}}) for n, at in times.items()]
    elsewhere = (scene(4), {"device": "d2", "provenance": {"kind": "person", "captured": 1003.0}})
    found = chosen(tmp_path, *samples, elsewhere, apart=Apart([judge], (), 5.0))
    assert found.left_out == {"beside_holdout": 1}
    assert [item.sha256 for item in found.training] == [scene(3).sha256, scene(4).sha256]


def test_samples_of_a_device_are_split_by_their_time(tmp_path: Path) -> None:
    """All of a block on one side, whatever their bytes; what is kept for a holdout trains nothing."""
    rules = SplitRules(0.3, 0.2, 0.1, block_s=60.0, guard_s=2.0)
    samples = [
        (scene(100 * block + n), {"provenance": {"kind": "person", "captured": 1e9 + 30.0 + 60 * block + 10 * n}})
        for block in range(40) for n in range(3)
    ]  # fmt: skip
    found = chosen(tmp_path, *samples, split=rules)
    for side in (found.training, found.calibration):
        blocks = [int((item.provenance["captured"] - 1e9 - 20.0) // 60) for item in side]
        assert len(blocks) > 5
        assert all(blocks.count(block) == 3 for block in blocks)
    assert set(found.left_out) == {"kept_for_gate", "kept_for_test"}


def test_near_duplicates_within_training_are_counted_or_thinned(tmp_path: Path) -> None:
    samples = [(scene(1), {}), (scene(1, 0.9), {}), (scene(2), {}), (scene(1, 0.8), {})]
    kept, thinned = chosen(tmp_path, *samples), chosen(tmp_path, *samples, thin=True)
    assert (len(kept.training), kept.near_duplicates, kept.left_out) == (4, 2, {})
    assert [item.sha256 for item in thinned.training] == [scene(1).sha256, scene(2).sha256]
    assert (thinned.near_duplicates, thinned.left_out) == (0, {"near_duplicate": 2})


def test_replay_keeps_away_from_what_judges() -> None:
    items = [scene(number) for number in range(5)]
    drawn = choose_replay(items, 5, 0, frozenset(), [scene(2, 0.8)])
    assert sorted(item.sha256 for item in drawn) == sorted(item.sha256 for item in items if item is not items[2])
