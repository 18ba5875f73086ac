"""Real control groups for tests, below the one that this process is in, of version 2 or 1, where the machine lets us."""

from __future__ import annotations

import subprocess
import time
import uuid
from pathlib import Path
from types import TracebackType

from edged.machine import groups
from tests.support.device import EDGED, Device, clean_env, until

PROC, MOUNT = Path("/proc"), Path("/sys/fs/cgroup")


class NoControlGroups(Exception):
    """The machine does not let this process make control groups; the message is its own reason."""


class ControlGroup:
    """`with ControlGroup() as group:` a group that limits memory and CPU time. Raises NoControlGroups."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.v2 = False
        name = f"edged-test-{uuid.uuid4().hex[:8]}"
        try:
            for controller in ("memory", "cpu"):
                found = groups(controller, PROC, MOUNT)
                # With both versions mounted a controller belongs to one of them.
                own = next((g for g in found if not g.v2), None) or next((g for g in found if g.v2), None)
                if own is None:
                    raise NoControlGroups(f"no control group of the controller {controller} is mounted at {MOUNT}")
                self.v2 = own.v2
                if own.v2:
                    (own.folder / "cgroup.subtree_control").write_text(f"+{controller}")
                folder = own.folder / name
                folder.mkdir(exist_ok=True)
                self.folders[controller] = folder
            for key, value in (("memory", 64 << 40), ("cpu", 100.0)):
                self._limit(key, value)
        except OSError as error:
            self.remove()
            raise NoControlGroups(f"{error.filename}: {error.strerror}") from None

    def _limit(self, key: str, value: float) -> None:
        if key == "memory":
            name = "memory.max" if self.v2 else "memory.limit_in_bytes"
            (self.folders["memory"] / name).write_text(str(int(value)))
        elif self.v2:
            (self.folders["cpu"] / "cpu.max").write_text(f"{int(value * 100_000)} 100000")
        else:
            (self.folders["cpu"] / "cpu.cfs_quota_us").write_text(str(int(value * 100_000)))

    def memory(self, size: int) -> None:
        """Allow so many bytes from now on."""
        self._limit("memory", size)

    def cores(self, cores: float) -> None:
        """Allow so many cores' worth of CPU time from now on."""
        self._limit("cpu", cores)

    def entering(self, command: list[str]) -> list[str]:
        """`command`, in the group from its first instruction on."""
        steps = [f'echo $$ > "{folder}/cgroup.procs"' for folder in set(self.folders.values())]
        return ["sh", "-c", f'set -e; {"; ".join(steps)}; exec "$@"', "sh", *command]

    def oom_kills(self) -> int:
        """How many processes the kernel has ended here because memory ran out."""
        name = "memory.events" if self.v2 else "memory.oom_control"
        lines = (self.folders["memory"] / name).read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])

    def remove(self) -> None:
        """Remove the group; its processes must have ended."""
        for folder in set(self.folders.values()):
            for _ in range(200):
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.02)

    def __enter__(self) -> ControlGroup:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.remove()


class ConfinedDevice(Device):
    """A device in a control group."""

    group: ControlGroup

    def start(self) -> None:
        """Start the process in the group and wait until it answers."""
        with self.log_path.open("ab") as log:
            command = self.group.entering([str(EDGED), "run", "-c", str(self.config)])
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=clean_env())
        until(f"{self.name} answers\n{self.log()}", self.status)
        if self._ready:
            self.wait("its model is loaded", lambda status: all(m["active"] for m in status["models"].values()))
