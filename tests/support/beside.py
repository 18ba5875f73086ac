"""Runs the tests in two processes side by side: `python -m tests.support.beside -m "not long"`; the rest goes to pytest.

Those of tests/system mostly wait for real processes, two files at a time; all others compute: they run beside them with
less of a say about the processor. Those marked `alone` come last, when nothing else runs. What the first process says
is shown as it comes, the second's when both have ended. The exit status is that of the first that failed. Plain `pytest
tests` runs the same tests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
NICE = 5
LOOK_S = 0.5  # between two looks whether a process has ended
SLOWEST = "--durations=15"
FILES_AT_ONCE = ["-n", "2", "--dist", "loadfile"]  # of tests/system
NONE_FOUND = 5  # pytest's exit status when no test is left
STOP_S_MAX = 60.0  # for a pytest that was asked to stop to end what it has started


class Part:
    """A pytest process; `mark` in its `-m` expression with `and`."""

    def __init__(self, name: str, given: list[str], mark: str, where: list[str], *, nice: bool, out: IO[bytes] | None):
        at = given.index("-m") + 1 if "-m" in given else 0
        marks = f"({given[at]}) and {mark}" if at else mark
        rest = [*given[: at - 1], *given[at + 1 :]] if at else given
        self.name, self._began, self.took_s = name, time.monotonic(), 0.0
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", SLOWEST, "-m", marks, *rest, *where]
        self._process = subprocess.Popen(
            ["nice", "-n", str(NICE), *command] if nice else command,
            cwd=ROOT,
            stdout=out,
            stderr=out and subprocess.STDOUT,
            start_new_session=True,  # a group of its own: it can be ended with all that it has started
        )

    def ended(self) -> bool:
        """Whether it has ended; when it did is noted at the first look after that."""
        over = self._process.poll() is not None
        if over and not self.took_s:
            self.took_s = time.monotonic() - self._began
        return over

    def wait(self) -> int:
        """Its exit status."""
        while not self.ended():
            time.sleep(LOOK_S)
        return 0 if self._process.returncode == NONE_FOUND else self._process.returncode

    def signal(self, number: int) -> None:
        """Tell it and everything that it has started."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """Wait for the end that it was told of; its fixtures need a while."""
        try:
            self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self._process.wait()


def _terminated(*_: Any) -> None:
    raise KeyboardInterrupt


def main(given: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    parts: list[Part] = []
    with tempfile.TemporaryFile() as said:
        try:
            others = ["tests", "--ignore=tests/system"]
            parts = [
                Part("tests/system", given, "not alone", ["tests/system", *FILES_AT_ONCE], nice=False, out=None),
                Part("the others", given, "not alone", others, nice=True, out=said),
            ]
            while [part for part in parts if not part.ended()]:
                time.sleep(LOOK_S)
            statuses = [part.wait() for part in parts]
            said.seek(0)
            print("\n=== the others, which ran beside tests/system ===", flush=True)
            sys.stdout.buffer.write(said.read())
            print("=== those that need the machine for themselves ===", flush=True)
            parts.append(Part("alone", given, "alone", ["tests"], nice=False, out=None))
            statuses.append(parts[-1].wait())
        except KeyboardInterrupt:
            for part in parts:
                part.signal(signal.SIGINT)
            for part in parts:
                part.stop()
            said.seek(0)
            sys.stdout.buffer.write(said.read())
            return 130
    for part, status in zip(parts, statuses, strict=True):
        print(f"{part.name}: {part.took_s / 60:.1f} min, exit status {status}")
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
