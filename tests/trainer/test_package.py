"""A checkpoint becomes a release that a device accepts."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.demo.scenes import LABELS, encode_png, make_scenes
from trainer.cli import app
from trainer.datasets import LabelledBox, LabelledImage, write_folder
from trainer.releases import read_manifest
from trainer.tuners.yolo import TrainSettings, train_full, write_yolo_dataset

DEVICE = Path("build/venv-device/bin/edged").absolute()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    scenes = make_scenes("train", 16, seed=1)
    items = ((f"s{i}", encode_png(s.image), s.boxes, s.classes) for i, s in enumerate(scenes))
    data = write_yolo_dataset(folder / "set", items, LABELS)
    train_full(data, "yolo11n.yaml", folder / "base.pt", TrainSettings(epochs=1, imgsz=64, batch=8, seed=3))
    images = []
    for scene in make_scenes("calibration", 24, seed=2):
        png = encode_png(scene.image)
        boxes = tuple(
            LabelledBox(LABELS[k], tuple(float(v) for v in box))  # type: ignore[arg-type]
            for box, k in zip(scene.boxes, scene.classes, strict=True)
        )
        images.append(LabelledImage(hashlib.sha256(png).hexdigest(), png, boxes))
    write_folder(folder / "calibration", images)
    path = folder / "trainer.toml"
    path.write_text(
        f'data_dir = "data"\n[models.digits]\ncheckpoint = "base.pt"\nlabels = {list(LABELS)}\nimgsz = 64\nscore = 0.4\n'
        'holdout = "none"\nholdout_clean = "none"\ncalibration = "calibration"\n'
    )
    return path


def test_the_first_release_is_one_that_a_device_proves(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits"
    for _ in range(2):  # twice in a row: made anew
        done = CliRunner().invoke(app, ["release", "make", "digits", str(out), "--config", str(config)])
        assert done.exit_code == 0, done.output
    manifest = read_manifest(out)
    assert (manifest.release, manifest.thresholds.score) == ("digits@1.0", 0.4)
    assert manifest.calibration.method == "uncalibrated", "24 images are too few to fit a probability on"
    added = CliRunner().invoke(app, ["release", "add", str(out), "--config", str(config)])
    assert added.exit_code == 0, added.output
    verified = subprocess.run([str(DEVICE), "models", "verify", str(out)], capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stderr
    assert "8 golden inputs answered as promised" in verified.stdout


def test_a_model_that_is_not_configured_is_named(config: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["release", "make", "owls", str(tmp_path / "o"), "--config", str(config)])
    assert done.exit_code != 0
    assert "models.owls" in done.output
    assert "digits" in done.output
