"""Two processes train a YOLO, and the memory of one is too small."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import test_yolo_tuner
import torch
from test_yolo_tuner import Bases, bases, child, same, weights

__all__ = ["bases"]
pytestmark = pytest.mark.usefixtures("one_thread")

# In the second process more than three images do not fit, from the second batch on.
PLANTED = """
import os
if os.environ["RANK"] == "1":
    from trainer.tuners.yolo import prepare_process
    prepare_process()
    import torch
    from ultralytics.nn.tasks import BaseModel
    seen = []
    def full(module, given):
        batch = given[0]["img"] if isinstance(given[0], dict) else given[0]
        if isinstance(module, BaseModel) and module.training:
            seen.append(len(batch))
            if len(batch) > 3 and len(seen) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    torch.nn.modules.module.register_module_forward_pre_hook(full)
"""
LAUNCHER = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def test_when_one_of_two_runs_out_of_memory_both_take_fewer_images_at_once(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bases["yolo11n"]
    monkeypatch.setattr(test_yolo_tuner, "_CHILD", PLANTED + test_yolo_tuner._CHILD)
    out = tmp_path / "two.pt"
    process = child(bases, "yolo11n", out, tmp_path, LAUNCHER, method="full", epochs=2)
    text, _ = process.communicate(timeout=240)
    said = capfd.readouterr().err
    assert process.returncode == 0, said[-3000:]
    assert "out of memory in process 1" in said and "out of memory in process 0" not in said
    facts = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [fact["batch"] for fact in facts] == [{"asked": 12, "at_once": 6, "accumulated": 2}] * 2
    assert facts[0]["steps"] == 2 * 24 / 12  # as many as if the memory had sufficed
    assert (facts[0]["learned"], facts[0]["sum"]) == (facts[1]["learned"], facts[1]["sum"])
    before, after = weights(bases["yolo11n"].path), weights(out)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("conv.weight"))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_when_one_of_two_is_killed_both_end_and_the_next_start_ends_the_same(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: each process repeats the epoch that the kill met, and adds up in the same order."""
    monkeypatch.setenv("TRAINER_COLLECTIVE_S_MAX", "60")
    out, whole = tmp_path / "killed.pt", tmp_path / "whole.pt"
    keys: dict[str, Any] = {"method": "lora", "epochs": 4, "patience": 4, "lora": {"r": 4, "lora_dropout": 0.1}}
    process = child(bases, "yolo11n", out, tmp_path, LAUNCHER, **keys)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "2":  # the second epoch is kept
            break
    (second,) = [each for each in psutil.Process(process.pid).children() if each.environ().get("RANK") == "1"]
    second.send_signal(signal.SIGKILL)
    assert process.wait(120) != 0
    process.stdout.close()
    assert not out.exists()

    def told(into: Path) -> list[dict[str, Any]]:
        done = child(bases, "yolo11n", into, tmp_path, LAUNCHER, **keys)
        text, _ = done.communicate(timeout=400)
        assert done.returncode == 0
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    again, undisturbed = told(out), told(whole)
    assert [2 <= fact["resumed_at_epoch"] < 4 for fact in again] == [True, True]
    assert [fact["resumed_at_epoch"] for fact in undisturbed] == [None, None]
    assert again[0]["sum"] == undisturbed[0]["sum"]
    assert same(weights(out), weights(whole))
