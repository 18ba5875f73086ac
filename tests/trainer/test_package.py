"""A checkpoint becomes a release that a device accepts."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.demo.scenes import encode_png
from bench.photos import LABELS, photos, pieces
from tests.support.checkpoints import SIZE, checkpoint
from tests.support.told import assert_files_are_there
from trainer.cli import app
from trainer.core.parity import PARITY_KEY
from trainer.datasets import LabelledBox, LabelledImage, write_folder
from trainer.releases import read_manifest

DEVICE = Path("build/venv-device/bin/edged").absolute()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    shutil.copyfile(checkpoint("yolo11n.yaml"), folder / "base.pt")
    images = []
    for piece in (piece for photo in photos() for piece in pieces(photo)):
        png = encode_png(piece)
        images.append(LabelledImage(hashlib.sha256(png).hexdigest(), png, (LabelledBox(LABELS[0], (4, 4, 60, 60)),)))
    write_folder(folder / "calibration", images)
    path = folder / "trainer.toml"
    path.write_text(
        f'data_dir = "data"\n[models.digits]\ncheckpoint = "base.pt"\nlabels = {json.dumps(LABELS)}\nimgsz = {SIZE}\n'
        'score = 0.4\nholdout = "none"\nholdout_clean = "none"\ncalibration = "calibration"\n'
    )
    return path


def test_the_first_release_is_one_that_a_device_proves(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits"
    command = ["release", "make", "digits", str(out), "--config", str(config)]
    done, again = (CliRunner().invoke(app, [*command, *more]) for more in ([], ["--json"]))  # made anew
    assert (done.exit_code, again.exit_code) == (0, 0), done.output + again.output
    assert (
        done.stdout
        == f"digits@1.0: {out}, NOT calibrated: of 24 images 100 are needed, and devices accept none of its answers\n"
    )
    manifest, told = read_manifest(out), json.loads(again.stdout)
    assert {key: told[key] for key in ("release", "path", "kind", "calibration", "items")} == {
        "release": "digits@1.0", "path": str(out), "kind": "detect", "calibration": "uncalibrated", "items": 24,
    }  # fmt: skip
    assert_files_are_there(out, told)
    assert [(each["format"], each["items"], each["passed"]) for each in told["parity"]] == [
        ("fp32", 8, True), ("int8", 8, True),
    ]  # fmt: skip
    assert {row["metric"] for row in told["parity"][1]["metrics"]} == {"boxes_changed", "iou_off", "score_off"}
    assert (manifest.release, manifest.thresholds.score) == ("digits@1.0", 0.4)
    assert manifest.calibration.method == "uncalibrated", "24 images are too few to fit a probability on"
    assert [(each["format"], each["passed"]) for each in manifest.lineage[PARITY_KEY]] == [
        ("fp32", True),
        ("int8", True),
    ]
    added = CliRunner().invoke(app, ["release", "add", str(out), "--config", str(config), "--json"])
    assert json.loads(added.stdout) == {"release": told["release"], "sha256": told["sha256"]}, added.output
    verified = subprocess.run([str(DEVICE), "models", "verify", str(out)], capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stderr
    assert "8 golden inputs answered as promised" in verified.stdout


def test_a_checkpoint_that_is_none_is_an_error_in_words(config: Path, tmp_path: Path) -> None:
    text, whole = config.read_text(), (config.parent / "base.pt").read_bytes()
    cases = {
        "missing.pt": (None, "missing.pt does not exist; give the path"),
        "broken.pt": (b"no checkpoint", "broken.pt: not a checkpoint of ultralytics"),
        "cut.pt": (whole[: len(whole) // 2], "cut.pt: not a checkpoint of ultralytics"),
    }
    for name, (content, said) in cases.items():
        if content is not None:
            (config.parent / name).write_bytes(content)
        (other := config.parent / "other.toml").write_text(text.replace("base.pt", name))
        command = ["release", "make", "digits", str(tmp_path / "d"), "--config", str(other), "--json"]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
        assert said in json.loads(done.stdout)["error"]
        assert len(done.stderr.splitlines()) == 1, "one line, and nothing of a library's advice"
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_configured_is_named(config: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["release", "make", "owls", str(tmp_path / "o"), "--config", str(config)])
    assert done.exit_code != 0
    assert "models.owls" in done.output
    assert "digits" in done.output


def test_a_checkpoint_that_finds_nothing_makes_no_release(config: Path, tmp_path: Path) -> None:
    """Nothing would show that the file computes what the checkpoint does."""
    from ultralytics import YOLO

    network = YOLO("yolo11n.yaml")
    network.model.names = dict(enumerate(LABELS))
    untrained = type(network.model)("yolo11n.yaml", nc=len(LABELS), verbose=False)
    untrained.names = dict(enumerate(LABELS))
    network.model = untrained
    network.save(tmp_path / "untrained.pt")
    text = config.read_text().replace("base.pt", str(tmp_path / "untrained.pt"))
    (config.parent / "untrained.toml").write_text(text)
    arguments = ["release", "make", "digits", str(tmp_path / "out"), "--config", str(config.parent / "untrained.toml")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "detect boxes_changed nan" in done.stderr
    assert "golden inputs that the checkpoint answers" in done.stderr
    assert not (tmp_path / "out").exists()
