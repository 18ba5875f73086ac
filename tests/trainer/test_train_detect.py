"""A detector learns from a labelled folder, a step after another as `trainer.train` takes them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from bench.demo.scenes import LABELS, encode_png, make_scenes
from edged.core.confidence import novelty
from edged.wire.manifest import Thresholds
from trainer.calibrate import ITEMS_MIN
from trainer.candidate import detector, export_int8
from trainer.config import load_config
from trainer.datasets import LabelledBox, LabelledImage, read_folder, write_folder
from trainer.export.golden_images import APART_KEY, part
from trainer.export.vision import vision_manifest
from trainer.files import write_whole
from trainer.golden import write_detect_golden
from trainer.jobfile import TrainJob, dataset_job
from trainer.kinds import begin
from trainer.kinds.vision import Vision
from trainer.releases import MANIFEST, Registry, canonical_bytes, read_manifest
from trainer.run import Run
from trainer.train import train
from trainer.trained import had
from trainer.tuners.yolo import TrainSettings, train_full, write_yolo_dataset

DEVICE = Path("build/venv-device/bin/edged").absolute()


def labelled(part: str, count: int, seed: int, shift: str | None = None) -> list[LabelledImage]:
    images = []
    for scene in make_scenes(part, count, seed, shift):
        png = encode_png(scene.image)
        boxes = tuple(
            LabelledBox(LABELS[k], tuple(float(v) for v in box))  # type: ignore[arg-type]
            for box, k in zip(scene.boxes, scene.classes, strict=True)
        )
        images.append(LabelledImage(sha256(png).hexdigest(), png, boxes, {"kind": "person", "who": "ann"}))
    return images


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trainer with `digits@1.0`, which has learned next to nothing, and labelled folders."""
    folder = tmp_path_factory.mktemp("trainer")
    scenes = make_scenes("train", 8, seed=1)
    items = ((f"s{i}", encode_png(s.image), s.boxes, s.classes) for i, s in enumerate(scenes))
    data = write_yolo_dataset(folder / "set", items, LABELS)
    train_full(data, "yolo11n.yaml", folder / "base.pt", TrainSettings(epochs=1, imgsz=64, batch=8, seed=3))
    sources = {"calibration": "calibration", "holdout": "holdout", "clean": "holdout"}
    for number, (name, source) in enumerate(sources.items()):
        write_folder(folder / name, labelled(source, 16 if name == "calibration" else 8, 20 + number))
    write_folder(folder / "new", labelled("train", 8, 9))
    (folder / "trainer.toml").write_text(
        f'data_dir = "data"\n[models.digits]\ncheckpoint = "base.pt"\nlabels = {list(LABELS)}\nimgsz = 64\nscore = 0.01\n'
        'holdout = "holdout"\nholdout_clean = "clean"\ncalibration = "calibration"\nepochs = 1\nbatch = 8\n'
    )
    first = folder / "digits-1.0"
    parts = part([each.decode(LABELS).image for each in read_folder(folder / "calibration")])
    # By hand: packing asks for parity, which cannot be shown of what answers nothing yet.
    described = {"labels": LABELS, "imgsz": 64, "thresholds": Thresholds()}
    export_int8(
        folder / "base.pt", folder / "fp32", first,
        lambda made: vision_manifest(made, "digits@1.0", "detect", **described), parts, imgsz=64, seed=0,
    )  # fmt: skip
    with detector(first, vision_manifest(first, "digits@1.0", "detect", **described)) as engine:
        roles = write_detect_golden(first, engine, parts.golden, Thresholds().score)
    whole = vision_manifest(first, "digits@1.0", "detect", roles=roles, **described)
    write_whole(first / MANIFEST, canonical_bytes(whole))
    Registry(folder / "data" / "releases").register(first)
    return folder


def job(world: Path, run: str) -> TrainJob:
    config = load_config(world / "trainer.toml")
    return dataset_job(config, "digits", "yolo", world / "new", world / run, created="2026", job=run)


