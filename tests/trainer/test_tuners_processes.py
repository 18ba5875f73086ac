"""Trainings in processes of their own: two that share the work, one that is killed, one whose memory is full."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_phi import save_phi2, save_phi3

from trainer.tuners.base import Work, tuner
from trainer.tuners.run import write_work
from trainer.tuners.settings import LoraSettings

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    {"prompt": f"line {n} reads {n % 3}", "answer": f" ask {'abcd'[n % 4]}" + " again" * (n % 2)} for n in range(24)
]
PAIRS = [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": " 12345"} for row in EXAMPLES]
DATA: dict[str, Any] = {"lora": EXAMPLES, "dpo": PAIRS}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "phi"
    save_phi3(folder, initializer_range=0.05)
    return folder


def work(base: Path, out: Path, name: str = "lora", held_out: Any = (), **settings: Any) -> Path:
    """`work.json` for a training whose folder is `out`."""
    asked = {"epochs": 3, "batch": 8, "learning_rate": 5e-3, "lora": LoraSettings(r=4, lora_dropout=0.1), **settings}
    given = tuner(name).settings(**asked)
    job = Work(base, DATA[name], out, out.with_name(f"{out.name}-scratch"), given, seed=5, held_out=held_out)
    return write_work(out.with_name(f"{out.name}.json"), name, job)


def environment() -> dict[str, str]:
    """One thread a process, no network, and nothing of whoever launched the tests in several processes."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def tuned(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def alone(job: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "trainer.tuners.run", str(job)]
    return tuned(subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=250))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def furthest(one: Path, two: Path) -> float:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


@pytest.mark.parametrize("name", ["lora", "dpo"])
def test_two_processes_train_what_one_trains(base: Path, tmp_path: Path, name: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lora = LoraSettings(r=4)  # without dropout: its draws differ from process to process
    job = work(base, tmp_path / "two", name, lora=lora)
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_ip", "127.0.0.1",
        "--main_process_port", str(port), "--num_cpu_threads_per_process", "1", "-m", "trainer.tuners.run", str(job),
    ]  # fmt: skip
    done = subprocess.run(launch, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=250)
    two, one = tuned(done), alone(work(base, tmp_path / "one", name, lora=lora))
    assert len(done.stdout.splitlines()) == 1  # the first process alone speaks
    steps = [json.loads(line)["step"] for line in done.stderr.splitlines() if line.startswith('{"epoch"')]
    assert steps == sorted(set(steps)) == list(range(1, 10))
    assert two["facts"]["processes"] == 2 and one["facts"]["processes"] == 1
    assert two["facts"]["batch"] == {"step": 8, "at_once": 4, "passes": 1}
    assert two["history"][-1]["loss"] < two["history"][0]["loss"]
    moved = max(float(tensor.abs().max()) for key, tensor in weights(tmp_path / "one").items() if "lora_B" in key)
    # Sums in another order, and nothing else; AdamW makes much of little where a gradient is nearly none.
    assert furthest(tmp_path / "one", tmp_path / "two") < 0.02 * moved
    assert [a["loss"] for a in one["history"]] == pytest.approx([b["loss"] for b in two["history"]], abs=2e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "one.json", "two", "two.json"]
