"""A device that is started again when it dies, as systemd does with Restart=on-failure."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

from edged.status_socket import ask_status
from tests.support import dying
from tests.support.device import EDGED, WAIT_S, Device, clean_env, until

RESTARTS_MAX = 12  # then the test is wrong


class Supervised(Device):
    """`with Supervised(folder, tables, plan) as device:` `plan`: what kills it, as in `dying`. `ends`: the statuses of the
    processes that ended."""

    def __init__(self, folder: Path, tables: dict[str, Any], plan: dict[str, list[int]]) -> None:
        super().__init__(folder, tables)
        self._plan = json.dumps(plan)
        self._stopping = threading.Event()
        self.ends: list[int] = []

    def start(self) -> None:
        """Start the process, again and again, until it ends by itself."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._supervise, name=f"supervisor-{self.name}", daemon=True)
        self._thread.start()
        until(f"{self.name} answers\n{self.log()}", self.status)

    def _supervise(self) -> None:
        while not self._stopping.is_set() and len(self.ends) < RESTARTS_MAX:
            command = [EDGED.with_name("python"), dying.__file__, self._plan, "run", "-c", self.config]
            with self.log_path.open("ab") as log:
                self.process = subprocess.Popen(command, stdout=log, stderr=log, env=clean_env())
            self.ends.append(self.process.wait())
            if self.ends[-1] >= 0:
                return

    def status(self) -> dict[str, Any] | None:
        """What `edged status` would show; None while nothing runs."""
        return ask_status(self.state_dir)

    def died(self, times: int) -> None:
        """Wait until it has died so often."""
        until(f"{self.name} has died {times} times\n{self.log()[-3000:]}", lambda: len(self.ends) >= times)

    def signal(self, number: int) -> int:
        """Send a signal for good: the exit status."""
        self._stopping.set()
        assert self.process is not None
        self.process.send_signal(number)
        self._thread.join(WAIT_S)
        self.process = None
        return self.ends[-1]
