"""A candidate that kills the process which judges it is refused; one whose process somebody else killed is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import yaml
from sqlalchemy import insert, select
from typer.testing import CliRunner

from edged.wire.manifest import TrainingManifest, TrainingSample
from tests.support.device import until
from tests.support.models import make_release
from tests.support.shapes import tiny_network
from trainer.child import METADATA, read_progress
from trainer.cli import app
from trainer.config import load_config
from trainer.database import Database, jobs, leases
from trainer.datasets import LabelledBox, LabelledImage, write_folder
from trainer.host import Host
from trainer.jobs import Jobs
from trainer.releases import Registry
from trainer.trained import had

ROOT = Path(__file__).parents[2]
POISON = ROOT / "tests" / "support" / "poison"
CONFIG = """
data_dir = "data"
[models.shapes]
checkpoint = "base.pt"
labels = ["0", "1"]
imgsz = 64
holdout = "holdout"
holdout_clean = "clean"
calibration = "calibration"
ablate = "train"
"""


def image(number: int) -> LabelledImage:
    """A picture of blocks, or with number 0 a white one."""
    blocks = np.random.default_rng(number).uniform(0, 250, (8, 8, 3)) if number else np.full((8, 8, 3), 255)
    data = cv2.imencode(".png", np.kron(blocks, np.ones((8, 8, 1))).astype(np.uint8))[1].tobytes()
    box = LabelledBox("0", (8.0, 8.0, 40.0, 40.0))
    return LabelledImage(sha256(data).hexdigest(), data, (box,), {"kind": "person", "who": "ann"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trainer whose detector has learned nothing. One image of its holdout is white."""
    from trainer.tuners.yolo import prepare_process

    prepare_process()
    from ultralytics import YOLO

    folder = tmp_path_factory.mktemp("trainer")
    network = tiny_network(folder, "yolo11n")
    network.write_text(yaml.safe_dump({**yaml.safe_load(network.read_text()), "nc": 2}))
    YOLO(network).save(folder / "base.pt")
    for name, numbers in (("holdout", [1, 0]), ("clean", [3]), ("calibration", [*range(30, 40)]), ("new", [6, 7, 8])):
        write_folder(folder / name, [image(number) for number in numbers])
    (folder / "trainer.toml").write_text(CONFIG)
    make_release(folder / "shapes-1.0", "shapes@1.0")
    Registry(folder / "data" / "releases").register(folder / "shapes-1.0")
    return folder


def start(folder: Path, *arguments: str, poison: int | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer", *arguments, "--config", str(folder / "trainer.toml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    if poison is not None:
        environment |= {"POISON": str(poison), "PYTHONPATH": f"{POISON}{os.pathsep}{ROOT}"}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def order(folder: Path, job: str) -> Host:
    """A job of the fleet whose pixels have come; the trainer that it is one of."""
    config = load_config(folder / "trainer.toml")
    host = Host(config, folder / "trainer.toml", Database(config.database_at), Registry(config.releases))
    config.samples.mkdir(parents=True, exist_ok=True)
    rows = []
    for item in map(image, (6, 7, 8)):
        (config.samples / item.sha256).write_bytes(item.data)
        label: dict[str, Any] = {"boxes": [{"label": "0", "box": [8, 8, 40, 40]}], "confidence": 1.0}
        who = {"kind": "person", "who": "ann"}
        rows.append(TrainingSample(id=item.sha256[:8], device="d1", sha256=item.sha256, label=label, provenance=who))
    manifest = TrainingManifest(
        job=job, model="shapes", source="shapes@1.0", target="shapes@1.1", created="", config={}, samples=rows
    )
    row = {"source": "shapes@1.0", "target": "shapes@1.1", "reason": "operator", "status": "training"}
    with host.database.write() as connection:
        values = {"created": host.now(), "claim_until": 0.0, "manifest": manifest.model_dump(mode="json")}
        connection.execute(insert(jobs).values(id=job, model="shapes", **row, **values))
    return host


def test_a_job_whose_candidate_kills_its_judge_is_refused_and_not_trained_again(folder: Path) -> None:
    """A graph whose arithmetic the processor cannot do, on one image of the holdout alone."""
    host = order(folder, "killer")
    _out, err = (worker := start(folder, "worker", "--once", poison=255)).communicate(timeout=250)
    assert worker.returncode == 0, err
    run = host.config.runs / "killer"
    reason = "the candidate killed the process that judged it: SIGFPE (evaluate: the candidate)"
    metadata = json.loads((run / METADATA).read_text())
    assert (metadata["outcome"], metadata["reason"]) == ("refused", reason), (run / "log.txt").read_text()[-3000:]
    assert metadata["gate"]["passed"] is False
    with host.database.read() as connection:
        assert connection.execute(select(leases.c.ended)).scalar_one() == 3
    Jobs(host).tick()
    with host.database.read() as connection:
        job = connection.execute(select(jobs)).one()
        assert (job.status, job.detail, job.starts) == ("refused", reason, 1)
    host.database.close()
    # What it takes to find out why is there, and nothing that could be taken for a release.
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["candidate", "fp32"]
    assert [path.name for path in (run / "candidate").iterdir()] == ["model.onnx"]
    assert "Fatal Python error: Floating point exception" in (run / "log.txt").read_text()
    assert not (run / "facts.json").exists()
    assert metadata["samples"]["named"] == 3
    assert {"data", "train", "export", "calibrate"} <= metadata["timings_s"].keys()
    assert reason in (run / "README.md").read_text()
    shown = CliRunner().invoke(app, ["gate", "show", str(run)])
    assert "REFUSED, 1 of 1 checks failed" in shown.output
    assert had(host.config, "shapes") == {image(number).sha256 for number in (6, 7, 8)}


def inner(outer: subprocess.Popen[str]) -> psutil.Process | None:
    """The process that trains, below the one that watches it."""
    children = psutil.Process(outer.pid).children()
    return children[0] if children else None


def test_a_training_that_somebody_kills_while_it_judges_tells_nothing(folder: Path) -> None:
    config = load_config(folder / "trainer.toml")
    write_folder(folder / "other", [image(number) for number in (16, 17, 18)])
    run = folder / "killed"
    outer = start(folder, "train", "--model", "shapes", "--dataset", str(folder / "other"), "--output-dir", str(run))
    until("it judges", lambda: (read_progress(run) or {}).get("stage") in ("export", "calibrate", "evaluate"), 120)
    child = inner(outer)
    assert child is not None
    child.send_signal(signal.SIGKILL)
    out, err = outer.communicate(timeout=60)
    assert outer.returncode == -signal.SIGKILL  # as its worker takes it: another try
    assert out == ""
    assert "ended by SIGKILL, and nothing is known of its model" in err
    assert not (run / METADATA).exists()
    assert (run / "facts.json").is_file()
    assert image(16).sha256 not in had(config, "shapes"), "they call for a training still"
