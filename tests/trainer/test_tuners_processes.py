"""Trainings in processes of their own: two that share the work, one that is killed, one whose memory is full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_phi import save_phi2, save_phi3
from transformers import Phi3ForCausalLM

from trainer.tuners.base import Tuned, Work, tuner
from trainer.tuners.run import main, read_work, write_work
from trainer.tuners.settings import LoraSettings, SettingsError

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    {"prompt": f"line {n} reads {n % 3}", "answer": f" ask {'abcd'[n % 4]}" + " again" * (n % 2)} for n in range(24)
]
PAIRS = [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": " 12345"} for row in EXAMPLES]
DATA: dict[str, Any] = {"lora": EXAMPLES, "dpo": PAIRS}


pytestmark = pytest.mark.usefixtures("one_thread")


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


def changed(job: Path, **told: Any) -> Path:
    job.write_text(json.dumps(json.loads(job.read_text()) | told))
    return job


def environment() -> dict[str, str]:
    """One thread a process, no network, and nothing of whoever launched the tests in several processes."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def tuned(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def alone(job: Path) -> Tuned:
    """The same training in this process, on one thread like the others."""
    chosen, asked = read_work(job)
    return chosen.tune(asked)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def furthest(one: Path, two: Path) -> float:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


# As docs/training.md has them. Without --main_process_port accelerate takes 29500, which may be somebody else's.
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--main_process_port", "0"]


@pytest.mark.parametrize(
    ("name", "launcher"), [("lora", TORCHRUN), ("dpo", ACCELERATE)], ids=["torchrun", "accelerate"]
)
def test_two_processes_train_what_one_trains(base: Path, tmp_path: Path, name: str, launcher: list[str]) -> None:
    lora = LoraSettings(r=4)  # without dropout: its draws differ from process to process
    job = work(base, tmp_path / "two", name, lora=lora)
    launch = [sys.executable, "-m", *launcher, "-m", "trainer.tuners.run", str(job)]
    alone_on_cpus = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, env=alone_on_cpus, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    two, one = tuned(done), alone(work(base, tmp_path / "one", name, lora=lora))
    assert len(done.stdout.splitlines()) == 1  # the first process alone speaks
    steps = [json.loads(line)["step"] for line in done.stderr.splitlines() if line.startswith('{"epoch"')]
    assert steps == sorted(set(steps)) == list(range(1, 10))
    assert two["facts"]["processes"] == 2 and one.facts["processes"] == 1
    assert two["facts"]["batch"] == {"step": 8, "at_once": 4, "passes": 1}
    assert two["history"][-1]["loss"] < two["history"][0]["loss"]
    moved = max(float(tensor.abs().max()) for key, tensor in weights(tmp_path / "one").items() if "lora_B" in key)
    # Sums in another order, and nothing else.
    assert furthest(tmp_path / "one", tmp_path / "two") < 1e-3 * moved
    assert [a["loss"] for a in one.history] == pytest.approx([b["loss"] for b in two["history"]], abs=2e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "one.json", "two", "two.json"]


def killed(job: Path, step: int) -> None:
    """Start a training and kill it with SIGKILL when it has told of `step`."""
    command = [sys.executable, "-m", "trainer.tuners.run", str(job)]
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith('{"epoch"') and json.loads(line)["step"] >= step:
            process.kill()
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "".join(said)


