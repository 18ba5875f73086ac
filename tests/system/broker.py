"""A real mosquitto for tests: a child process on a free loopback port, plain or with TLS, that can be killed hard."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.support.ports import free_port
from trainer.broker import BrokerTls, write_broker_config
from trainer.ca import create_ca, issue
from trainer.core.access import Identity

START_S_MAX = 10.0
MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"


class Broker:
    """`with Broker(folder, tls=True) as broker:` `port` stays the same over `kill9()` and `start()`.

    With TLS, `ca` is the authority's certificate and `certificate(cn)` makes a client's; with `clients` only they
    have rights.
    """

    def __init__(self, folder: Path, *, tls: bool = False, clients: Sequence[Identity] | None = None) -> None:
        self.folder = folder
        self.port = free_port()
        self.host = "127.0.0.1"
        self.ca: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        own: BrokerTls | None = None
        if tls:
            self.ca = create_ca(folder / "ca").certificate
            certificate, key = self.certificate("broker")
            own = BrokerTls(self.ca, certificate, key)
        self._config = write_broker_config(folder, self.port, tls=own, clients=clients)

    def certificate(self, cn: str) -> tuple[Path, Path]:
        """The client certificate of `cn` and its key."""
        issued = issue(self.folder / "ca", cn)
        return issued.certificate.resolve(), issued.key.resolve()

    def start(self) -> None:
        """Start mosquitto and wait until it takes connections."""
        assert self._process is None, "already running"
        with (self.folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen([MOSQUITTO, "-c", str(self._config)], stderr=log, stdout=log)
        deadline = time.monotonic() + START_S_MAX
        while True:
            try:
                socket.create_connection((self.host, self.port), timeout=1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    text = (self.folder / "mosquitto.log").read_text()[-2000:]
                    raise RuntimeError(f"mosquitto did not start on port {self.port}: {text}") from None
                time.sleep(0.02)

    def kill9(self) -> None:
        """End mosquitto as a power cut would: nothing is saved."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End mosquitto in order: it saves its state. Nothing happens when it does not run."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=10)
            self._process = None

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()
