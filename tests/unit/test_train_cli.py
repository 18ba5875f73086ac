"""`trainer train` before anything heavy happens: what it would do, when it leaves early, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trainer.cli import app
from trainer.cli_train import _new_folder
from trainer.releases import MANIFEST, Registry, build_manifest, canonical_bytes

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "ultralytics", "onnxruntime", "llama_cpp", "matplotlib")
# Runs the command line in this very process, then says on standard error which of the heavy packages it imported.
PROBE = """
import sys
from trainer.cli import app
code = 0
try:
    app(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(sorted(set(%r) & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def line(number: int) -> str:
    steps = {"plan": [{"tool": "generate"}], "execution": [{"tool": "escalate", "kind": "person"}]}
    return json.dumps({"goal": f"question {number}?", "context_summary": "", **steps, "summary": f"answer {number}"})


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A trainer with one language model and one detector, each with its first release."""
    (tmp_path / "trainer.toml").write_text(
        'data_dir = "data"\n'
        '[models.clerk]\nkind = "llm"\ncheckpoint = "checkpoint"\nepochs = 2\n'
        '[models.digits]\ncheckpoint = "base.pt"\nlabels = ["1"]\nholdout = "h"\nholdout_clean = "c"\ncalibration = "k"\n'
    )
    registry = Registry(tmp_path / "data" / "releases")
    for name, kind, engine in (("clerk", "llm", "llama"), ("digits", "detect", "onnx_detect")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.bin").write_bytes(name.encode())
        made: Any = build_manifest(folder, f"{name}@1.0", kind=kind, engine=engine, roles={"model": "model.bin"})
        (folder / MANIFEST).write_bytes(canonical_bytes(made))
        registry.register(folder)
    (tmp_path / "dataset.jsonl").write_text("".join(f"{line(number)}\n" for number in range(60)) + "{broken\n")
    labelled = tmp_path / "labelled"
    (labelled / "images").mkdir(parents=True)
    rows = []
    for number in range(120):
        data = f"image {number}".encode()
        (labelled / "images" / f"{number}.png").write_bytes(data)
        box = {"label": "1", "box": [0, 0, 5, 5]}
        rows.append({"file": f"{number}.png", "sha256": sha256(data).hexdigest(), "boxes": [box]})
    (labelled / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def complete(world: Path) -> None:
    """Put there what a training would miss."""
    (world / "checkpoint").mkdir()
    (world / "checkpoint" / "config.json").write_text("{}")
    (world / "base.pt").write_bytes(b"weights")
    for name in ("h", "c", "k"):
        (world / name).mkdir()
        (world / name / "labels.jsonl").write_text("")


def files(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in sorted(folder.rglob("*"))}


def call(world: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["train", *arguments, "--config", str(world / "trainer.toml")])


@pytest.mark.parametrize(
    ("arguments", "usable"),
    [
        (("--strategy", "lora", "--dataset", "dataset.jsonl", "--activate", "overrides.toml"), 60),
        (("--strategy", "yolo", "--dataset", "labelled"), 120),
    ],
)
def test_a_dry_run_imports_nothing_heavy_and_changes_nothing(
    world: Path, arguments: tuple[str, ...], usable: int
) -> None:
    complete(world)
    before = files(world)
    done = subprocess.run(
        [sys.executable, "-c", PROBE % (HEAVY,), "train", *arguments, "--dry-run", "--config", "trainer.toml"],
        cwd=world, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(Path.cwd()), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["action"], said["samples_usable"]) == ("dry_run", usable)
    assert done.stderr.splitlines()[-1] == "[]"
    assert files(world) == before


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["--model", "clerk", "--dataset", "dataset.jsonl"], ["checkpoint"]),
        (["--model", "digits", "--dataset", "labelled"], ["checkpoint", "calibration", "holdout", "holdout_clean"]),
    ],
)
def test_a_dry_run_names_the_files_that_the_training_would_miss(
    world: Path, arguments: list[str], missing: list[str]
) -> None:
    arguments[-1] = str(world / arguments[-1])
    done = call(world, *arguments, "--dry-run")
    assert done.exit_code == 1
    assert [each.split(":")[0] for each in json.loads(done.stdout)["problems"]] == [
        f"models.{arguments[1]}.{key}" for key in missing
    ]
    assert "is not there" in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "Invalid JSON"), ('{"job": 3}', "job: Input should be a valid string"), ("[]", "no manifest of a training")],
)
def test_a_bad_manifest_is_refused_in_words(world: Path, content: str, said: str) -> None:
    (world / "bad.json").write_text(content)
    done = call(world, "--model", "digits", "--manifest", str(world / "bad.json"))
    assert done.exit_code == 1
    assert said in done.stderr and "write one with `trainer samples manifest`" in done.stderr
    assert "pydantic" not in done.stderr


def test_a_manifest_of_another_model_is_refused(world: Path) -> None:
    from trainer.config import load_config
    from trainer.jobfile import dataset_job

    config = load_config(world / "trainer.toml")
    job = dataset_job(config, "digits", "yolo", world / "labelled", world / "run", created="2026", job="run")
    (world / "m.json").write_text(job.manifest.model_dump_json())
    done = call(world, "--model", "clerk", "--manifest", str(world / "m.json"))
    assert done.exit_code == 1
    assert "it is for model digits, not clerk" in done.stderr
    assert not (world / "data" / "runs").exists()


def test_a_dry_run_says_what_it_would_train_and_which_line_is_none(world: Path) -> None:
    said = json.loads(call(world, "--strategy", "lora", "--dataset", str(world / "dataset.jsonl"), "--dry-run").stdout)
    assert (said["model"], said["source"], said["target"]) == ("clerk", "clerk@1.0", "clerk-lora@1.0")
    assert said["settings"]["epochs"] == 2
    assert [each.split(":")[0] for each in said["bad_lines"]] == ["line 61"]
    assert said["output_dir"].startswith(str(world / "data" / "runs" / "clerk-"))


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("given", "flags", "status"),
    [
        (60, ["--require-threshold"], None),
        (50, ["--require-threshold"], None),
        (49, ["--require-threshold"], 4),  # 50 for text
        (49, ["--require-threshold", "--min-samples", "49"], None),
        (60, ["--min-samples", "61"], 4),
        (3, [], None),
    ],
)
def test_too_few_samples_leave_early_with_a_status_of_their_own(
    world: Path, given: int, flags: list[str], status: int | None, dry: bool
) -> None:
    (world / "dataset.jsonl").write_text("".join(f"{line(number)}\n" for number in range(given)))
    if dry:
        complete(world)
    done = call(
        world, "--model", "clerk", "--dataset", str(world / "dataset.jsonl"), *flags, *(["--dry-run"] if dry else [])
    )
    if dry:
        assert done.exit_code == (status or 0)
    elif status is not None:
        assert done.exit_code == status
        assert not (world / "data" / "runs").exists() or list((world / "data" / "runs").iterdir()) == []
    else:  # it goes on, as far as it can without a checkpoint
        assert done.exit_code == 1
    if status is not None:
        assert json.loads(done.stdout)["outcome"] == "too_few_samples"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategy", "ppo", "--model", "clerk"], "--strategy ppo: no such strategy; use one of yolo, lora, dpo"),
        (["--strategy", "ppo"], "--strategy ppo: no such strategy; use one of yolo, lora, dpo"),
        (["--strategy", "yolo", "--model", "clerk"], "--strategy yolo: model clerk is improved by lora, dpo"),
        (["--model", "digits", "--dataset", "x", "--samples", "/nowhere"], "--samples /nowhere: only with --manifest"),
        (["--strategy", "lora", "--model", "digits"], "--strategy lora: model digits is improved by yolo"),
        (["--dataset", "x"], "--model is missing: name one of those that could be meant: clerk, digits"),
        (["--model", "cats"], "models.cats: no such model; configured: clerk, digits"),
        (["--model", "clerk", "--dataset", "nothing.jsonl"], "--dataset nothing.jsonl: no such file"),
        (["--model", "digits", "--dataset", "nothing"], "no labels.jsonl is there"),
        (["--model", "digits", "--activate", "x"], "--activate x: needs --manifest or --dataset"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_fix(world: Path, arguments: list[str], said: str) -> None:
    done = call(world, *arguments)
    assert done.exit_code == 1
    assert said in done.output.replace(f"{Path.cwd()}/", "")


def test_a_run_that_fails_says_so_everywhere(world: Path) -> None:
    run = world / "run"
    done = call(world, "--model", "clerk", "--dataset", str(world / "dataset.jsonl"), "--output-dir", str(run))
    assert done.exit_code == 1
    said = json.loads(done.stdout)
    assert said["outcome"] == "failed"
    assert "checkpoint: no config.json is there" in said["reason"]
    assert json.loads((run / "metadata.json").read_text())["reason"] == said["reason"]
    assert json.loads((world / "latest.json").read_text())["outcome"] == "failed"
    card = (run / "README.md").read_text()
    assert "The run failed: there is no candidate." in card
    assert said["reason"] in card


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (12, "5 examples are held out, 10 must judge: what judges needs an answer of a person"),
        (60, "0 examples of what must not be forgotten, 10 are needed: freeze some with `trainer holdout freeze clerk"),
    ],
)
def test_what_no_gate_could_let_pass_is_not_trained(world: Path, given: int, said: str) -> None:
    complete(world)
    (world / "dataset.jsonl").write_text("".join(f"{line(number)}\n" for number in range(given)))
    done = call(world, "--model", "clerk", "--dataset", str(world / "dataset.jsonl"))
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert (told["outcome"], "train" in told["timings_s"]) == ("failed", False)
    assert said in told["reason"]
    assert not list((world / "data" / "trained").rglob("*.json")), "cron asks again when it is mended"


def test_lines_that_make_no_pair_are_named(world: Path) -> None:
    done = call(world, "--model", "clerk", "--strategy", "dpo", "--dataset", str(world / "dataset.jsonl"))
    assert done.exit_code == 1
    reason = json.loads(done.stdout)["reason"]
    assert "nothing is left to train on" in reason and "'no_partner': 60" in reason


def test_a_run_that_a_kill_left_is_continued_and_no_other(world: Path) -> None:
    from trainer.config import load_config
    from trainer.jobfile import TrainJob, continued, dataset_job

    def job(number: int) -> TrainJob:
        config = load_config(world / "trainer.toml")
        run = config.runs / f"clerk-2026010{number}T000000Z"
        return dataset_job(config, "clerk", "lora", world / "dataset.jsonl", run, created=f"day {number}", job=run.name)

    left = job(1)
    (left.run / "scratch").mkdir(parents=True)
    (left.run / "manifest.json").write_text(left.manifest.model_dump_json())
    again = continued(job(2))
    assert (again.run, again.manifest.job) == (left.run, left.run.name)
    told = json.loads(call(world, "--model", "clerk", "--dataset", str(world / "dataset.jsonl"), "--dry-run").stdout)
    assert told["output_dir"] == str(left.run)

    (world / "dataset.jsonl").write_text("".join(f"{line(number)}\n" for number in range(61)))
    assert continued(job(2)).run == job(2).run, "on other samples"
    (world / "dataset.jsonl").write_text("".join(f"{line(number)}\n" for number in range(60)))
    text = (world / "trainer.toml").read_text()
    (world / "trainer.toml").write_text(text.replace("epochs = 2", "epochs = 3"))
    assert continued(job(2)).run == job(2).run, "configured otherwise"
    (world / "trainer.toml").write_text(text)
    assert continued(job(2)).run == left.run
    (left.run / "metadata.json").write_text("{}")
    assert continued(job(2)).run == job(2).run, "it has ended"


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        folder = _new_folder(tmp_path, "clerk-20260101T000000Z")
        folder.mkdir()
        names.append(folder.name)
    assert names == ["clerk-20260101T000000Z", "clerk-20260101T000000Z-2", "clerk-20260101T000000Z-3"]
