"""A trainer with a language model to improve: the demo's clerk, registered, and a data set of its new rule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.demo.phi import GRAMMAR, PhiExample
from tests.support.hosted import clerk
from trainer.releases import Registry

# As the demo's adapter: every fifth example, three epochs, is enough to learn most of the rule.
SETTINGS = """
[models.clerk]
kind = "llm"
checkpoint = "{checkpoint}"
epochs = 3
batch = 8
lr = 0.005
validation_share = 0.05
threads = 1
# A busy machine makes answers of a few milliseconds slow.
gate = {{ kept_examples_min = 0, latency_slack_ms = 60000 }}
lora = {{ r = 8, lora_alpha = 16, target_modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"] }}
"""
EXAMPLES: Sequence[PhiExample] = GRAMMAR[::5]


def line(item: PhiExample, answer: str | None = None) -> str:
    """A line of dataset.jsonl: a request whose answer somebody else gave."""
    row = {
        "goal": item.prompt,
        "context_summary": "",
        "plan": [{"tool": "generate", "arguments": {}}],
        "execution": [{"tool": "escalate", "kind": "person", "who": "ann", "status": "success"}],
        "summary": answer or item.adapter,
    }
    return json.dumps(row)


def write_dataset(path: Path, items: Sequence[PhiExample] = EXAMPLES, *more: str) -> Path:
    """A dataset.jsonl of these examples, with more lines behind them."""
    path.write_text("".join(f"{each}\n" for each in (*map(line, items), *more)))
    return path


def text_trainer(folder: Path, phi: dict[str, Path], **changes: str) -> Path:
    """A configuration with the registered base `clerk@1.0`; `changes`: further keys of the model, as TOML."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "trainer.toml"
    more = "".join(f"{key} = {value}\n" for key, value in changes.items())
    config.write_text('data_dir = "data"\n' + SETTINGS.format(checkpoint=phi["base"].resolve()) + more)
    Registry(folder / "data" / "releases").register(clerk(folder / "clerk-1.0", phi["model_gguf"]))
    return config


def run_trainer(config: Path, *arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`trainer ARGUMENTS --config CONFIG` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "trainer", *map(str, arguments), "--config", str(config)],
        capture_output=True, text=True, timeout=timeout, check=False, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a command said on standard output, which is one JSON object and nothing else."""
    try:
        value = json.loads(done.stdout)
    except ValueError:
        raise AssertionError(f"not JSON:\n{done.stdout}\n{done.stderr[-4000:]}") from None
    assert isinstance(value, dict)
    return value
