"""Locks that end with the process that holds them, also when it is killed."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.files import make_folder


class Held(Exception):
    """Another process holds this lock; the message names the file."""


@contextmanager
def held(path: Path) -> Iterator[int]:
    """Hold the lock file `path` while the block runs; raises Held when another process does. It is no use to a network file
    system whose hosts do not share locks.

    The block gets the file's descriptor: a child that inherits it holds the lock too, also when this process has died."""
    make_folder(path.parent)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Held(f"{path} is locked by another process") from None
        yield file.fileno()


def is_held(path: Path) -> bool:
    """Whether another process holds the lock."""
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
