"""A real Debian with systemd as PID 1: debootstrap makes it once, systemd-nspawn boots a copy of it without a network."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from bench.kept import kept

ROOT = Path(__file__).parents[2]
SUITE = "bookworm"
# What the package needs of Debian, and a broker with its clients. Nothing is installed later: there is no network inside.
PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "python3", "python3.11", "libstdc++6", "libgomp1", "zlib1g", "mosquitto",
    "mosquitto-clients",
)  # fmt: skip
BOOT_S_MAX = 120.0
POWEROFF_S_MAX = 60.0
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8",
               "DEBIAN_FRONTEND": "noninteractive", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}  # fmt: skip


class CannotBoot(Exception):
    """This machine cannot boot a Debian; the message is the reason that it gave."""


def debian(packages: Sequence[str] = PACKAGES) -> Path:
    """The folder of a Debian with these packages, as debootstrap makes it; made once and kept below build/. Raises
    CannotBoot."""
    if os.geteuid():
        raise CannotBoot(f"only root may make and boot a Debian, this is user {os.geteuid()}")
    for program, package in {"debootstrap": "debootstrap", "systemd-nspawn": "systemd-container"}.items():
        if shutil.which(program) is None:
            raise CannotBoot(f"{program} is missing: packaging/setup.sh tests, or apt-get install {package}")
    name = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:12]
    root = ROOT / "build" / "booted" / f"{SUITE}-{name}"

    def make(beside: Path) -> None:
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", SUITE, beside],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode:
            raise CannotBoot(f"debootstrap: exit status {made.returncode}: {(made.stdout + made.stderr)[-1500:]}")

    return kept(root, make)


class Machine:
    """`with Machine(folder) as machine:` a booted Debian whose only network is its own loopback.

    `root` is its file system; `run` runs a command inside. Raises CannotBoot where it does not come up.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self._console = folder / "console.log"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def __enter__(self) -> Machine:
        source = debian()
        subprocess.run(["cp", "-a", "--reflink=auto", source, self.root], check=True)
        command = ["systemd-nspawn", "--register=no", "--keep-unit", "--private-network", "--suppress-sync=yes",
                   "--console=pipe", "--machine=edgedtest", "--boot", "--directory", str(self.root)]  # fmt: skip
        with self._console.open("wb") as console:
            self._nspawn = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=ENVIRONMENT
            )
        try:
            self._boot()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _boot(self) -> None:
        assert self._nspawn is not None
        deadline = time.monotonic() + BOOT_S_MAX
        state = ""
        while state not in ("running", "degraded"):
            said = self._console.read_text(errors="replace")[-1500:]
            if self._nspawn.poll() is not None:
                raise CannotBoot(f"systemd-nspawn ended with status {self._nspawn.returncode}: {said}")
            if time.monotonic() > deadline:
                raise CannotBoot(f"no running system after {BOOT_S_MAX:.0f} s ({state or 'no systemd'}): {said}")
            time.sleep(0.2)
            if not self._leader:
                children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
                self._leader = int(children[0]) if children else 0
            if self._leader:
                state = self.run("systemctl", "is-system-running", check=False).stdout.strip()

    def run(self, *command: str, check: bool = True, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a command inside as root. With `check` a failure fails the test with what the command said."""
        done = subprocess.run(
            ["nsenter", "--target", str(self._leader), "--all", "--", *command],
            capture_output=True, text=True, timeout=seconds, check=False, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def show(self, unit: str, name: str) -> str:
        """One property of a unit, as `systemctl show` has it."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def journal(self, unit: str) -> str:
        """What a unit has logged, and what systemd has logged about it."""
        return self.run("journalctl", "--no-pager", "--output=short-monotonic", f"--unit={unit}").stdout

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._nspawn is not None and self._nspawn.poll() is None:
            self._nspawn.terminate()  # systemd-nspawn passes it on as an orderly power-off
            try:
                self._nspawn.wait(POWEROFF_S_MAX)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        shutil.rmtree(self.root, ignore_errors=True)
