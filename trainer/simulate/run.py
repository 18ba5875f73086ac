"""The processes of a simulated fleet: started, watched, added up, and ended in order."""

from __future__ import annotations

import json
import queue
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trainer.core.simulated import shares
from trainer.simulate.plan import Plan
from trainer.simulate.process import GOODBYE_S

FILES_A_DEVICE, FILES_A_PROCESS = 2, 64  # its two connections; what Python and the pool have open
LOOK_S = 0.2
END_S = GOODBYE_S + 20.0  # for a process that was told to go


class SimulationError(RuntimeError):
    """The fleet cannot be simulated; the message says why and the fix."""


@dataclass(slots=True)
class Seen:
    """What the fleet has done so far. `counts` by name, `updates`: update state -> devices."""

    online: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    updates: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "seconds": round(self.seconds, 1), "online": self.online, "counts": dict(sorted(self.counts.items())),
            "updates": dict(sorted(self.updates.items())),
        }  # fmt: skip


def allow_files(plan: Plan) -> None:
    """Let each process open as many files as its devices need; raises SimulationError."""
    needed = FILES_A_DEVICE * max(len(each) for each in shares(plan.devices, plan.processes)) + FILES_A_PROCESS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            most = max(1, (hard - FILES_A_PROCESS) // FILES_A_DEVICE)
            raise SimulationError(
                f"{plan.devices} devices in {plan.processes} processes need {needed} open files in each, and `ulimit -n` "
                f"allows {hard}: raise it (`ulimit -Hn {needed}`, as root), or use --processes {-(-plan.devices // most)}"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Simulation:
    """`with Simulation(plan) as fleet:` the devices are there; `fleet.seen()` any time. Leaving it ends them in order."""

    def __init__(self, plan: Plan) -> None:
        """Raises SimulationError."""
        allow_files(plan)
        if plan.trail is not None:
            plan.trail.mkdir(parents=True, exist_ok=True)
        self.plan = plan
        self._processes: list[subprocess.Popen[bytes]] = []
        self._said: dict[int, dict[str, Any]] = {}
        self._readers: list[threading.Thread] = []
        self._lines: queue.Queue[tuple[int, bytes]] = queue.Queue()
        self._begun = time.monotonic()

    def __enter__(self) -> Simulation:
        text = self.plan.model_dump_json().encode() + b"\n"
        for place, numbers in enumerate(shares(self.plan.devices, self.plan.processes)):
            responders = self.plan.responders if place == 0 else 0
            command = [
                sys.executable, "-m", "trainer.simulate.process", str(numbers.start), str(numbers.stop), str(responders)
            ]  # fmt: skip
            # Not in our group: a Ctrl-C in the terminal is ours alone, and they are told in order.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )  # fmt: skip
            self._processes.append(process)
            assert process.stdin is not None
            process.stdin.write(text)
            process.stdin.flush()
            reader = threading.Thread(target=self._read, args=(place, process), daemon=True)
            reader.start()
            self._readers.append(reader)
        return self

    def seen(self) -> Seen:
        """What all processes said last; raises SimulationError when one has died."""
        while not self._lines.empty():
            place, line = self._lines.get()
            self._said[place] = json.loads(line)
        for process in self._processes:
            if process.poll() not in (None, 0):
                raise SimulationError(
                    f"a process of simulated devices ended with status {process.returncode}: see what it said above"
                )
        found = Seen(seconds=time.monotonic() - self._begun)
        for said in self._said.values():
            found.online += said["online"]
            found.counts.update(said["counts"])
            found.updates.update(said["updates"])
        return found

    def until(self, seconds: float | None, look: Callable[[Seen], None], ended: Callable[[], bool]) -> None:
        """Let them live for `seconds` (None: for ever), or until `ended`; `look` sees how it goes, about once a second."""
        deadline = None if seconds is None else time.monotonic() + seconds
        shown = 0.0
        while not ended() and (deadline is None or time.monotonic() < deadline):
            if time.monotonic() - shown >= 1.0:
                shown = time.monotonic()
                look(self.seen())
            time.sleep(LOOK_S)

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in self._readers:
            reader.join(timeout=5)

    def _read(self, place: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.put((place, line))
