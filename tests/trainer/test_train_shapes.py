"""A segmenter and a classifier go the whole way of `trainer train`: labels, tuner, int8, the engine, gate, release."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edged.engines.base import Detector, EngineOptions, open_engine
from tests.support.shaped import CLASSES, shaped_trainer
from tests.support.trained import run_trainer, summary
from trainer.child import Child, read_outcome
from trainer.config import load_config
from trainer.datasets import LabelledImage, read_folder, write_folder
from trainer.jobfile import bring_samples, dataset_job
from trainer.releases import Registry, read_manifest
from trainer.train import train
from trainer.trained import ledger_of, read_images

pytestmark = pytest.mark.timeout(900)  # the first one trains the base

DEVICE = Path("build/venv-device/bin/edged").absolute()
CHILD_S_MAX = 240.0
# The segmenter's head alone learns: the quickest. The classifier is adapted as usual, until it gets no better.
KEYS: dict[str, dict[str, Any]] = {
    "segment": {"method": "head", "epochs": 4, "batch": 8, "lr": 0.01},
    "classify": {"epochs": 40, "patience": 3, "validation_share": 0.2, "batch": 8, "lr": 0.003},
}


class World:
    """A trainer for each kind, made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, kind: str) -> Path:
        config = self.folder / kind / "trainer.toml"
        if not config.is_file():
            config.parent.mkdir()
            shaped_trainer(config.parent, kind, **KEYS[kind])
        return config


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("shapes"))


def failed(metadata: dict[str, Any]) -> set[str]:
    return {check["name"] for check in metadata["gate"]["checks"] if not check["passed"]}


