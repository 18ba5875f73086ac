"""A virtual machine whose end is a power cut: QEMU, killed."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.powercut_image import Image

MEMORY_MIB = 1536
CORES = 2
END_S_MAX = 300.0
POLL_S = 0.02
# The words of the kernel, the initramfs's check and the init about a file system that is not whole.
HURT = ("EXT4-fs error", "EXT4-fs warning", "UNEXPECTED INCONSISTENCY", "File system check", "fsck not present",
        "I/O error", "edged-init:", "Kernel panic")  # fmt: skip


class MachineFailed(Exception):
    """The machine did not do what it should within its time; the message has the end of its console."""


class Machine:
    """One boot. `lines` is what the guest has reported so far; `console` and the reports stay below `folder`.

    The disk is written past the host's page cache (cache=none): what the guest was told is on the disk is there after
    `cut()`, and what it was not told may not be.
    """

    def __init__(self, folder: Path, boot: int, image: Image, disk: Path, run_disk: Path) -> None:
        self.console = folder / f"console-{boot:02d}.log"
        self._report = folder / f"report-{boot:02d}.log"
        self.lines: list[dict[str, Any]] = []
        self._read = 0
        command: list[str | Path] = [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(CORES),
            "-m", str(MEMORY_MIB), "-nodefaults", "-display", "none", "-no-reboot",
            "-kernel", image.kernel, "-initrd", image.initramfs,
            "-append", f"root=/dev/vda ro init=/sbin/edged-init edged.boot={boot} console=ttyS0 "
            "loglevel=5 panic=-1 net.ifnames=0",
            "-drive", f"file={disk},format=raw,if=virtio,cache=none",
            "-drive", f"file={run_disk},format=raw,if=virtio,readonly=on",
            "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net",
            "-serial", f"file:{self.console}", "-chardev", "stdio,id=report,signal=off", "-serial", "chardev:report",
        ]  # fmt: skip
        with self._report.open("wb") as report:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=report, stderr=subprocess.STDOUT)

    def read(self) -> None:
        """Take in what the guest has reported since; half a line waits for its other half."""
        data = self._report.read_bytes()[self._read :]
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith("{"):
                self.lines.append(json.loads(line))

    def reported(self, what: str) -> list[Any]:
        """Every value that the guest has reported under this name."""
        return [line[what] for line in self.lines if what in line]

    def wait(self, what: str, found: Callable[[], Any], seconds: float) -> Any:
        """The first true value of `found`, asked again and again; raises MachineFailed when none comes in time."""
        deadline = time.monotonic() + seconds
        while True:
            self.read()
            if value := found():
                return value
            if self.process.poll() is not None:
                raise MachineFailed(f"{what}: QEMU ended with status {self.process.returncode}\n{self.end()}")
            if time.monotonic() > deadline:
                raise MachineFailed(f"{what}: not within {seconds:.0f} s\n{self.end()}")
            time.sleep(POLL_S)

    def end(self) -> str:
        """The end of what the console and the reports said."""
        texts = [path.read_text(errors="replace")[-3000:] for path in (self.console, self._report) if path.exists()]
        return "\n--\n".join(texts)

    def hurt(self) -> list[str]:
        """What the console said about a file system that is not whole."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return [line.strip() for line in text.splitlines() if any(words in line for words in HURT)]

    def tell(self, order: str) -> None:
        """Give the guest a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(order.encode() + b"\n")
        self.process.stdin.flush()

    def cut(self) -> None:
        """Cut the power, and take in what was reported before."""
        self.process.kill()
        self.process.wait()
        self.read()

    def stop(self) -> None:
        """Let the daemon end in order, then the machine. Raises MachineFailed."""
        self.tell("stop")
        try:
            self.process.wait(END_S_MAX)
        except subprocess.TimeoutExpired:
            raise MachineFailed(f"the machine did not end within {END_S_MAX:.0f} s of `stop`\n{self.end()}") from None
        self.read()
