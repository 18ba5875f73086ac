"""A job's sets are apart: what calibrates has trained nothing and judges nothing."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edged.wire.manifest import TrainingManifest, TrainingSample
from trainer.config import Model, TrainerConfig
from trainer.datasets import DatasetError, LabelledBox, LabelledImage, write_folder
from trainer.jobfile import TrainJob
from trainer.kinds.vision_sets import read_sets, untrained

BOXES = (LabelledBox("a", (1.0, 2.0, 5.0, 6.5)),)


def image(value: int, compression: int = 3) -> LabelledImage:
    pixels = np.full((8, 8, 3), value, np.uint8)
    data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, compression])[1].tobytes()
    return LabelledImage(sha256(data).hexdigest(), data, BOXES, {"kind": "person", "who": "annotator"})


def job(folder: Path, samples: list[LabelledImage], **sets: list[LabelledImage]) -> tuple[TrainJob, Model]:
    plain = {
        "holdout": range(10),
        "holdout_clean": range(10, 20),
        "calibration": range(20, 30),
        "replay": range(30, 60),
    }
    for name, values in plain.items():
        write_folder(folder / name, sets.get(name, [image(value) for value in values]))
    (folder / "samples").mkdir()
    rows = []
    for item in samples:
        (folder / "samples" / item.sha256).write_bytes(item.data)
        label: dict[str, Any] = {"boxes": [{"label": "a", "box": list(BOXES[0].box)}], "confidence": 0.9}
        rows.append(TrainingSample(id=item.sha256[:8], device="d1", sha256=item.sha256, label=label, provenance={}))
    settings = Model(
        checkpoint=folder / "a.pt", labels=["a"], calibration_share=0.5, replay_ratio=5,
        **{name: folder / name for name in plain},
    )  # fmt: skip
    manifest = TrainingManifest(
        job="j", model="eye", source="eye@1.0", target="eye@1.1", created="", config={}, samples=rows
    )
    config = TrainerConfig(data_dir=folder / "data", models={"eye": settings})
    (folder / "data").mkdir()
    return TrainJob(config, "eye", manifest, folder / "samples", folder / "run"), settings


def hashes(items: list[LabelledImage]) -> set[str]:
    return {item.sha256 for item in items}


def test_no_image_is_in_two_sets(tmp_path: Path) -> None:
    """Devices send old acquaintances: images of the holdouts, the calibration and the replay."""
    samples = [image(value) for value in range(0, 100, 2)]
    sets = read_sets(*job(tmp_path, samples))
    calibrates, trains = hashes(sets.calibration), hashes(sets.selected.training) | hashes(sets.replay)
    judges = hashes(sets.target) | hashes(sets.base)
    assert not calibrates & trains
    assert not judges & (calibrates | trains)
    fresh = hashes(sets.selected.calibration)
    assert len(fresh) > 5
    assert fresh & hashes([image(value) for value in range(30, 60)])  # it would have been replayed


@pytest.mark.parametrize(("other", "said"), [("replay", "weights have learned"), ("holdout", "cannot judge")])
def test_a_calibration_that_is_not_apart_is_refused(tmp_path: Path, other: str, said: str) -> None:
    given = {"replay": 31, "holdout": 3}[other]
    task = job(tmp_path, [image(99)], calibration=[image(given), image(21)])
    with pytest.raises(DatasetError, match=rf"calibration: 1 of its images.*{image(given).sha256[:12]}.*{said}"):
        read_sets(*task)


def test_the_same_pixels_in_another_file_do_not_calibrate(tmp_path: Path) -> None:
    _, settings = job(tmp_path, [])
    trained, again = image(7, compression=0), image(7, compression=9)
    assert trained.sha256 != again.sha256
    left = untrained([again, image(8)], [trained], settings)
    assert [item.image[0, 0, 0] for item in left] == [8]


def scene(number: int, dim: float = 1.0) -> LabelledImage:
    """A picture of blocks, drawn by its number; `dim` changes its light only."""
    blocks = np.random.default_rng(number).uniform(0, 255, (6, 6, 3))
    data = cv2.imencode(".png", (np.kron(blocks, np.ones((8, 8, 1))) * dim).astype(np.uint8))[1].tobytes()
    return LabelledImage(sha256(data).hexdigest(), data, BOXES, {"kind": "person", "who": "annotator"})


def test_what_looks_like_a_judge_is_in_no_other_set(tmp_path: Path) -> None:
    """The camera took it twice, or somebody saved it again: other bytes, the same picture."""
    samples = [scene(1, 0.8), scene(2, 0.8), *(scene(number) for number in range(40, 60))]
    sets = read_sets(
        *job(
            tmp_path, samples, holdout=[scene(1)], holdout_clean=[scene(2)],
            calibration=[scene(1, 0.7), scene(3)], replay=[scene(number) for number in range(100, 110)],
        )
    )  # fmt: skip
    assert sets.selected.left_out["near_holdout"] == 2
    assert scene(1, 0.7).sha256 not in hashes(sets.calibration)
    assert scene(3).sha256 in hashes(sets.calibration)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (LabelledImage(scene(1).sha256, scene(1).data, BOXES), "no_provenance"),
        (
            LabelledImage(scene(1).sha256, scene(1).data, BOXES, {"kind": "model", "who": "d1", "release": "eye@1.0"}),
            "own_prediction",
        ),
        (scene(30, 0.9), "near_training"),  # the base has learned it
    ],
)
def test_a_holdout_that_may_not_judge_stops_the_job(tmp_path: Path, bad: LabelledImage, reason: str) -> None:
    task = job(tmp_path, [scene(50)], holdout=[scene(2), bad], replay=[scene(30)])
    with pytest.raises(DatasetError, match=rf"holdout eye\.target: 1 of 2 images.*{bad.sha256[:12]}: {reason}"):
        read_sets(*task)