def installed(folder: Path, candidate: Path) -> Detector:
    """The candidate registered, proven as a device does it, and opened by the engine that devices run it on."""
    registry = Registry(folder / "releases")  # another one: what the next test improves stays the first release
    stored = registry.get(registry.register(candidate).release)
    done = subprocess.run([DEVICE, "models", "verify", stored.folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    engine = open_engine(stored.folder, stored.manifest, EngineOptions())
    assert isinstance(engine, Detector)
    return engine


def test_a_segmenter_is_trained_by_the_child_of_serve_and_released(world: World, tmp_path: Path) -> None:
    """L10: fine-tuned, judged on the frozen holdout, registered as the next version."""
    config, run = world["segment"], tmp_path / "run"
    settings = load_config(config)
    run.mkdir()
    # What `trainer serve` hands its child: the manifest in the run's folder, and pixels by their hash.
    job = dataset_job(settings, "shapes", "yolo", config.parent / "new", run, created="2026", job="shapes-1")
    bring_samples(job)
    (run / "manifest.json").write_text(job.manifest.model_dump_json())
    child, until = Child("shapes-1", "shapes", config, job.samples, run), time.monotonic() + CHILD_S_MAX
    while child.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    outcome = read_outcome(run)
    assert outcome is not None, (run / "log.txt").read_text()[-3000:]
    assert outcome.status == "passed", outcome.reason
    metadata = json.loads((run / "metadata.json").read_text())
    assert (metadata["kind"], metadata["training"]["task"], metadata["training"]["method"]) == (
        "segment", "segment", "head",
    )  # fmt: skip
    assert "mask F1" in " ".join(check["reason"] for check in metadata["gate"]["checks"])
    found = metadata["evaluation"]["target"]
    assert found["candidate"]["f1"] > 0.8 > found["current"]["f1"]

    manifest = read_manifest(run / "candidate")
    assert (manifest.release, manifest.kind, manifest.engine) == ("shapes@1.1", "segment", "onnx_segment")
    assert manifest.calibration.method == "logistic"
    assert [row["format"] for row in manifest.lineage["export_parity"]] == ["fp32", "int8"]
    engine = installed(tmp_path, run / "candidate")
    item = read_folder(config.parent / "holdout")[0].decode(CLASSES, "segment")
    answer = engine.infer([engine.prepare(item.image)])[0].above(0.25)
    assert answer.outlines is not None and all(len(outline) >= 3 for outline in answer.outlines)
    engine.close()


def test_a_classifier_stops_early_and_is_released(world: World, tmp_path: Path) -> None:
    config, run = world["classify"], tmp_path / "run"
    # As `trainer samples export --format jsonl` writes a classification: a class, no box.
    folder = config.parent / "new"
    rows = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    told = [{**row, "class": row.pop("boxes")[0]["label"]} for row in rows]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    done = run_trainer(config, "train", "--model", "shapes", "--dataset", folder, "--output-dir", run)
    assert summary(done)["outcome"] == "passed", done.stderr[-3000:]
    metadata = json.loads((run / "metadata.json").read_text())
    training, samples = metadata["training"], metadata["samples"]
    assert training["stopped_early"] and training["best_epoch"] == training["epochs"] - 3 < 37
    losses = [row["held_out_loss"] for row in metadata["history"]]
    assert losses.index(min(losses)) + 1 == training["best_epoch"]
    assert samples["validation"] >= 5 <= samples["validation_replay"]
    assert samples["training"] + samples["validation"] == len(rows)
    # What stopped the training has had a part in it: it may never judge.
    known = read_images(ledger_of(load_config(config), "shapes"))
    assert len(known.sketches()) == sum(samples[key] for key in samples if key[:4] in ("trai", "vali", "repl"))
    assert metadata["evaluation"]["target"]["candidate"]["f1"] > 0.7

    manifest = read_manifest(run / "candidate")
    assert (manifest.kind, manifest.engine) == ("classify", "onnx_classify")
    assert manifest.lineage["training"]["patience"] == 3
    engine = installed(tmp_path, run / "candidate")
    items = [item.decode(CLASSES, "classify") for item in read_folder(config.parent / "holdout")[:20]]
    best = [engine.infer([engine.prepare(item.image)])[0].classes[0] for item in items]
    assert np.mean([found == item.classes[0] for found, item in zip(best, items, strict=True)]) > 0.6
    engine.close()


def test_shuffled_classes_are_stopped_by_the_gate(world: World, tmp_path: Path) -> None:
    """Each picture has another picture's class; four epochs are enough to pass with the right ones."""
    settings = load_config(world["classify"])
    own = settings.model("shapes").model_copy(update={"ablate": "labels", "epochs": 4, "patience": 0})
    config = settings.model_copy(update={"models": {"shapes": own}})
    job = dataset_job(config, "shapes", "yolo", world["classify"].parent / "new", tmp_path / "run", created="", job="x")
    metadata = train(job)
    assert metadata["outcome"] == "refused"
    assert {"gain", "chance", "forgetting"} <= failed(metadata)
    assert "accuracy lost on the base holdout" in metadata["reason"]
    assert not (tmp_path / "run" / "candidate" / "release.json").exists()


def without(items: list[LabelledImage], label: str) -> list[LabelledImage]:
    return [replace(item, boxes=tuple(box for box in item.boxes if box.label != label)) for item in items]


def test_a_segmenter_that_forgets_a_class_is_stopped_by_the_gate(world: World, tmp_path: Path) -> None:
    """Whoever labelled the new pictures and the replayed ones left the diamonds out."""
    folder = world["segment"].parent
    for name in ("new", "replay"):
        write_folder(tmp_path / name, without(read_folder(folder / name), "diamond"))
    settings = load_config(world["segment"])
    own = settings.model("shapes").model_copy(update={"replay": tmp_path / "replay", "epochs": 3})
    config = settings.model_copy(update={"models": {"shapes": own}})
    metadata = train(
        dataset_job(config, "shapes", "yolo", tmp_path / "new", tmp_path / "run", created="", job="forgets")
    )
    assert metadata["outcome"] == "refused"
    assert "class diamond (base)" in failed(metadata)
    assert not failed(metadata) & {"class square (base)", "class triangle (base)", "measurable"}
    assert "mask F1 lost on class 'diamond' of the base holdout" in metadata["reason"]
