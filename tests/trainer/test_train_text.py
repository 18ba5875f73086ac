"""A language model learns from a dataset.jsonl, from the command line to a release that a device would take."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.demo.phi import GRAMMAR
from edged.core.confidence import answer_probability
from edged.engines.base import EngineOptions, GenerateRequest, generate_all, open_engine
from edged.overrides import read
from edged.slot import Slot, load
from edged.wire.manifest import ReleaseRef
from tests.support.trained import EXAMPLES, run_trainer, summary, text_trainer, write_dataset
from trainer.config import load_config
from trainer.golden import PROMPTS
from trainer.jobfile import TrainJob, dataset_job
from trainer.kinds import begin
from trainer.likelihood import Said, checkpoint, shipped
from trainer.releases import Registry, read_manifest
from trainer.run import Run
from trainer.text_holdout import freeze, read_sets
from trainer.train import train
from trainer.trained import had


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
    parts = [metadata["samples"][name] for name in ("training", "validation", "calibration", "holdout")]
    assert sum(parts) == len(EXAMPLES)
    assert metadata["samples"]["provenance"] == {"person ann": parts[0] + parts[1]}
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


@pytest.mark.parametrize(
    ("tuning", "said"),
    [
        ({"lora": {"target_modules": ["qkv_prj"]}}, "lora.target_modules = 'qkv_prj': no such module in this model"),
        ({"adapter": Path("/nowhere")}, "adapter = '/nowhere': no PEFT adapter is there"),
    ],
)
def test_settings_that_the_checkpoint_cannot_honour_cost_no_sample(
    world: Path, tuning: dict[str, Any], said: str
) -> None:
    whole = job(world, "odd")
    before = had(whole.config, "clerk")
    own = whole.config.text("clerk").model_copy(update={"tuning": tuning})
    result = train(replace(whole, config=whole.config.model_copy(update={"models": {"clerk": own}})))
    assert (result["outcome"], "train" in result["timings_s"]) == ("failed", False)
    assert said in result["reason"]
    assert not list((whole.config.data_dir / "trained" / "clerk").glob("odd-*"))
    assert had(whole.config, "clerk") == before


def test_too_few_answers_leave_it_uncalibrated_which_the_card_and_the_gate_say(world: Path) -> None:
    run = run_of(world)
    assert read_manifest(run / "candidate").calibration.method == "uncalibrated"
    metadata = json.loads((run / "metadata.json").read_text())
    (said,) = (each for each in metadata["gate"]["checks"] if each["name"] == "calibrated")
    assert said["passed"]
    assert f"uncalibrated: {metadata['samples']['calibration']} answers are too few" in said["reason"]
    card = (run / "README.md").read_text()
    assert "| person ann |" in card
    assert f"Uncalibrated: {metadata['samples']['calibration']} answers to fit confidence on, 100 are needed." in card


def test_what_judged_is_kept_and_a_later_data_set_with_nearly_the_same_does_not_train(world: Path) -> None:
    config = load_config(world / "trainer.toml")
    frozen = read_sets(config, "clerk")
    told = read_manifest(run_of(world) / "candidate").evaluation["holdout_sets"]
    assert {name: each["entries"] for name, each in told.items()} == {n: len(e) for n, e in frozen.items() if e}
    judged = frozen["gate"][0]
    again = next(each for each in EXAMPLES if each.prompt == judged.prompt)
    write_dataset(world / "later.jsonl", [replace(again, prompt=again.prompt.replace(". What", ": what") + " ")])
    later = job(world, "later", "later.jsonl")
    run = Run(later)
    begin(run, "llm").read()
    samples = run.facts["samples"]
    assert (samples["training"], samples["validation"], samples["holdout"]) == (0, 0, len(frozen["gate"]) + 1)


def test_a_frozen_holdout_judges_and_must_not_change(tmp_path: Path, phi: dict[str, Path]) -> None:
    config = load_config(text_trainer(tmp_path, phi, holdout=f'"{tmp_path / "holdout.jsonl"}"'))
    write_dataset(tmp_path / "dataset.jsonl")
    write_dataset(tmp_path / "holdout.jsonl", EXAMPLES[:12])
    whole = dataset_job(
        config, "clerk", "lora", tmp_path / "dataset.jsonl", tmp_path / "held", created="2026", job="held"
    )
    run = Run(whole)
    training: Any = begin(run, "llm")
    training.read()
    samples = run.facts["samples"]
    assert (samples["holdout"], samples["left_out"]) == (12, {"in_holdout": 12})
    freeze(config, "clerk", training.fresh, 1.0)  # as every training does before it begins
    write_dataset(tmp_path / "holdout.jsonl", EXAMPLES[:11])
    result = train(whole)
    assert result["outcome"] == "failed"
    assert "has changed since it was first used" in result["reason"]


PROFILE = """
name = "ours"
[slot]
threads = 1
providers = ["cpu"]
prove_s_max = 40.0
[slot.language]
latency_ms_max = 5000.0
[carries]
machine_mib = 512
precision = "int8"
image_size = 320
llm = { model = "phi", precision = "Q8_0", context = 256, file_mib = 8, memory_mib = 400 }
"""


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, phi: dict[str, Path]) -> dict[str, Any]:
    """A run on the whole grammar, of which two fifths calibrate, for devices of a profile; `run` is its folder."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "ours.toml").write_text(PROFILE)
    settings = {"calibration_share": "0.4", "holdout_share": "0.2", "profiles": f'["{folder / "ours.toml"}"]'}
    config = load_config(text_trainer(folder, phi, **settings))
    dataset = write_dataset(folder / "dataset.jsonl", GRAMMAR)
    run = folder / "run"
    whole = dataset_job(config, "clerk", "lora", dataset, run, created="2026", job="run")
    return {**train(whole), "folder": run, "base": Registry(config.releases).get("clerk@1.0")}


