"""The processes of the demo: broker, trainer, responder and devices, started as a user would and always stopped."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from edged.link import LinkOptions
from trainer.broker import BrokerTls, write_broker_config
from trainer.ca import create_ca, issue
from trainer.cli_keys import PASSPHRASE
from trainer.config import load_config
from trainer.core.access import Identity

SITE = "line1"
TRAINER, RESPONDER, OBSERVER = "trainer", "responder", "observer"
START_S_MAX = 30.0
STOP_S_MAX = 15.0


class LineError(Exception):
    """A process did not do what the demo needs; the message names it, what it said last, and its log."""


def free_port() -> int:
    """A TCP port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Line:
    """Starts processes below `folder` and stops all of them, in reverse order, when the `with` block ends."""

    def __init__(self, folder: Path, device_python: Path) -> None:
        self.folder = folder
        self._device_bin = device_python.parent
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.broker_port = free_port()
        self._passphrase = secrets.token_hex()  # of the keys that sign releases
        self.ca = create_ca(folder / "ca").certificate.resolve()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        for name, process in reversed(self._running):
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP_S_MAX)
                except subprocess.TimeoutExpired:
                    print(f"demo: {name} did not stop within {STOP_S_MAX:.0f} s: killed", file=sys.stderr)
                    process.kill()
                    process.wait()
        self._running.clear()

    def certificate(self, cn: str) -> tuple[Path, Path]:
        """The certificate and key of `cn`."""
        issued = issue(self.folder / "ca", cn)
        return issued.certificate.resolve(), issued.key.resolve()

    def start_broker(self, devices: Iterable[str]) -> None:
        """A real mosquitto with TLS, a certificate for each client, and rights for these devices and the others."""
        binary = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        if binary is None:
            raise LineError("mosquitto is missing: install it with `apt-get install mosquitto`")
        certificate, key = self.certificate("broker")
        config = write_broker_config(
            self.folder / "broker",
            self.broker_port,
            tls=BrokerTls(self.ca, certificate, key),
            clients=[
                *(Identity(name, SITE) for name in devices),
                Identity(RESPONDER, SITE, roles=("device", "responder")),
                Identity(TRAINER, SITE, roles=("trainer",)),
                Identity(OBSERVER, SITE, roles=("observer",)),
            ],
        )
        self._start("mosquitto", [binary, "-c", str(config)])
        self._wait("mosquitto", self._broker_answers)

    def _broker_answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.broker_port), timeout=1).close()
        except OSError:
            return False
        return True

    def observer(self) -> LinkOptions:
        """How an independent observer connects."""
        certificate, key = self.certificate(OBSERVER)
        return LinkOptions("127.0.0.1", self.broker_port, OBSERVER, self.ca, certificate, key)

    def tls(self, cn: str) -> dict[str, Any]:
        """The three TLS keys of a configuration table."""
        certificate, key = self.certificate(cn)
        return {"ca": str(self.ca), "certificate": str(certificate), "key": str(key)}

    def start_device(self, name: str, tables: dict[str, Any], comment: str = "") -> Path:
        """`edged run` in the device's own environment; returns its configuration file, which begins with `comment`."""
        state = self.folder / name
        tables = {
            "device": {"id": name, "site": SITE, "state_dir": str(state / "state"), **tables.pop("device", {})},
            "broker": {"host": "127.0.0.1", "port": self.broker_port, **self.tls(name)},
            **tables,
        }
        path = write_toml(state / "edged.toml", tables, comment)
        self._start(name, [str(self._device_bin / "edged"), "run", "--config", str(path)])
        return path

    def trainer(self, config: Path, *arguments: str) -> None:
        """A command of `trainer`; raises LineError when it fails."""
        command = [str(Path(sys.executable).parent / "trainer"), *arguments, "--config", str(config)]
        env = {**os.environ, PASSPHRASE: self._passphrase}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env)
        if done.returncode:
            raise LineError(f"`trainer {' '.join(arguments)}` failed: {(done.stderr or done.stdout).strip()}")

    def make_keys(self, config: Path) -> dict[str, Any]:
        """Keys that sign releases; the [trust] table of a device that is enrolled. In a plant each medium goes to a
        custodian (docs/operations.md); nobody keeps these."""
        media = [part for name in ("a", "b", "c") for part in ("--offline", str(self.folder / "offline" / name))]
        self.trainer(config, "keys", "init", *media)
        return {"root": str(load_config(config).trust.folder / "metadata" / "1.root.json")}

    def start_trainer(self, config: Path) -> None:
        """`trainer serve`."""
        self._start(TRAINER, [str(Path(sys.executable).parent / "trainer"), "serve", "--config", str(config)])

    def device_status(self, config: Path) -> dict[str, Any] | None:
        """What `edged status --json` says; None while the daemon does not answer."""
        done = subprocess.run(
            [str(self._device_bin / "edged"), "status", "--config", str(config), "--json"],
            capture_output=True, check=False, timeout=30,
        )  # fmt: skip
        if done.returncode:
            return None
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def check(self) -> None:
        """Raises LineError when a process has ended."""
        for name, process in self._running:
            if process.poll() is not None:
                raise LineError(f"{name} ended with status {process.returncode}; {self._last_words(name)}")

    def _start(self, name: str, command: list[str]) -> None:
        log = self._log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        if setpriv := shutil.which("setpriv"):  # a demo killed hard must not leave a line running
            command = [setpriv, "--pdeathsig", "TERM", *command]
        with log.open("wb") as output:
            # A session of its own: Ctrl-C reaches the demo alone, which then stops the line in order.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self._running.append((name, process))

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S_MAX
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise LineError(f"{name} is not ready after {START_S_MAX:.0f} s; {self._last_words(name)}")
            time.sleep(0.1)

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _last_words(self, name: str) -> str:
        lines = self._log(name).read_text(errors="replace").strip().splitlines()
        return f"last line: {lines[-1] if lines else '(nothing)'}; log: {self._log(name)}"


def write_toml(path: Path, tables: dict[str, Any], comment: str = "") -> Path:
    """Write nested tables of plain values as TOML, after a line of comment."""
    lines = [f"# {comment}"] if comment else []
    _tables(lines, "", tables)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def _tables(lines: list[str], prefix: str, table: dict[str, Any]) -> None:
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    if prefix and (plain or not table):
        lines.append(f"[{prefix}]")
    # JSON's strings, numbers, booleans and arrays are TOML's.
    lines += [f"{key} = {json.dumps(value)}" for key, value in plain.items() if value is not None]
    for key, value in table.items():
        if isinstance(value, dict):
            _tables(lines, f"{prefix}.{key}" if prefix else key, value)
