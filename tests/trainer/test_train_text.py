"""A language model learns from a dataset.jsonl, from the command line to a release that a device would take."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edged.engines.base import EngineOptions, GenerateRequest, generate_all, open_engine
from edged.overrides import read
from edged.slot import load
from tests.support.trained import EXAMPLES, run_trainer, summary, text_trainer, write_dataset
from trainer.config import load_config
from trainer.golden import PROMPTS
from trainer.jobfile import TrainJob, dataset_job
from trainer.kinds import begin
from trainer.likelihood import Said, checkpoint, shipped
from trainer.releases import Registry, read_manifest
from trainer.run import Run
from trainer.train import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, phi: dict[str, Path]) -> Path:
    """The trainer's folder after a run of `trainer train` on a data set with two broken lines."""
    folder = tmp_path_factory.mktemp("trainer")
    config = text_trainer(folder, phi)
    dataset = write_dataset(folder / "dataset.jsonl", EXAMPLES, "{broken", '{"goal": 3}')
    flags = ("--require-threshold", "--activate", folder / "overrides.toml")
    done = run_trainer(config, "train", "--strategy", "lora", "--dataset", dataset, *flags)
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    assert done.returncode == 0, done.stderr[-4000:]
    assert summary(done)["outcome"] == "passed"
    return folder


def run_of(world: Path) -> Path:
    return Path(json.loads((world / "stdout").read_text())["run"])


def job(world: Path, run: str, dataset: str = "dataset.jsonl") -> TrainJob:
    config = load_config(world / "trainer.toml")
    return dataset_job(config, "clerk", "lora", world / dataset, world / run, created="2026", job=run)


def test_the_summary_is_alone_on_stdout_and_progress_is_on_stderr(world: Path) -> None:
    said = json.loads((world / "stdout").read_text())
    assert said["summary"]["loss"] < said["summary"]["loss_before"] / 2
    assert said["summary"]["loss_base"] == said["summary"]["loss_before"]
    stderr = (world / "stderr").read_text()
    assert "train epoch 3/3 loss" in stderr
    assert "line 61" in stderr and "line 62" in stderr


