"""`trainer fleet rollback|pin|unpin` with a real `trainer serve` and a real device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.device import Device, tables, until
from tests.system.broker import Broker
from tests.system.test_trainer_serve import Trainer
from trainer.releases import Registry


def eye(status: dict[str, Any]) -> tuple[str, str]:
    model = status["models"]["eye"]
    return model["active"], model["update"]


def refused(trainer: Trainer, *arguments: str) -> str:
    command = [sys.executable, "-m", "trainer", *arguments, "--config", str(trainer.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stdout
    return done.stderr


@pytest.mark.timeout(180)
def test_a_device_is_rolled_back_and_pinned_from_the_trainer(
    tmp_path: Path, broker: Broker, toy: Path, toy2: Path
) -> None:
    trainer = Trainer(tmp_path / "trainer", broker)
    registry = Registry(tmp_path / "trainer" / "data" / "releases")
    for folder in (toy, toy2):
        registry.register(folder)
    trainer.start()
    try:
        with Device(tmp_path, tables(tmp_path, "dev1", broker, toy)) as device:
            until("it is known", lambda: any(row["models"] for row in trainer.call("fleet", "status")))
            trainer.call("fleet", "set", "dev1", "--model", "eye=toy@1.1")
            device.wait("committed", lambda s: eye(s) == ("toy@1.1", "committed"))
            assert trainer.call("fleet", "rollback", "dev1", "eye")["state"] == "done"
            device.wait("back", lambda s: eye(s) == ("toy@1.0", "reverted"))
            assert "has just come back from toy@1.1" in refused(trainer, "fleet", "rollback", "dev1", "eye")
            assert "dev1 has no slot 'ear'; it has eye" in refused(trainer, "fleet", "pin", "dev1", "ear")
            assert trainer.call("fleet", "pin", "dev1", "eye", "toy@1.1")["state"] == "done"
            device.wait("what it is pinned to", lambda s: eye(s) == ("toy@1.1", "committed"))

            def reported() -> Any:
                return [row["models"]["eye"]["pinned"] for row in trainer.call("fleet", "status")] == ["toy@1.1"]

            until("the trainer has heard", reported)
            assert trainer.call("fleet", "unpin", "dev1", "eye")["state"] == "done"
            device.wait("free", lambda s: s["models"]["eye"]["pinned"] is None)
    finally:
        trainer.stop()