@pytest.mark.parametrize("name", ["lora", "dpo"])
def test_a_killed_training_continues_and_ends_with_the_same_adapter(base: Path, tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {"epochs": 12, "checkpoint_steps": 2, "held_out": DATA[name][:4], "patience": 12}
    if name == "lora":  # biases of the base train too: they must come back from the checkpoint
        base = tmp_path / "phi"
        save_phi2(base, initializer_range=0.05)
        settings["lora"] = LoraSettings(r=4, lora_dropout=0.1, bias="all")
    job = work(base, tmp_path / "out", name, **settings)
    killed(job, 13)
    assert not (tmp_path / "out").exists()
    checkpoints = sorted((tmp_path / "out-scratch" / "checkpoints").iterdir())
    assert 1 <= len(checkpoints) <= 4
    (tmp_path / "out-scratch" / "checkpoints" / "checkpoint-99").mkdir()  # one that the kill met in the middle
    continued = alone(job)
    undisturbed = alone(work(base, tmp_path / "other", name, **settings))
    assert 12 <= continued.facts["continued_at_step"] < 36 == continued.facts["steps"]
    assert "continued_at_step" not in undisturbed.facts
    assert furthest(tmp_path / "out", tmp_path / "other") == 0.0
    assert continued.history == undisturbed.history
    assert not (tmp_path / "out-scratch").exists()


def test_a_training_that_ended_but_could_not_save_does_not_train_again(base: Path, tmp_path: Path) -> None:
    worse = [row | {"answer": " 12345 12345"} for row in EXAMPLES[:4]]
    asked: dict[str, Any] = {"held_out": worse, "patience": 1, "epochs": 8, "learning_rate": 2e-2}
    whole = alone(work(base, tmp_path / "whole", **asked))
    assert whole.facts["stopped_early"]
    (tmp_path / "file").write_text("in the way")
    job = changed(work(base, tmp_path / "out", **asked), out=str(tmp_path / "file" / "out"))
    with pytest.raises(OSError, match="file"):
        alone(job)
    again = alone(work(base, tmp_path / "out", **asked))
    assert again.facts["continued_at_step"] == again.facts["steps"] == whole.facts["steps"]
    assert again.facts["stopped_early"] and again.history == whole.history
    assert furthest(tmp_path / "whole", tmp_path / "out") == 0.0


def test_another_training_does_not_continue_from_these_checkpoints(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for batch in (8, 12):
        job = work(base, tmp_path / "out", batch=batch, checkpoint_steps=1)
        with pytest.raises(OSError, match="file"):
            alone(changed(job, out=str(tmp_path / "file" / "out")))
    assert alone(work(base, tmp_path / "out", batch=8, checkpoint_steps=1)).facts.get("continued_at_step") is None


STARVED = """
import re, resource, sys
from pathlib import Path
import trainer.tuners.lora.tune  # what is loaded is not what is measured
from trainer.tuners.run import main
now = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (now + (int(sys.argv[2]) << 20), resource.RLIM_INFINITY))
sys.exit(main(Path(sys.argv[1])))
"""


def starving(tmp_path: Path, batch: int, name: str = "lora") -> list[Path]:
    """Two times the same training of long examples and a large vocabulary."""
    # Logits of 32 examples are 32 x 48 x 30 000 x 4 bytes = 184 MB, and a step needs them several times over.
    save_phi3(tmp_path / "phi", vocab_size=30_000, num_hidden_layers=1, hidden_size=48, initializer_range=0.05)
    long = [row | {"prompt": "0123456789" * 4 + row["prompt"]} for row in DATA[name]]
    asked: dict[str, Any] = {"batch": batch, "epochs": 2, "lora": LoraSettings(r=4)}
    jobs = [work(tmp_path / "phi", tmp_path / each, name, **asked) for each in ("starved", "whole")]
    return [changed(job, data=[*long, *long, *long][:batch]) for job in jobs]


def test_a_full_memory_is_answered_by_fewer_examples_at_once(tmp_path: Path) -> None:
    jobs = starving(tmp_path, 32)
    command = [sys.executable, "-c", STARVED, str(jobs[0]), "400"]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )
    starved, whole = tuned(done), alone(jobs[1])
    assert "out of memory with 32 examples at once" in done.stderr
    batch = starved["facts"]["batch"]
    assert batch["at_once"] < 32 == batch["step"] == batch["at_once"] * batch["passes"]
    assert f"{batch['at_once']} examples at once" in starved["facts"]["smaller_batch"]
    assert starved["facts"]["steps"] == whole.facts["steps"] == 2
    same_but_for_rounding(tmp_path, starved, whole)


def same_but_for_rounding(tmp_path: Path, starved: dict[str, Any], whole: Tuned) -> None:
    assert [row["loss"] for row in whole.history] == pytest.approx(
        [row["loss"] for row in starved["history"]], abs=1e-3
    )
    moved = max(float(tensor.abs().max()) for key, tensor in weights(tmp_path / "whole").items() if "lora_B" in key)
    assert furthest(tmp_path / "starved", tmp_path / "whole") < 1e-3 * moved


def test_a_memory_without_room_for_one_example_is_an_error_with_the_fix(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def forward(_self: Any, input_ids: torch.Tensor, **_: Any) -> None:
        tried.append(len(input_ids))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Phi3ForCausalLM, "forward", forward)
    with pytest.raises(SettingsError, match=r"one example at once: .*context"):
        alone(work(base, tmp_path / "out"))
    assert tried == [8, 4, 2, 1]
    # A start after this one begins where the memory may do, and another error is nobody's memory.
    monkeypatch.setattr(Phi3ForCausalLM, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        alone(work(base, tmp_path / "out"))


def test_settings_that_cannot_be_used_end_with_their_reason(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(work(base, tmp_path / "out", lora=LoraSettings(target_modules=("q_proj",)))) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "q_proj" in printed.err.splitlines()[-1]


LAUNCH = [sys.executable, "-m", *TORCHRUN]
ONE_STARVES = """
import os, re, resource, sys
from pathlib import Path
from trainer.tuners import loop
from trainer.tuners.run import main
step = loop.Checkpoints.training_step
def starved(self, *given):
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:  # now that everything but a step is there
        now = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (now + (int(sys.argv[2]) << 20), resource.RLIM_INFINITY))
    return step(self, *given)
if os.environ["RANK"] == "1":
    loop.Checkpoints.training_step = starved
sys.exit(main(Path(sys.argv[1])))
"""


def launched(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Two processes, to their end."""
    return subprocess.run(
        [*LAUNCH, *arguments], env=environment() | environ, cwd=ROOT, capture_output=True, text=True, timeout=250,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "room_mib"), [("lora", "150"), ("dpo", "600")])
def test_when_one_of_two_runs_out_of_memory_both_take_fewer_examples_at_once(
    tmp_path: Path, name: str, room_mib: str
) -> None:
    """Only the second one has too little; the first one must hear of it, in the middle of a step."""
    jobs = starving(tmp_path, 32, name)
    script = tmp_path / "one_starves.py"
    script.write_text(ONE_STARVES)
    done = launched(str(script), str(jobs[0]), room_mib, MALLOC_ARENA_MAX="1")  # what it gives back is free again
    starved, whole = tuned(done), alone(jobs[1])
    assert "out of memory in process 1" in done.stderr and "out of memory in process 0" not in done.stderr
    batch = starved["facts"]["batch"]
    assert batch["at_once"] < 16 and batch["at_once"] * batch["passes"] * 2 == batch["step"] == 32
    assert f"{batch['at_once']} examples at once" in starved["facts"]["smaller_batch"]
    assert starved["facts"]["steps"] == whole.facts["steps"] == 2
    same_but_for_rounding(tmp_path, starved, whole)


STALL_S = 15  # longer than two processes of a busy machine are apart


def interrupted(job: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    """Start two processes, send the second one a signal after `step`, and wait for the launcher's end: its status, and what
    was said on standard error."""
    environ = environment() | {"TRAINER_COLLECTIVE_S_MAX": str(STALL_S)}
    launcher = subprocess.Popen(
        [*LAUNCH, "-m", "trainer.tuners.run", str(job)],
        env=environ, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert launcher.stderr is not None
    said, second = [], None
    for line in launcher.stderr:
        said.append(line)
        if second is None and line.startswith('{"epoch"') and json.loads(line)["step"] >= step:
            (second,) = [each for each in psutil.Process(launcher.pid).children() if each.environ()["RANK"] == "1"]
            second.send_signal(number)
        if second is not None and "did not answer" in line and number == signal.SIGSTOP:
            second.kill()  # the launcher waits half a minute for it
    return launcher.wait(60), "".join(said)


def test_two_processes_of_which_one_is_lost_end_and_continue_with_the_same_adapter(base: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 8, "checkpoint_steps": 2, "held_out": EXAMPLES[:4], "patience": 8}
    job = work(base, tmp_path / "out", **settings)
    status, said = interrupted(job, 5, signal.SIGSTOP)
    assert status != 0
    assert f"did not answer for {STALL_S} s" in said and "Start all of them again" in said
    status, said = interrupted(job, 11, signal.SIGKILL)
    assert status != 0
    assert "continuing at step" in said and "Signal 9 (SIGKILL) received" in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "out-scratch" / "checkpoints" / "checkpoint-99").mkdir()  # one that a kill met in the middle
    continued = tuned(launched("-m", "trainer.tuners.run", str(job)))
    whole = tuned(launched("-m", "trainer.tuners.run", str(work(base, tmp_path / "whole", **settings))))
    assert 10 <= continued["facts"]["continued_at_step"] < 24 == continued["facts"]["steps"]
    assert furthest(tmp_path / "out", tmp_path / "whole") == 0.0
    assert continued["history"] == whole["history"]
    assert not (tmp_path / "out-scratch").exists()
