"""The training child process: how it is started, watched, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

METADATA = "metadata.json"
PROGRESS = "progress.jsonl"
STOP_S_MAX = 10.0
EXIT_BUSY = 75  # EX_TEMPFAIL: another process works in this run's folder
EXIT_UNWRITTEN = 74  # EX_IOERR: the run's folder cannot be written, so that nothing there says how the run ended
LOCK = "lock"  # in the run's folder, held by the child


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: `refused` is the gate's word, `failed` an error; `summary` is what a job keeps of it."""

    status: Literal["passed", "refused", "failed"]
    reason: str
    summary: dict[str, Any]


class Child:
    """A running `python -m trainer train` of one job, writing into the folder `run`. It dies with this process."""

    def __init__(self, job: str, model: str, config: Path, samples: Path, run: Path) -> None:
        self.job = job
        command = [
            sys.executable, "-m", "trainer", "train", "--config", str(config), "--model", model,
            "--manifest", str(run / "manifest.json"), "--samples", str(samples), "--output-dir", str(run),
            "--parent", str(os.getpid()),
        ]  # fmt: skip
        with (run / "log.txt").open("ab") as log, (run / "summary.json").open("wb") as out:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=log)

    def poll(self) -> int | None:
        """The exit status (negative: the signal that ended it), or None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(timeout=STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def read_outcome(run: Path) -> Outcome | None:
    """What a finished run left in its folder; None while there is nothing."""
    try:
        value = json.loads((run / METADATA).read_text())
    except (OSError, ValueError):
        return None
    return Outcome(value["outcome"], value["reason"], value["summary"])


def read_progress(run: Path) -> dict[str, Any] | None:
    """The last line of progress of a run."""
    try:
        lines = (run / PROGRESS).read_text().strip().splitlines()
        value = json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return None
    return value if isinstance(value, dict) else None
