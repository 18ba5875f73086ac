"""The rows of a SQLite file that SQLite itself no longer reads: page by page, whatever is whole.

Reads the file as https://www.sqlite.org/fileformat2.html describes it, with the committed frames of its write-ahead log, and
never writes. A row is found by its leaf page alone: neither the header, nor the schema, nor the pages above it are needed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

PAGE_BYTES = 4096  # of a file whose header does not say it any more: SQLite's default, and ours
RECORD_BYTES_MAX = 64 << 20
FREE_LIST_MAX = 1 << 20  # trunk pages: where a damaged list runs in a circle
_LEAF = 0x0D
_HEADER_BYTES = 100  # of the file, in front of the first page's own
_WAL_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}  # serial type -> bytes

Value = None | int | float | str | bytes


class Damaged(Exception):
    """These bytes are no row."""


@dataclass(slots=True)
class Pages:
    """`with Pages(file) as pages:` its pages, the newest committed version of each. Raises OSError."""

    path: Path
    damaged: int = 0  # cells and pages that could not be read
    size: int = PAGE_BYTES
    _descriptors: list[int] = field(default_factory=list)
    _logged: dict[int, int] = field(default_factory=dict)  # page number -> where its newest version lies in the log

    def __enter__(self) -> Pages:
        self._descriptors.append(os.open(self.path, os.O_RDONLY))
        log = self.path.with_name(self.path.name + "-wal")
        said = _page_bytes(int.from_bytes(os.pread(self._descriptors[0], 18, 0)[16:18], "big"))
        if log.is_file():
            self._descriptors.append(os.open(log, os.O_RDONLY))
            logged = os.pread(self._descriptors[1], _WAL_HEADER_BYTES, 0)
            if len(logged) == _WAL_HEADER_BYTES:
                self.size = _page_bytes(int.from_bytes(logged[8:12], "big")) or said or PAGE_BYTES
                self._read_log(logged[16:24])
                return self
        self.size = said or PAGE_BYTES
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def _read_log(self, salt: bytes) -> None:
        """Note the frames of the log's present round, as far as they were committed."""
        log, at = self._descriptors[1], _WAL_HEADER_BYTES
        open_transaction: dict[int, int] = {}
        while len(head := os.pread(log, _FRAME_HEADER_BYTES, at)) == _FRAME_HEADER_BYTES and head[8:16] == salt:
            number, commit = struct.unpack(">II", head[:8])
            open_transaction[number] = at + _FRAME_HEADER_BYTES
            if commit:
                self._logged |= open_transaction
                open_transaction = {}
            at += _FRAME_HEADER_BYTES + self.size

    def count(self) -> int:
        """Pages of the file, and those that so far are in the log only."""
        return max(os.fstat(self._descriptors[0]).st_size // self.size, *self._logged, 0)

    def page(self, number: int) -> bytes:
        """A page by its number, from 1; shorter, or empty, where the file ends. A bad sector reads as empty."""
        try:
            if number in self._logged:
                return os.pread(self._descriptors[1], self.size, self._logged[number])
            return os.pread(self._descriptors[0], self.size, (number - 1) * self.size)
        except OSError:
            self.damaged += 1
            return b""

    def rows(self) -> Iterator[list[Value]]:
        """The values of every row of every table, as they are stored: the column of a row's own number is None."""
        free = self._free()
        for number in range(1, self.count() + 1):
            page = self.page(number)
            at = _HEADER_BYTES if number == 1 else 0
            if number in free or len(page) < self.size or page[at] != _LEAF:
                continue
            cells = int.from_bytes(page[at + 3 : at + 5], "big")
            if at + 8 + 2 * cells > self.size:
                self.damaged += 1
                continue
            for place in struct.unpack_from(f">{cells}H", page, at + 8):
                try:
                    yield record(self._payload(page, place))
                except (Damaged, IndexError, struct.error, UnicodeDecodeError):
                    self.damaged += 1

    def _free(self) -> set[int]:
        """Pages that hold nothing any more, though old rows may still be read there."""
        free: set[int] = set()
        trunk = int.from_bytes(self.page(1)[32:36], "big")
        while 0 < trunk <= self.count() and trunk not in free and len(free) < FREE_LIST_MAX:
            free.add(trunk)
            page = self.page(trunk)
            leaves = int.from_bytes(page[4:8], "big")
            if len(page) < self.size or 8 + 4 * leaves > self.size:
                break
            free.update(struct.unpack_from(f">{leaves}I", page, 8))
            trunk = int.from_bytes(page[:4], "big")
        return free

    def _payload(self, page: bytes, place: int) -> bytes:
        """The whole record of the cell at `place`, with what spilled over to other pages."""
        length, place = varint(page, place)
        _, place = varint(page, place)
        if length > RECORD_BYTES_MAX:
            raise Damaged
        most, least = self.size - 35, (self.size - 12) * 32 // 255 - 23
        local = length
        if length > most:
            local = least + (length - least) % (self.size - 4)
            local = local if local <= most else least
        content = bytearray(page[place : place + local])
        following = int.from_bytes(page[place + local : place + local + 4], "big") if local < length else 0
        while len(content) < length:
            spilled = self.page(following) if following else b""
            if len(spilled) < self.size:
                raise Damaged
            content += spilled[4:]
            following = int.from_bytes(spilled[:4], "big")
        return bytes(content[:length])


def _page_bytes(said: int) -> int:
    """The page size that a header says; 0 when it is none."""
    size = 65536 if said == 1 else said
    return size if 512 <= size <= 65536 and size & (size - 1) == 0 else 0


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer, and where it ends."""
    value = 0
    for step in range(8):
        byte = data[at + step]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + step + 1
    return value << 8 | data[at + 8], at + 9


def record(payload: bytes) -> list[Value]:
    """The values of a record; raises Damaged, IndexError, struct.error or UnicodeDecodeError."""
    end, at = varint(payload, 0)
    kinds: list[int] = []
    while at < end:
        kind, at = varint(payload, at)
        kinds.append(kind)
    values: list[Value] = []
    for kind in kinds:
        value, at = _value(payload, kind, at)
        values.append(value)
    if at != len(payload):
        raise Damaged
    return values


def _value(payload: bytes, kind: int, at: int) -> tuple[Value, int]:
    if kind == 0:
        return None, at
    if kind in _INTEGERS:
        end = at + _INTEGERS[kind]
        return int.from_bytes(payload[at:end], "big", signed=True), end
    if kind == 7:
        return struct.unpack_from(">d", payload, at)[0], at + 8
    if kind in (8, 9):
        return kind - 8, at
    if kind < 12:
        raise Damaged
    end = at + (kind - 12) // 2
    if end > len(payload):
        raise Damaged
    return (payload[at:end].decode() if kind % 2 else payload[at:end]), end
