"""Files that appear whole or not at all, also after a power cut."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` as durable as the files' bytes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make everything in `folder` durable: files, and the names of all of them."""
    for path in folder.rglob("*"):
        sync_folder(path)  # a file as well
    sync_folder(folder)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """`folder` and what is missing above it, durably: what is put there is not lost with its name."""
    made = [path for path in (folder, *folder.parents) if not path.is_dir()]
    folder.mkdir(mode, parents=True, exist_ok=True)
    for path in made:
        sync_folder(path.parent)


class Incoming:
    """A file that comes in pieces: beside its place in `folder`, named `prefix`..., until it is kept, whole, on the disk."""

    def __init__(self, folder: Path, prefix: str) -> None:
        handle, beside = tempfile.mkstemp(prefix=prefix, dir=folder)
        self._file, self._beside = os.fdopen(handle, "wb"), Path(beside)
        self.digest = hashlib.sha256()  # of what has come

    def write(self, data: bytes) -> None:
        """The next piece."""
        self.digest.update(data)
        self._file.write(data)

    def keep(self, path: Path) -> None:
        """It is whole: `path`, in the same folder, is this file from now on, also after a power cut."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._beside, path)
        sync_folder(path.parent)

    def close(self) -> None:
        """Nothing is left beside, whatever has happened."""
        self._file.close()
        self._beside.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename: readers see the old bytes or the new ones."""
    make_folder(path.parent)
    with closing(Incoming(path.parent, f".{path.name}.")) as incoming:
        incoming.write(data)
        incoming.keep(path)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written whole."""
    write_whole(path, (json.dumps(value, indent=2, sort_keys=True, default=str) + "\n").encode())
