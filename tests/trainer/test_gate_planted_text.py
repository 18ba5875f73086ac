"""Failures planted on the real way of an adapter: real trainings of the demo's Phi, real files, the device's engine; each is
stopped, and for its own reason. The base that devices run is quantised, as it mostly is."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.demo.phi import GRAMMAR, PhiExample
from tests.support.broken_adapters import exchanged, rewrite, without
from tests.support.trained import EXAMPLES, line, text_trainer, write_dataset
from trainer.config import load_config
from trainer.core.checks import Check
from trainer.core.parity import PARITY_KEY
from trainer.export.gguf import quantize_gguf
from trainer.jobfile import dataset_job
from trainer.kinds import begin
from trainer.kinds.language import ADAPTER_FILE
from trainer.releases import read_manifest
from trainer.run import Run
from trainer.train import train

HELD_OUT = [each for each in GRAMMAR[3::15] if each not in EXAMPLES]
ANSWERS = [each.adapter for each in EXAMPLES]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, phi: dict[str, Path]) -> dict[str, Path]:
    """The demo's Phi, and its file as Q8_0."""
    file = tmp_path_factory.mktemp("base") / "model.gguf"
    quantize_gguf(phi["model_gguf"], file, "Q8_0")
    return {**phi, "model_gguf": file}


def planned(
    folder: Path,
    phi: dict[str, Path],
    answers: Sequence[str],
    held_out: Sequence[PhiExample] = HELD_OUT,
    **settings: str,
) -> Any:
    """The job of a training on EXAMPLES with these answers, judged by questions of a file with the right ones."""
    folder.mkdir(exist_ok=True)
    write_dataset(folder / "holdout.jsonl", held_out)
    rows = [line(each, answer) for each, answer in zip(EXAMPLES, answers, strict=True)]
    data = write_dataset(folder / "dataset.jsonl", [], *rows)
    config = load_config(text_trainer(folder, phi, holdout=f'"{folder / "holdout.jsonl"}"', **settings))
    return dataset_job(config, "clerk", "lora", data, folder / "run", created="2026", job="run")


def refused(checks: Sequence[Check]) -> set[str]:
    return {each.name for each in checks if not each.passed}


@dataclass
class Trained:
    """A training that came as far as its calibration; `adapter`: a copy of its file."""

    run: Run
    training: Any
    adapter: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, quantised: dict[str, Path]) -> Trained:
    job = planned(tmp_path_factory.mktemp("trainer"), quantised, ANSWERS)
    job.run.mkdir()
    run = Run(job)
    training: Any = begin(run, "llm")
    training.read()
    for step in (training.check, training.tune, training.export, training.calibrate):
        step()
    kept = tmp_path_factory.mktemp("kept") / ADAPTER_FILE
    shutil.copyfile(run.candidate / ADAPTER_FILE, kept)
    return Trained(run, training, kept)


def test_a_good_adapter_passes_and_its_release_says_how_near_it_is(trained: Trained) -> None:
    shutil.copyfile(trained.adapter, trained.run.candidate / ADAPTER_FILE)
    trained.training.evaluate()
    verdict = trained.training.judge()
    assert verdict.reasons == []
    assert {each.name for each in verdict.checks} >= {
        "parity (logits logits_max)", "parity (logits kl)", "parity (adapter effect_off)", "matching", "matching (base)"
    }  # fmt: skip
    trained.training.complete(verdict)
    (report,) = read_manifest(trained.run.candidate).lineage[PARITY_KEY]
    assert (report["format"], report["items"], report["passed"]) == ("lora", 8, True)
    assert report == trained.run.facts[PARITY_KEY][0]
    assert {row["metric"]: row["value"] < row["tolerance"] / 10 for row in report["metrics"]} == dict.fromkeys(
        ("logits_max", "logits_mean", "top1_changed", "kl", "effect_off"), True
    ), "what the base's quantisation rounds is not counted against the adapter"
    assert not list(trained.run.folder.rglob(".export-*")), "the base that was made for it is gone"


# name -> the file that ships, made of the good one; the losses notice none of these
BROKEN: dict[str, Callable[[Path, Path], object]] = {
    "the matrices of one weight are lost": lambda good, out: rewrite(good, out, without("blk.1.attn_output")),
    "alpha is another one": lambda good, out: rewrite(good, out, alpha=13.0),
    "gate and up are exchanged": lambda good, out: rewrite(
        good, out, exchanged("blk.1.ffn_up", slice(0, 384), slice(384, 768))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_does_something_else_than_what_was_trained_is_stopped(trained: Trained, name: str) -> None:
    BROKEN[name](trained.adapter, trained.run.candidate / ADAPTER_FILE)
    trained.training.evaluate()
    verdict = trained.training.judge()
    failed = refused(verdict.checks)
    assert any(each.startswith("parity (") for each in failed)
    assert any("export against what it was made of, " in reason for reason in verdict.reasons)
    assert "export" not in failed, "a loss alone does not see it"
    assert trained.run.facts[PARITY_KEY][0]["passed"] is False


def shuffled(seed: int = 3) -> list[str]:
    """Every question with the answer of another one."""
    answers = list(ANSWERS)
    random.Random(seed).shuffle(answers)
    return answers


def test_shuffled_labels_are_stopped(tmp_path: Path, quantised: dict[str, Path]) -> None:
    # After one epoch it knows much of what the base knew; after more of them it is seen the more easily.
    job = planned(tmp_path, quantised, shuffled(), tuning="{ epochs = 1 }")
    told = train(job)
    assert told["outcome"] == "refused", told["reason"]
    held = told["evaluation"]["held_out"]
    assert held["candidate"]["loss"] < held["base"]["loss"] - 1, (
        "it learned what answers look like, which no loss tells"
    )
    failed = {each["name"] for each in told["gate"]["checks"] if not each["passed"]}
    assert failed == {"matching (base)"}
    assert "when asked their own questions" in told["reason"]
    assert not (job.run / "candidate" / "release.json").exists()


def test_shuffled_labels_that_judge_too_are_stopped(tmp_path: Path, quantised: dict[str, Path]) -> None:
    """As when a teacher confuses its questions all the time."""
    answers = [each.adapter for each in HELD_OUT]
    random.Random(5).shuffle(answers)
    wrong = [PhiExample(each.prompt, each.base, answer) for each, answer in zip(HELD_OUT, answers, strict=True)]
    told = train(planned(tmp_path, quantised, shuffled(), wrong))
    assert told["outcome"] == "refused", told["reason"]
    assert "matching" in {each["name"] for each in told["gate"]["checks"] if not each["passed"]}


def test_answers_that_are_all_the_same_cost_no_training(tmp_path: Path, quantised: dict[str, Path]) -> None:
    same = [PhiExample(each.prompt, each.base, "PASS") for each in HELD_OUT]
    job = planned(tmp_path, quantised, ANSWERS, same)
    told = train(job)
    assert (told["outcome"], "train" in told["timings_s"]) == ("failed", False)
    assert "0 pairs of held-out examples have different answers, 5 must show" in told["reason"]
    assert json.loads((job.run / "metadata.json").read_text())["outcome"] == "failed"