def changed(whole: TrainJob, **changes: Any) -> TrainJob:
    own = whole.config.model("digits").model_copy(update=changes)
    return replace(whole, config=whole.config.model_copy(update={"models": {"digits": own}}))


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({}, "models.digits.holdout: 8 images, 50 must judge (models.digits.gate.images_min)"),
        ({"images_min": 8}, "boxes, 100 must judge (models.digits.gate.boxes_min)"),
        (
            {"images_min": 8, "boxes_min": 1},
            "images calibrate, of the folder and of the samples together; 100 are needed",
        ),
    ],
)
def test_what_no_gate_could_let_pass_is_not_trained(world: Path, gate: dict[str, float], said: str) -> None:
    early = changed(job(world, f"early{len(gate)}"), gate=gate)
    result = train(early)
    assert result["outcome"] == "failed"
    assert said in result["reason"]
    assert "train" not in result["timings_s"]
    assert had(early.config, "digits") == set(), "cron asks again when it is mended"


def test_the_gate_refuses_what_has_learned_nothing_and_the_card_says_why(world: Path) -> None:
    result = train(changed(job(world, "refused"), ablate="labels"))
    assert result["outcome"] == "refused"
    assert result["samples"]["provenance"] == {"person ann": 8}
    run = world / "refused"
    assert sorted(path.name for path in run.iterdir() if path.suffix == ".png") == ["loss.png", "metrics.png"]
    assert not (run / "candidate" / "release.json").exists()
    card = (run / "README.md").read_text()
    for said in ("The gate refused it", "images in the target holdout (at least): 8", "| person ann |", "AGPL-3.0",
                 "`digits@1.0`", "map50"):  # fmt: skip
        assert said in card
    assert json.loads((run / "manifest.json").read_text())["source"] == "digits@1.0"


def test_a_checkpoint_that_is_none_ends_the_run_with_its_name(world: Path) -> None:
    broken = world / "broken.pt"
    broken.write_bytes((world / "base.pt").read_bytes()[:5000])
    result = train(changed(job(world, "broken"), ablate="labels", checkpoint=broken))
    assert result["outcome"] == "failed"
    assert f"{broken}: not a checkpoint of ultralytics" in result["reason"]
    assert "give a whole .pt file" in result["reason"] and "\n" not in result["reason"]
    assert "export" not in result["timings_s"]


def test_what_passes_becomes_a_release_that_a_device_proves(world: Path) -> None:
    whole = job(world, "passed")
    own = whole.config.model("digits").model_copy(update={"ablate": "train"})  # its weights do not matter here
    run = Run(replace(whole, config=whole.config.model_copy(update={"models": {"digits": own}})))
    run.folder.mkdir()
    training = begin(run, "detect")
    assert training.read() == 8
    for step in (training.tune, training.export, training.calibrate, training.evaluate):
        step()
    training.complete(training.judge())
    manifest = read_manifest(run.candidate)
    assert (manifest.release, manifest.kind) == ("digits@1.1", "detect")
    assert manifest.lineage["parent"]["release"] == "digits@1.0"
    assert manifest.evaluation["gate"]["checks"]
    others = 8 + manifest.lineage["samples"]["calibration"]
    assert manifest.lineage[APART_KEY] == {"ranges": others, "golden": 8, "golden_near_ranges": 0}
    done = subprocess.run([DEVICE, "models", "verify", run.candidate], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("ablate", "known"), [("", True), ("train", False)])
def test_the_light_that_was_trained_on_is_novel_no_more(world: Path, ablate: str, known: bool) -> None:
    write_folder(world / "inverted", labelled("train", 32, 5, "invert"))
    write_folder(world / "upright", labelled("calibration", ITEMS_MIN, 6))
    whole = dataset_job(
        load_config(world / "trainer.toml"), "digits", "yolo", world / "inverted", world / f"light{ablate}", created="2026",
        job=f"light{ablate}",
    )  # fmt: skip
    changes = {"ablate": ablate, "calibration": world / "upright", "calibration_share": 0.0}
    own = whole.config.model("digits").model_copy(update=changes)
    run = Run(replace(whole, config=whole.config.model_copy(update={"models": {"digits": own}})))
    run.folder.mkdir()
    training = begin(run, "detect")
    assert isinstance(training, Vision)
    for step in (training.read, training.tune, training.export, training.calibrate):
        step()
    calibration = training.manifest.calibration
    with detector(run.candidate, training.manifest) as engine:
        seen = [engine.prepare(s.image).stats for s in make_scenes("stream", 40, 7, "invert")]
    novel = [novelty(each, calibration) > calibration.novelty.limit for each in seen if calibration.novelty]
    assert len(novel) == 40
    assert sum(novel) <= 4 if known else sum(novel) >= 36
