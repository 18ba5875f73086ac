"""Somebody who listens where the service manager would, and ways to break a real daemon from within."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

PYTHON = Path(__file__).parents[2] / "build" / "venv-device" / "bin" / "python"


class ServiceManager:
    """`with ServiceManager(path) as manager:` a datagram socket like systemd's; `heard`: the messages with their times."""

    def __init__(self, address: str) -> None:
        """`address`: a path, or `@` and an abstract name."""
        self.address = address
        self.heard: list[tuple[float, dict[str, str]]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(0.1)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="service-manager", daemon=True)

    def environment(self, watchdog_s: float = 0.0) -> dict[str, str]:
        """What systemd puts into a service's environment."""
        more = {"WATCHDOG_USEC": str(int(watchdog_s * 1e6))} if watchdog_s else {}
        return {"NOTIFY_SOCKET": self.address, **more}

    def _listen(self) -> None:
        while not self._done.is_set():
            try:
                data = self._socket.recv(8192)
            except TimeoutError:
                continue
            message = dict(line.split("=", 1) for line in data.decode().split("\n"))
            self.heard.append((time.monotonic(), message))

    def all(self, key: str) -> list[str]:
        """Every value of `key`, in order."""
        return [message[key] for _, message in list(self.heard) if key in message]

    def keys(self, *but: str) -> list[str]:
        """Every key that was sent but these, in order."""
        return [key for _, message in list(self.heard) for key in message if key not in but]

    def since(self, key: str) -> float:
        """For how many seconds `key` was not sent; infinite when it never was."""
        times = [at for at, message in list(self.heard) if key in message]
        return time.monotonic() - times[-1] if times else float("inf")

    @property
    def ready(self) -> bool:
        """Whether READY=1 was said."""
        return "READY" in self.keys()

    @property
    def status(self) -> str:
        """The last STATUS."""
        return (self.all("STATUS") or [""])[-1]

    def __enter__(self) -> ServiceManager:
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._socket.close()


def program(folder: Path, text: str) -> tuple[Path, Path]:
    """`edged` with `text` run before it: how a test shortens a limit, or reaches into a thread."""
    path = folder / f"edged-{os.urandom(4).hex()}.py"
    path.write_text(f"{text}\nfrom edged.cli import main\nmain()\n")
    return PYTHON, path
