"""What tests and benches make once and keep below build/: placed whole, and made by one process while others wait."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def kept(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, a file or a folder; `make` makes it where it is told to when it is not there.

    Another process that wants the same waits for the first one, for as long as that takes; when the first one fails or is
    killed, the next one makes it. Raises what `make` raises; then nothing is there.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:  # stays: who removes a lock file breaks the lock
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for left in path.parent.glob(f".{path.name}.*.half"):  # by one that was killed: nobody makes it now
                shutil.rmtree(left, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".half", dir=path.parent))
            try:
                make(scratch / path.name)
                os.replace(scratch / path.name, path)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return path
