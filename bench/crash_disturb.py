"""What disturbs a device from outside beside a kill: a file system that is full, a clock that jumps."""

from __future__ import annotations

import hashlib
import random
import shutil
import struct
import subprocess
from pathlib import Path
from types import TracebackType

from bench.kept import kept

DISK_MIB = 48
LEFT_BYTES_MAX = 192 << 10  # what a full disk has left
JUMPS_S = (10, 300, 3600, 86400, 2 * 86400)
ROOT = Path(__file__).parents[1]
SHIM = ROOT / "tests" / "support" / "set_clock.c"


class CannotDisturb(Exception):
    """This machine cannot do it; the message says what it said."""


class Disk:
    """`with Disk(folder):` a small file system of its own at `folder`, which `fill` fills up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.filled = 0

    def __enter__(self) -> Disk:
        self._folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=700", "edged-crash", self._folder],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise CannotDisturb(f"no small file system can be mounted: {done.stderr.strip()}")
        return self

    def fill(self, chance: random.Random) -> None:
        """Leave some kilobytes; every other time, make room again."""
        ballast = self._folder / "ballast"
        if ballast.exists():
            ballast.unlink()
            return
        self.filled += 1
        free = shutil.disk_usage(self._folder).free - chance.randrange(LEFT_BYTES_MAX)
        with ballast.open("wb") as file:
            while free > 0:
                try:
                    free -= file.write(bytes(min(free, 1 << 20)))
                except OSError:  # the device was faster
                    return

    def free(self) -> None:
        """Make room for good."""
        (self._folder / "ballast").unlink(missing_ok=True)

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        subprocess.run(["umount", "--lazy", self._folder], check=False, capture_output=True)


class Clock:
    """The wall clock of whoever runs with `env`; the monotonic one goes on as ever."""

    def __init__(self, file: Path, chance: random.Random) -> None:
        self._file, self._chance = file, chance
        self.jumps = 0
        self.set(0)
        self.env = {"LD_PRELOAD": str(_shim()), "CLOCK_OFFSET_FILE": str(file)}

    def set(self, offset_s: int) -> None:
        """To this many seconds more than everybody else has."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:  # in place: it is mapped
            file.write(struct.pack("=q", offset_s))

    def jump(self) -> None:
        """To another time, earlier or later."""
        self.jumps += 1
        self.set(self._chance.choice((-1, 1)) * self._chance.choice(JUMPS_S))

    def right(self) -> None:
        """To what everybody else has."""
        self.set(0)


def _shim() -> Path:
    """The library that sets a process's clock; compiled once."""
    source = SHIM.read_bytes()

    def make(beside: Path) -> None:
        done = subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", beside, SHIM, "-ldl"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CannotDisturb(f"the library that sets a clock cannot be compiled: {done.stderr.strip()}")

    return kept(ROOT / "build" / f"set_clock-{hashlib.sha256(source).hexdigest()[:12]}.so", make)
