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
        (["--strategy", "ppo", "--model", "clerk"], "--strategy ppo: model clerk is improved by lora, dpo"),
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


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        folder = _new_folder(tmp_path, "clerk-20260101T000000Z")
        folder.mkdir()
        names.append(folder.name)
    assert names == ["clerk-20260101T000000Z", "clerk-20260101T000000Z-2", "clerk-20260101T000000Z-3"]