def test_an_adapter_carries_its_own_calibration_and_a_device_uses_it(calibrated: dict[str, Any]) -> None:
    assert calibrated["outcome"] == "passed", calibrated["reason"]
    told, manifest = calibrated["calibration"], read_manifest(calibrated["folder"] / "candidate")
    assert manifest.calibration.method == "scaled"
    assert manifest.calibration.items == told["items"] == calibrated["samples"]["calibration"] > 100
    assert manifest.calibration.risk is not None
    assert told["ece"] < 0.1
    base = calibrated["base"]
    slot = Slot("clerk")
    slot.flip(load(base.ref, base.folder, base.manifest, EngineOptions(), "daemon"))
    try:
        slot.attach(manifest_ref(manifest), calibrated["folder"] / "candidate" / "adapter.gguf", manifest.calibration)
        with slot.lease() as live:
            sure = []
            for prompt in (EXAMPLES[0].prompt, "shelf b4 holds a hammer. Who came?\n"):
                _, end = generate_all(live.generator, GenerateRequest(prompt, tokens_max=20))
                sure.append(answer_probability(end.mean_logprob, live.calibration))
        assert all(each.calibrated for each in sure)
        assert sure[0].p > sure[1].p
    finally:
        slot.stop()
    assert "Confidence was fitted on" in (calibrated["folder"] / "README.md").read_text()


def manifest_ref(manifest: Any) -> ReleaseRef:
    return ReleaseRef(release=manifest.release, sha256="0" * 64)


def test_base_and_adapter_are_measured_beside_what_runs_now(calibrated: dict[str, Any]) -> None:
    checks = {each["name"]: each for each in calibrated["gate"]["checks"]}
    ours = next(name for name in checks if name.startswith("size ("))[6:-1]
    base, adapter = calibrated["base"].manifest.files["model"], calibrated["folder"] / "candidate" / "adapter.gguf"
    assert checks[f"size ({ours})"]["value"] == pytest.approx((base.bytes + adapter.stat().st_size) / 2**20)
    assert 20 < checks[f"memory ({ours})"]["value"] < 400
    for name in ("latency", f"latency ({ours})"):
        assert 0 < checks[name]["value"] < 5000
    figures = calibrated["evaluation"]["held_out"]
    assert all(figures[side]["latency_ms_median"] > 0 for side in ("base", "candidate"))
