"""A language model learns to prefer one answer over another (DPO), from dataset.jsonl to a release."""

from __future__ import annotations

import json
from pathlib import Path

from bench.demo.phi import GRAMMAR
from tests.support.trained import text_trainer
from trainer.config import load_config
from trainer.jobfile import dataset_job
from trainer.releases import read_manifest
from trainer.train import train
from trainer.tuners.settings import LoraSettings

# From a score of 0.8 on it may accept; the base does from 0.5 on, and has words for both.
PAIRS = [each for each in GRAMMAR if each.base.startswith("accept") and each.adapter.startswith("HOLD")]


def test_pairs_make_an_adapter_that_prefers_the_wanted_answer(tmp_path: Path, phi: dict[str, Path]) -> None:
    config = load_config(text_trainer(tmp_path, phi))
    # DPO cannot adapt the output layer.
    modules = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    own = config.text("clerk").model_copy(
        update={"lora": LoraSettings(r=8, lora_alpha=16, target_modules=modules), "lr": 0.002, "epochs": 4}
    )
    config = config.model_copy(update={"models": {"clerk": own}})
    lines = []
    for each in PAIRS:
        steps = [
            {"tool": "generate", "output": each.base, "status": "failure"},
            {"tool": "escalate", "kind": "person", "status": "success"},
        ]
        row = {"goal": each.prompt, "context_summary": "", "plan": [{"tool": "generate"}], "execution": steps}
        lines.append(json.dumps({**row, "summary": each.base.replace("accept", "ask the teacher about")}))
    (tmp_path / "dataset.jsonl").write_text("\n".join(lines) + "\n")
    job = dataset_job(config, "clerk", "dpo", tmp_path / "dataset.jsonl", tmp_path / "run", created="2026", job="run")
    assert len(job.manifest.samples) == len(PAIRS)
    assert {each.label["other"] for each in job.manifest.samples} == {each.base for each in PAIRS}
    result = train(job)
    assert result["outcome"] == "passed", result["reason"]
    held_out = result["evaluation"]["held_out"]
    assert held_out["base"]["preferred"] == 0.0, "the base says the other answer"
    assert held_out["candidate"]["preferred"] > 0.8
    assert held_out["candidate"]["margin"] > held_out["base"]["margin"]
    assert {"gain", "wanted", "export"} <= {check["name"] for check in result["gate"]["checks"]}
    assert read_manifest(tmp_path / "run" / "candidate").lineage["training"]["strategy"] == "dpo"
    assert "preferred" in (tmp_path / "run" / "README.md").read_text()
