"""`trainer samples archive` through `trainer serve` and a real mosquitto: the device is asked, and believed (L14, L15)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from edged.wire import topics
from edged.wire.messages import CommandState
from tests.system.test_trainer_serve import Trainer, running, until


def states(trainer: Trainer) -> Counter[str]:
    return Counter({row["state"]: row["count"] for row in trainer.call("samples", "counts")})


@pytest.mark.timeout(180)
def test_l14_a_device_is_asked_until_it_has_archived_its_used_samples(tmp_path: Path) -> None:
    with running(tmp_path, "d1") as (_, trainer, (device,)):
        used = [device.catalogue(number, state="used") for number in range(3)]
        device.catalogue(3)
        until("all are known", lambda: states(trainer) == {"used": 3, "labelled": 1})
        assert trainer.call("samples", "archive", "--device", "d1") == {"asked": 3, "devices": 1, "waiting": 0}

        def told() -> list[str]:
            return [key for key, command in device.commands.items() if command.action == "archive"]

        (command,) = until("the device is told", told)
        assert device.commands[command].samples == used
        assert states(trainer)["archived"] == 0, "it has not answered"
        device.commands.clear()
        until("it is told again, for it has not answered", told)
        said = {"moved": used[:2], "unknown": [], "refused": {used[2]: "rejected"}}
        done = CommandState(**device._envelope(), command=command, state="done", detail=said)
        device.say(topics.COMMAND_STATE, done, type="samples", id=command)
        until("it is believed", lambda: states(trainer) == {"archived": 2, "used": 1, "labelled": 1})
