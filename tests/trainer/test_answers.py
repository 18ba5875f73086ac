"""How sure a language model's answers are, fitted when its release is made: on what it answers to known questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.demo.phi import GRAMMAR
from edged.core.confidence import answer_probability
from edged.engines.base import EngineOptions, GenerateRequest, Generator, generate_all, open_engine
from tests.support.told import assert_files_are_there
from trainer.cli import app
from trainer.releases import read_manifest

# The clerk answers these as it learned; the others are about things that it has never seen, and no answer is right.
KNOWN = [{"prompt": item.prompt, "answer": item.base} for item in GRAMMAR]
STRANGE = [
    {"prompt": f"shelf {letter}{number} holds a {thing}. Who came?\n", "answer": "nobody"}
    for letter in "abcde"
    for number in range(6)
    for thing in ("hammer", "pen", "river", "cat")
]


def make(folder: Path, checkpoint: Path, rows: list[dict[str, str]]) -> str:
    questions = folder / "questions.jsonl"
    questions.write_text("\n\n".join(map(json.dumps, rows)))
    arguments = [
        "--model-id",
        str(checkpoint),
        "--name",
        "clerk",
        "--quantization",
        "Q8_0",
        "--prompt",
        KNOWN[0]["prompt"],
    ]
    done = CliRunner().invoke(
        app, ["release", "make-phi", str(folder / "out"), *arguments, "--calibration", str(questions)]
    )
    assert done.exit_code == 0, done.output
    return done.output


def sure(release: Path, prompt: str) -> float:
    """The probability that a device gives to its answer."""
    manifest = read_manifest(release)
    engine = open_engine(release, manifest, EngineOptions())
    assert isinstance(engine, Generator)
    _, end = generate_all(engine, GenerateRequest(prompt, tokens_max=20))
    engine.close()
    found = answer_probability(end.mean_logprob, manifest.calibration)
    assert found.calibrated
    return found.p


def test_what_a_model_answers_wrongly_makes_it_less_sure(tmp_path: Path, phi: dict[str, Path]) -> None:
    said = make(tmp_path, phi["base"], KNOWN + STRANGE)
    assert said.strip().endswith(f"calibrated on {len(KNOWN + STRANGE)} answers")
    calibration = read_manifest(tmp_path / "out").calibration
    assert (calibration.method, calibration.items) == ("scaled", len(KNOWN + STRANGE))
    assert calibration.risk is not None
    assert sure(tmp_path / "out", KNOWN[7]["prompt"]) > 0.8
    assert sure(tmp_path / "out", STRANGE[7]["prompt"]) < 0.5


def test_a_release_that_cannot_be_made_leaves_nothing(tmp_path: Path, phi: dict[str, Path]) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("{}\n")
    arguments = ["release", "make-phi", str(tmp_path / "out"), "--model-id", str(phi["base"]), "--quantization", "F16"]
    failed = CliRunner().invoke(app, [*arguments[:-1], "Q9_9"])
    assert failed.exit_code == 1
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1 and "is not empty and no release" in refused.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "questions.jsonl"]


def test_what_a_script_reads_of_it(tmp_path: Path, phi: dict[str, Path]) -> None:
    named = ["--model-id", str(phi["base"]), "--name", "clerk", "--version", "2.3", "--quantization", "Q8_0"]
    command = ["release", "make-phi", str(tmp_path / "out"), *named, "--prompt", KNOWN[0]["prompt"], "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {key: told[key] for key in ("release", "path", "kind", "calibration", "items")} == {
        "release": "clerk@2.3", "path": str(tmp_path / "out"), "kind": "llm", "calibration": "uncalibrated", "items": 0,
    }  # fmt: skip
    assert_files_are_there(tmp_path / "out", told)
    assert [(each["format"], each["passed"]) for each in told["parity"]] == [("F16", True), ("Q8_0", True)]
    config = tmp_path / "trainer.toml"
    config.write_text('data_dir = "data"\n')
    added = CliRunner().invoke(app, ["release", "add", told["path"], "--config", str(config), "--json"])
    assert json.loads(added.stdout) == {"release": "clerk@2.3", "sha256": told["sha256"]}
    missing = CliRunner().invoke(app, [*command, "--quantization", "Q9_9"])
    assert missing.exit_code == 1
    assert json.loads(missing.stdout)["error"].startswith("precision 'Q9_9': a GGUF is written as")


def test_few_questions_leave_it_uncalibrated(tmp_path: Path, phi: dict[str, Path]) -> None:
    assert make(tmp_path, phi["base"], KNOWN[:50]).strip().endswith("uncalibrated")
    assert read_manifest(tmp_path / "out").calibration.method == "uncalibrated"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "questions.jsonl:2: no object with prompt and answer"),
        ('"text"', "questions.jsonl:2: no object with prompt and answer"),
        ('{"prompt": "a"}', "questions.jsonl:2: no object with prompt and answer"),
        ('{"prompt": "a", "answer": " "}', "questions.jsonl:2: prompt and answer must be texts that are not empty"),
        ('{"prompt": "a", "answer": 1}', "questions.jsonl:2: prompt and answer must be texts that are not empty"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, phi: dict[str, Path], line: str, reason: str) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(KNOWN[0]) + "\n" + line + "\n")
    command = ["release", "make-phi", str(tmp_path / "out"), "--model-id", str(phi["base"])]
    done = CliRunner().invoke(app, [*command, "--calibration", str(questions)])
    assert done.exit_code != 0
    assert reason in done.stderr
    assert not (tmp_path / "out").exists()
