"""The whole way as an operator goes it: keys, a release, `trainer serve`, a device that installs only what is signed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from edged.wire.messages import Event
from tests.support.device import SITE, Bus, Device, tables, until
from tests.system.broker import Broker
from trainer.cli import app
from trainer.cli_keys import PASSPHRASE


class Trainer:
    """`trainer` on the command line, and `trainer serve` while it runs."""

    def __init__(self, folder: Path, broker: Broker) -> None:
        folder.mkdir()
        self.folder, self.config = folder, folder / "trainer.toml"
        self.config.write_text(
            f'site = "{SITE}"\ndata_dir = "data"\n[broker]\nport = {broker.port}\n[http]\nport = 0\n'
        )
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, *arguments: str | Path) -> Result:
        env = {PASSPHRASE: "correct horse battery"}
        return CliRunner().invoke(app, [*map(str, arguments), "--config", str(self.config)], env=env)

    def ok(self, *arguments: str | Path) -> str:
        done = self.call(*arguments)
        assert done.exit_code == 0, done.output
        return done.stdout

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            command = [sys.executable, "-m", "trainer", "serve", "--config", str(self.config)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(timeout=30)
            self._process = None


@pytest.fixture
def trainer(tmp_path: Path, broker: Broker) -> Iterator[Trainer]:
    made = Trainer(tmp_path / "trainer", broker)
    yield made
    made.stop()


def eye(status: dict[str, Any]) -> tuple[str, str]:
    return status["models"]["eye"]["active"], status["models"]["eye"]["update"]


def test_from_keys_to_a_device_that_installs_what_is_signed_and_nothing_else(
    tmp_path: Path, broker: Broker, bus: Bus, trainer: Trainer, toy: Path, toy2: Path
) -> None:
    media = [part for name in ("a", "b", "c") for part in ("--offline", tmp_path / name)]
    trainer.ok("keys", "init", *media)
    trainer.ok("release", "add", toy)
    trainer.ok("release", "add", toy2)
    trainer.start()
    root = trainer.folder / "trust" / "metadata" / "1.root.json"
    plan = {**tables(tmp_path, "dev1", broker, toy), "trust": {"root": root}}
    with Device(tmp_path, plan) as device:
        until("the trainer knows the device", lambda: json.loads(trainer.ok("fleet", "status", "--json")))
        trainer.ok("fleet", "set", "dev1", "--model", "eye=toy@1.1")
        device.wait("installed", lambda s: eye(s) == ("toy@1.1", "committed"))
        # Every online key is replaced while the trainer works; the device follows.
        trainer.ok("keys", "rotate", "models", "snapshot", "timestamp", *media[:4])
        trainer.ok("fleet", "set", "dev1", "--model", "eye=toy@1.0")
        status = device.wait("back", lambda s: eye(s) == ("toy@1.0", "committed"))
        assert status["trust"]["root_version"] == 2
        trainer.ok("release", "revoke", "toy@1.1", "--reason", "it burns")
        refused = trainer.call("fleet", "set", "dev1", "--model", "eye=toy@1.1")
        assert (refused.exit_code, "toy@1.1 was revoked: it burns" in refused.stderr) == (1, True)


def test_a_trainer_without_keys_says_so_and_serves_devices_that_want_none(
    tmp_path: Path, broker: Broker, bus: Bus, trainer: Trainer, toy: Path, toy2: Path
) -> None:
    trainer.ok("release", "add", toy2)
    trainer.start()
    until("it is said", lambda: [event for event in bus.of(Event, "trainer") if event.kind == "releases_unsigned"])
    with Device(tmp_path, tables(tmp_path, "dev1", broker, toy)) as device:
        until("the trainer knows the device", lambda: json.loads(trainer.ok("fleet", "status", "--json")))
        trainer.ok("fleet", "set", "dev1", "--model", "eye=toy@1.1")
        device.wait("installed", lambda s: eye(s) == ("toy@1.1", "committed"))