def test_the_runs_folder_holds_what_people_and_programs_ask_for(world: Path) -> None:
    run = run_of(world)
    assert run.parent == world / "data" / "runs"
    datetime.datetime.strptime(run.name, "clerk-%Y%m%dT%H%M%SZ")
    metadata = json.loads((run / "metadata.json").read_text())
    assert (metadata["outcome"], metadata["strategy"], metadata["target"]) == ("passed", "lora", "clerk-lora@1.0")
    epochs = [row["epoch"] for row in metadata["history"]]
    assert epochs == sorted(epochs)
    assert epochs[-1] == 3
    assert metadata["samples"]["left_out"] == {"bad_line": 2}
    parts = [metadata["samples"][name] for name in ("training", "validation", "holdout")]
    assert sum(parts) == len(EXAMPLES)
    latest = json.loads((run.parent / "latest.json").read_text())
    assert latest == {"run": run.name, "outcome": "passed", "target": "clerk-lora@1.0"}
    for picture in ("loss.png", "metrics.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    card = (run / "README.md").read_text()
    for said in ("# clerk-lora@1.0", "clerk@1.0", "## Data", "## Training", "## Results", "## Gate", "## Limits",
                 "## How to reproduce", "## Licence", "(loss.png)", "(metrics.png)", "dataset.jsonl"):  # fmt: skip
        assert said in card
    assert not (run / "scratch").exists()


def test_what_is_made_is_an_adapter_release_that_a_device_proves(world: Path) -> None:
    candidate, base = run_of(world) / "candidate", Registry(world / "data" / "releases").get("clerk@1.0")
    manifest = read_manifest(candidate)
    assert (manifest.release, manifest.kind, manifest.engine) == ("clerk-lora@1.0", "lora", "llama")
    assert manifest.base == base.ref
    assert manifest.evaluation["gate"]["passed"] is True
    assert manifest.lineage["parent"]["release"] == "clerk@1.0"
    assert manifest.lineage["training"]["settings"]["epochs"] == 3
    loaded = load(base.ref, base.folder, base.manifest, EngineOptions(), "daemon")
    try:
        golden = json.loads((candidate / manifest.files[PROMPTS].path).read_text())
        prompt = golden[0]["prompt"]
        assert generate_all(loaded.generator, GenerateRequest(prompt, tokens_max=32))[0] != golden[0]["answer"]
        loaded.generator.attach(candidate / manifest.files["adapter"].path)
        for each in golden:
            assert generate_all(loaded.generator, GenerateRequest(each["prompt"], tokens_max=32))[0] == each["answer"]
            assert each["answer"].startswith(("PASS", "HOLD"))
    finally:
        loaded.engine.close()


def test_what_passed_is_registered_and_recorded_for_the_device_here(world: Path) -> None:
    said = json.loads((world / "stdout").read_text())["activated"]
    assert said == {"release": "clerk-lora@1.0", "overrides": str(world / "overrides.toml")}
    folder = Registry(world / "data" / "releases").get("clerk-lora@1.0").folder
    assert read(world / "overrides.toml") == {"clerk": folder}


def test_the_shipped_files_lose_what_the_checkpoint_loses(world: Path, phi: dict[str, Path]) -> None:
    base = Registry(world / "data" / "releases").get("clerk@1.0")
    run = run_of(world)
    said = [Said(each.prompt, each.adapter) for each in EXAMPLES[:5]]
    for peft, gguf in ((None, None), (run / "adapter", run / "candidate" / "adapter.gguf")):
        with checkpoint(phi["base"], peft) as trained, shipped(base.folder, base.manifest, gguf) as there:
            for (first, tokens), (second, others) in zip(trained.score(said), there.score(said), strict=True):
                assert tokens == others
                assert first == pytest.approx(second, abs=0.02)


def test_the_engine_finds_its_own_greedy_answer_as_likely_as_it_said(world: Path) -> None:
    base = Registry(world / "data" / "releases").get("clerk@1.0")
    prompt = EXAMPLES[0].prompt
    engine: Any = open_engine(base.folder, base.manifest, EngineOptions())
    answer, end = generate_all(engine, GenerateRequest(prompt))
    engine.close()
    with shipped(base.folder, base.manifest, None) as scorer:
        loss, tokens = scorer.one(Said(prompt, answer))
    assert tokens == end.answer_tokens + 1  # the end of text
    assert -loss / tokens == pytest.approx(end.mean_logprob, abs=1e-3)


def test_the_same_again_is_refused_once_it_is_released(world: Path) -> None:
    again = job(world, "again")
    assert again.manifest.target == "clerk-lora@1.1"
    result = train(again)
    assert result["outcome"] == "refused"
    failed = {check["name"] for check in result["gate"]["checks"] if not check["passed"]}
    assert failed == {"new_bytes", "gain (current)"}, "the same data and seed give the same bytes"
    assert not (again.run / "candidate" / "release.json").exists()
    card = (again.run / "README.md").read_text()
    assert "The gate refused it: it is not released." in card
    assert "**REFUSED**" in card


def test_a_frozen_holdout_judges_and_must_not_change(world: Path) -> None:
    write_dataset(world / "holdout.jsonl", EXAMPLES[:12])
    whole = job(world, "held")
    own = whole.config.text("clerk").model_copy(update={"holdout": world / "holdout.jsonl"})
    whole = replace(whole, config=whole.config.model_copy(update={"models": {"clerk": own}}))
    (world / "held").mkdir()
    run = Run(whole)
    begin(run, "llm").read()
    samples = run.facts["samples"]
    assert (samples["holdout"], samples["left_out"]["in_holdout"]) == (12, 12)
    write_dataset(world / "holdout.jsonl", EXAMPLES[:11])
    result = train(whole)
    assert result["outcome"] == "failed"
    assert "has changed since it was first used" in result["reason"]
