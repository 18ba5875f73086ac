"""`trainer gate show`: a person sees why a candidate was refused, before anything else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.models import make_release
from tests.unit.test_gate import CANDIDATE, CURRENT, verdict
from trainer.cli import app
from trainer.core.gate import Evidence, Verdict
from trainer.releases import Registry

REFUSED = verdict(replace(CANDIDATE, target=CURRENT.target, calibration_ece=0.3))
PASSED = verdict()


def shown(*arguments: str, config: Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["gate", "show", *arguments, "--config", str(config)])
    return done.exit_code, done.output


def evaluations(new: Evidence, old: Evidence) -> dict[str, Any]:
    """As a run's metadata and a release hold them."""
    sides = {"target": (new.target, old.target), "base": (new.base, old.base)}
    return {what: {"candidate": a.summary(), "current": b.summary()} for what, (a, b) in sides.items() if a and b}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A trainer with a refused run, a failed one, one that has not finished, and two releases."""
    path = tmp_path / "trainer.toml"
    path.write_text('data_dir = "data"\n')
    runs = tmp_path / "data" / "runs"

    def write(name: str, **values: Any) -> None:
        (runs / name).mkdir(parents=True)
        (runs / name / "metadata.json").write_text(json.dumps({"target": "toy@1.1", **values}))

    write("toy-1", outcome="refused", gate=REFUSED.to_dict(), evaluation=evaluations(CANDIDATE, CURRENT))
    write("toy-2", outcome="failed", reason="checkpoint toy.pt does not exist")
    (runs / "toy-3").mkdir()
    registry = Registry(tmp_path / "data" / "releases")
    for release, told in (("toy@1.0", {}), ("toy@1.2", evaluations(CANDIDATE, CURRENT) | {"gate": PASSED.to_dict()})):
        make_release(tmp_path / release, release, evaluation=told)
        registry.register(tmp_path / release)
    return path


def test_the_reasons_come_first_then_every_check(config: Path) -> None:
    status, text = shown("toy-1", config=config)
    assert status == 0
    lines = text.splitlines()
    assert lines[0] == f"toy@1.1 (run toy-1): REFUSED, 3 of {len(REFUSED.checks)} checks failed"
    assert [line.split(":")[0] for line in lines if line.startswith("- ")] == ["- calibration", "- gain", "- chance"]
    assert lines.index("") == next(n for n, line in enumerate(lines) if line.startswith("check ")) - 1
    assert "expected calibration error (at most): 0.3, bound 0.1" in text
    table = {line.split("  ")[0]: line.split() for line in lines[lines.index("") + 2 :] if line}
    assert table["calibration"] == ["calibration", "0.3", "0.1", "REFUSED"]
    assert table["latency"] == ["latency", "1", "2", "ok"]
    assert {check.name for check in REFUSED.checks} <= table.keys()
    assert ["target", "f1", f"{CANDIDATE.target.f1:.4g}", f"{CURRENT.target.f1:.4g}"] in [
        line.split() for line in lines
    ]  # type: ignore[union-attr]


def test_a_release_says_what_the_gate_said_when_it_passed(config: Path) -> None:
    status, text = shown("toy@1.2", config=config)
    assert status == 0
    assert text.splitlines()[0] == f"toy@1.2: passed, 0 of {len(PASSED.checks)} checks failed"
    assert not [line for line in text.splitlines() if line.startswith("- ")]
    _, more = shown("toy@1.2", "--reasons", config=config)
    assert len([line for line in more.splitlines() if line.startswith("- ")]) == len(PASSED.checks)


def test_a_language_models_figures_are_shown_too(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "runs" / "chat-1"
    folder.mkdir()
    told = {
        "candidate": {"release": "chat@1.1", "loss": 1.25},
        "base": {"release": "phi@1.0", "loss": 2.5},
        "parity": 0.1,
    }
    (folder / "metadata.json").write_text(
        json.dumps({"target": "chat@1.1", "gate": PASSED.to_dict(), "evaluation": told})
    )
    lines = [line.split() for line in shown("chat-1", config=config)[1].splitlines()]
    assert ["holdout", "figure", "candidate", "base"] in lines
    assert ["loss", "1.25", "2.5"] in lines


@pytest.mark.parametrize(("what", "expected"), [("toy-1", REFUSED), ("toy@1.2", PASSED)])
def test_json_is_the_whole_verdict(config: Path, what: str, expected: Verdict) -> None:
    told = json.loads(shown(what, "--json", config=config)[1])
    assert {key: told[key] for key in ("passed", "reasons", "checks")} == json.loads(json.dumps(expected.to_dict()))
    assert told["evaluation"]["target"]["candidate"]["n_images"] == 120


def test_a_folder_needs_no_configuration(config: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "data" / "runs" / "toy-1", tmp_path / "toy@1.2"):
        assert shown(str(folder), config=tmp_path / "none.toml")[0] == 0


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("toy@1.0", "toy@1.0: no verdict in"),
        ("toy-2", "no verdict in"),
        ("toy-2", "checkpoint toy.pt does not exist"),
        ("toy-3", "holds neither metadata.json (of a finished run) nor release.json"),
        ("toy@9.9", "registered: toy@1.0, toy@1.2"),
        ("toy-9", "nor a run; runs: toy-1, toy-2, toy-3"),
    ],
)
def test_without_a_verdict_it_says_why(config: Path, what: str, words: str) -> None:
    status, text = shown(what, config=config)
    assert status == 1
    assert words in text


@pytest.mark.parametrize(
    "damaged",
    [
        [],
        "text",
        {"gate": {}},
        {"gate": {"passed": True, "checks": [{}]}},
        {"gate": 5},
        {"evaluation": [1], "gate": {}},
    ],
)
def test_a_damaged_verdict_is_said_to_be_one(damaged: Any, config: Path) -> None:
    folder = config.parent / "data" / "runs" / "toy-9"
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps(damaged))
    status, said = shown("toy-9", config=config)
    assert status == 1 and "Traceback" not in said
    assert "metadata.json: " in said and ("damaged" in said or "changed by hand" in said)
