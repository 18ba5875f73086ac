"""The folder in which a training keeps its checkpoints, so that a killed one continues and a changed one begins anew.

A checkpoint counts when `complete.json` in it lists its files with their sizes: that is written last, durably.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.files import make_folder, sha256_of, sync_folder, sync_tree, write_json

log = logging.getLogger(__name__)

_STATE = "work.json"
_COMPLETE = "complete.json"
_WEIGHTS = (".safetensors", ".bin", ".json", ".model")


def fingerprint(told: Any, data: Iterable[Any], folders: Iterable[Path]) -> str:
    """SHA-256 of everything that decides what a training makes: its settings, its examples, its base's files."""
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for item in data:
        digest.update(json.dumps(item, sort_keys=True, default=str).encode() + b"\n")
    for folder in folders:
        for file in sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file()):
            digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


class Scratch:
    """The checkpoints of one training below `folder`, and how many examples its memory held at once."""

    def __init__(self, folder: Path, work: str, *, writes: bool = True) -> None:
        """Open what a killed training of the same `work` (a fingerprint) left, or begin anew. Of several processes one
        `writes`, and opens it before the others."""
        self.folder, self._work, self._writes = folder, work, writes
        self.checkpoints = folder / "checkpoints"
        if not writes:
            return
        if folder.is_dir() and self._read().get("work") != work:
            if any(folder.iterdir()):
                log.warning("%s: its checkpoints are of another training; beginning anew", folder)
            shutil.rmtree(folder)
        make_folder(self.checkpoints)
        for path in self.checkpoints.iterdir():
            if not _whole(path):
                shutil.rmtree(path)
        if not self._read():
            self._write({})

    @property
    def at_once_max(self) -> int | None:
        """How many examples fitted the memory of a process at once, when all of them did not."""
        return self._read().get("at_once_max")

    def remember(self, at_once_max: int) -> None:
        """Keep what the memory holds, so that a restart does not run out of it again."""
        self._write({"at_once_max": at_once_max})

    def last(self) -> Path | None:
        """The newest whole checkpoint."""
        steps = {int(path.name.rpartition("-")[2]): path for path in self.checkpoints.iterdir() if _whole(path)}
        return steps[max(steps)] if steps else None

    def complete(self, checkpoint: Path) -> None:
        """Say that every file of a checkpoint is there, after making them durable."""
        sync_tree(checkpoint)
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != _COMPLETE)
        sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
        write_json(checkpoint / _COMPLETE, sizes)
        sync_folder(checkpoint.parent)

    def remove(self) -> None:
        """Give the disk back: the training is done."""
        if self._writes:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> dict[str, Any]:
        try:
            state = json.loads((self.folder / _STATE).read_bytes())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def _write(self, state: dict[str, Any]) -> None:
        write_json(self.folder / _STATE, {"work": self._work, **state})


def _whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / _COMPLETE).read_bytes())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def replace_folder(made: Path, out: Path) -> None:
    """Put the folder `made` in the place of `out`, on the disk; the old one is gone only when the new one is there to be
    named."""
    sync_tree(made)
    old = out.with_name(f".{out.name}.old")
    if out.exists():  # else what a cut left as the old one is all there is
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    made.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)
