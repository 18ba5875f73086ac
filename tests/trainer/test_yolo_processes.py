"""Two processes train a YOLO, and the memory of one is too small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_yolo_tuner
import torch
from test_yolo_tuner import Bases, bases, child, weights

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
