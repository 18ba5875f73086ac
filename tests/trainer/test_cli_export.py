"""`trainer export`: files with their parity, or nothing and exit status 1."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from click.testing import Result
from peft import LoraConfig, get_peft_model
from tiny_phi import save_phi3
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.support.checkpoints import SIZE, checkpoint
from tests.support.exports import pictures
from trainer.cli import app


def export(source: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["export", str(source), "--out", str(out), *options])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(pictures()):
        assert cv2.imwrite(str(folder / f"{number}.png"), image)
    return folder


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phi") / "phi"
    save_phi3(folder, max_position_embeddings=256, original_max_position_embeddings=256)
    return folder


def test_a_vision_model_and_its_parity(images: Path, tmp_path: Path) -> None:
    source, size = checkpoint("yolo11n-cls.yaml"), ("--imgsz", str(SIZE))
    done = export(source, tmp_path / "out", "--calibration", str(images), *size)
    assert done.exit_code == 0, done.output
    assert "labels_changed" in done.output
    assert "FAILED" not in done.output
    told = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert told["files"] == {"model": "model.onnx"}
    assert [(each["format"], each["passed"]) for each in told["parity"]] == [("fp32", True), ("int8", True)]
    again = export(source, tmp_path / "out", "--precision", "fp16", "--golden", str(images), *size, "--json")
    assert again.exit_code == 0, again.output
    printed = json.loads(again.stdout)
    assert printed["files"] == {"model": str(tmp_path / "out" / "model.onnx")}
    assert [each["format"] for each in printed["parity"]] == ["fp32", "fp16"]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_language_model_in_both_formats(phi: Path, tmp_path: Path) -> None:
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden" / "ask.jsonl").write_text('{"prompt": "Name it."}\n\n{"prompt": "What next?"}\n')
    (tmp_path / "golden" / "more.txt").write_text("a line\n")
    given = ("--golden", str(tmp_path / "golden"), "--json")
    gguf = export(phi, tmp_path / "gguf", "--format", "gguf", "--precision", "q8_0", *given)
    assert gguf.exit_code == 0, gguf.output
    told = json.loads(gguf.stdout)
    assert [(each["format"], each["items"]) for each in told["parity"]] == [("F16", 4), ("Q8_0", 4)]
    onnx = export(phi, tmp_path / "onnx", "--precision", "fp16", *given)
    assert onnx.exit_code == 0, onnx.output
    told = json.loads(onnx.stdout)
    assert [(each["format"], each["items"]) for each in told["parity"]] == [("fp32", 5), ("fp16", 5)]
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {
        "model.onnx", "tokenizer.json", "config.json", "parity.json"
    }  # fmt: skip


def adapter(base: Path, folder: Path) -> Path:
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["qkv_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(folder)
    return folder


def test_an_adapter_finds_its_base(phi: Path, tmp_path: Path) -> None:
    done = export(adapter(phi, tmp_path / "lora"), tmp_path / "out", "--format", "gguf-lora")
    assert done.exit_code == 0, done.output
    assert "effect_off" in done.output
    assert (tmp_path / "out" / "adapter.gguf").is_file()


def test_what_fails_parity_ends_with_1_and_leaves_nothing(phi: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter(phi, tmp_path / "lora"), tmp_path / "none")
    # An adapter that does nothing proves nothing.
    from safetensors.torch import load_file, save_file

    weights: dict[str, Any] = load_file(tmp_path / "none" / "adapter_model.safetensors")
    save_file({name: each * 0 for name, each in weights.items()}, tmp_path / "none" / "adapter_model.safetensors")
    done = export(tmp_path / "none", tmp_path / "out", "--format", "gguf-lora", "--base", str(phi), "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert (told["passed"], told["files"]) == (False, {})
    assert "nothing was kept" in done.stderr
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named_with_the_fix(images: Path, phi: Path, tmp_path: Path) -> None:
    source, out = checkpoint("yolo11n-cls.yaml"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Path, tuple[str, ...], str]] = [
        (source, ("--format", "coreml"), "--format coreml: use onnx, gguf, gguf-lora"),
        (source, (), "int8 needs --calibration FOLDER"),
        (source, ("--precision", "fp32"), "parity needs --golden FOLDER"),
        (source, ("--calibration", str(tmp_path / "empty")), "empty: no pictures"),
        (source, ("--precision", "int4", "--golden", str(images)), "'int4': vision models are written as fp32"),
        (phi, ("--format", "gguf", "--precision", "Q9_9"), "'Q9_9': a GGUF is written as f32, f16, Q8_0"),
        (phi, ("--format", "gguf", "--golden", str(tmp_path / "empty")), "empty: no texts are in it"),
    ]
    shutil.copytree(phi, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes((phi / "model.safetensors").read_bytes()[:1000])
    cases.append((tmp_path / "cut", ("--format", "gguf"), "cut: not a whole checkpoint"))
    for given, options, message in cases:
        done = export(given, out, *options)
        assert done.exit_code == 1
        assert message in " ".join(done.stderr.split()), done.stderr
    assert not out.exists()


def test_the_help_is_light() -> None:
    heavy = "import sys; from typer.testing import CliRunner; from trainer.cli import app; "
    heavy += "assert CliRunner().invoke(app, ['export', '--help']).exit_code == 0; "
    heavy += "print(sorted({'torch', 'transformers', 'ultralytics', 'onnx', 'cv2', 'gguf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nobody_elses_files_are_taken_away(phi: Path, tmp_path: Path) -> None:
    """Only what an earlier export wrote is replaced, and never a checkpoint."""
    own = tmp_path / "own"
    shutil.copytree(phi, own)
    before = sorted(path.name for path in own.iterdir())
    refused = export(own, own, "--format", "gguf", "--precision", "f16")
    assert refused.exit_code == 1 and "the checkpoint lies there" in refused.output
    assert sorted(path.name for path in own.iterdir()) == before
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for precision in ("f16", "f32"):
        assert export(own, out, "--format", "gguf", "--precision", precision).exit_code == 0
        assert (out / "notes.txt").read_text() == "mine"
        assert sorted(path.name for path in out.iterdir()) == ["model.gguf", "notes.txt", "parity.json"]


@pytest.mark.parametrize(("place", "said"), [("file", "a file; name a folder"), ("file/x", "Not a directory")])
def test_a_place_that_cannot_be_written_is_said_at_once(place: str, said: str, phi: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = export(phi, tmp_path / place, "--format", "gguf")
    assert done.exit_code == 1 and said in done.output, done.output
