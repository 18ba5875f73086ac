"""A file on its way here: `target.part` beside where it will lie, block by block, in any order.

Law of this file: a block counts when its bytes have the hash that the signed release names, and `target` appears only
whole and on the disk. Which blocks are here is kept nowhere but in the bytes: after a restart each is hashed again, because
a list of them could survive a power cut that their bytes did not (holes of a file that was never written there are
skipped, so that costs what has arrived).
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from edged.files import sync
from edged.wire.blocks import block_count, span
from edged.wire.manifest import FileEntry

READ_BYTES = 1 << 20


class Part:
    """`with Part(target, entry) as part:` `missing`: the numbers of the blocks that are not here. Raises OSError."""

    def __init__(self, target: Path, entry: FileEntry, cancelled: Callable[[], bool] = lambda: False) -> None:
        """`cancelled`: asked between blocks while those of an earlier try are hashed; what is not looked at is missing."""
        self.target, self.entry = target, entry
        # Named by the hash, so that a new version under the same name never continues the old one's bytes.
        self.path = target.with_name(f"{target.name}.{entry.sha256[:16]}.part")
        for other in target.parent.glob(f"{target.name}.*.part"):
            if other != self.path:
                other.unlink()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._file, entry.bytes)
        self.missing = set(range(block_count(entry.bytes)))
        for number in sorted(self.missing):
            if cancelled():
                break
            if self._right(number):
                self.missing.discard(number)

    @property
    def missing_bytes(self) -> int:
        """How many bytes are not here."""
        spans = (span(number, self.entry.bytes) for number in self.missing)
        return sum(end - start for start, end in spans)

    def put(self, number: int, pieces: Iterable[bytes]) -> bool:
        """Write a block, using up `pieces`; false when its bytes are not those that were promised: it stays missing."""
        start, end = span(number, self.entry.bytes)
        wanted = number in self.missing
        digest, at = hashlib.sha256(), start
        for piece in pieces:
            if wanted and at + len(piece) <= end:
                os.pwrite(self._file, piece, at)
            digest.update(piece)
            at += len(piece)
        right = at == end and digest.hexdigest() == self.entry.blocks[number]
        if right:
            self.missing.discard(number)
        return right

    def finish(self) -> None:
        """Every block is here: make it durable under its name."""
        assert not self.missing, self.path
        os.fsync(self._file)
        self.path.replace(self.target)
        sync(self.target.parent)

    def _right(self, number: int) -> bool:
        start, end = span(number, self.entry.bytes)
        try:
            if os.lseek(self._file, start, os.SEEK_DATA) >= end:
                return False
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return False
            raise
        digest = hashlib.sha256()
        while start < end:
            data = os.pread(self._file, min(READ_BYTES, end - start), start)
            digest.update(data)
            start += len(data) or end
        return digest.hexdigest() == self.entry.blocks[number]

    def __enter__(self) -> Part:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        os.close(self._file)
