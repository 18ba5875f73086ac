"""The folder of images, named by their SHA-256: `blobs/ab/<sha256>`.

Law of this file: a name appears only when its content is on the disk, and the row that refers to it commits after that.
A crash in between leaves a file without a row, which the next start removes; never a row without a file.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edged.files import sync
from edged.store.records import StorageFull, StoreError

_TEMPORARY = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Blobs:
    """Content-addressed files; what is counted and allowed is decided by the database."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()  # being captured now: must not be removed
        self._numbers = itertools.count()
        # All at once, so that later only the innermost folder needs an fsync.
        if not (folder / "ff").is_dir():
            for number in range(256):
                (folder / f"{number:02x}").mkdir(parents=True, exist_ok=True)
            sync(folder)
            sync(folder.parent)

    def path(self, sha256: str) -> Path:
        """Where this content is or would be."""
        return self.folder / sha256[:2] / sha256

    @contextmanager
    def hold(self, sha256: str) -> Iterator[None]:
        """While held, `remove` leaves this content alone."""
        with self._lock:
            self._held[sha256] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[sha256] -= 1
                if not self._held[sha256]:
                    del self._held[sha256]

    def write(self, sha256: str, content: bytes) -> None:
        """Put the content there, durably; raises StorageFull and leaves nothing behind when the disk is full."""
        target = self.path(sha256)
        temporary = target.with_name(f"{sha256}.{os.getpid()}.{next(self._numbers)}{_TEMPORARY}")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            sync(target.parent)
        except OSError as error:
            with suppress(OSError):  # what stays is swept at the next start
                temporary.unlink(missing_ok=True)
            if error.errno in _FULL:
                raise StorageFull(f"{target}: no room for {len(content)} bytes; free space or evict samples") from error
            raise StoreError(f"{target}: {error.strerror}; is the disk failing or mounted read-only?") from error

    def remove(self, sha256: str, needed: Callable[[str], bool]) -> bool:
        """Delete the file unless somebody holds it or `needed` says that a row refers to it; false when it stays.

        `needed` is asked under the lock: nobody can begin to hold the content between its answer and the deletion.
        """
        with self._lock:
            if sha256 in self._held or needed(sha256):
                return False
            self.path(sha256).unlink(missing_ok=True)
            return True

    def move(self, sha256: str, folder: Path) -> bool:
        """Take the file out, to `folder/ab/<sha256>`; true."""
        target = folder / sha256[:2] / sha256
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path(sha256).rename(target)
        return True

    def remove_temporary(self) -> int:
        """Delete what a crash left half-written; how many files."""
        found = list(self.folder.glob(f"*/*{_TEMPORARY}"))
        for path in found:
            path.unlink(missing_ok=True)
        return len(found)

    def sizes(self) -> dict[str, int]:
        """sha256 -> size in bytes of every file."""
        sizes: dict[str, int] = {}
        for folder in os.scandir(self.folder):
            with os.scandir(folder.path) as entries:
                for entry in entries:
                    if not entry.name.endswith(_TEMPORARY):
                        sizes[entry.name] = entry.stat().st_size
        return sizes
