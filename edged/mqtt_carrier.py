"""Blocks over MQTT: this device asks for what it misses, a window at a time, and each block comes once for all who asked.

Nothing waits in the broker but that window, and what is lost there is asked for again. Whatever anybody publishes as a
block is checked like everything else: wrong bytes are counted, and the block stays missing.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256

from edged.bulk import Bulk
from edged.carriers import Came, Count
from edged.clock import Clock
from edged.fetch import ABSENT, Cancelled, FetchCancelled, FetchError
from edged.link import Connected, Inbound
from edged.part import Part
from edged.stamp import Stamp
from edged.wire import messages, topics
from edged.wire.blocks import BLOCK_BYTES, MQTT_BLOCK_BYTES_MAX, Transfer
from edged.wire.manifest import FileEntry, ReleaseRef

SILENT_S_MAX = 30.0  # without one right block: another carrier, or another time
LOOK_S = 0.5  # between two questions whether anybody still wants it
TRIES = 3  # of a document: it has one hash for all its blocks

Accept = Callable[[int, bytes], bool]


class MqttCarrier:
    """`served`: whether a trainer that answers is announced; `pointers`: the metadata files that it names."""

    def __init__(
        self, bulk: Bulk, site: str, device: str, stamp: Stamp, clock: Clock, count: Count,
        served: Callable[[], bool], pointers: Callable[[], dict[str, messages.MetadataFile]],
    ) -> None:  # fmt: skip
        self._bulk, self._own, self._stamp, self._clock = bulk, {"site": site, "dev": device}, stamp, clock
        self._count, self._served, self._pointers = count, served, pointers

    def unusable(self, entries: Sequence[FileEntry]) -> str:
        """See Carrier."""
        if self._bulk.unusable:
            return self._bulk.unusable
        for entry in entries:
            if entry.block_bytes > MQTT_BLOCK_BYTES_MAX:
                return f"{entry.path} has {entry.bytes} bytes: its blocks are too large for a broker"
        return "" if self._served() else "no trainer that serves blocks has announced itself"

    def manifest(self, ref: ReleaseRef, bytes_max: int, cancelled: Cancelled) -> bytes:
        """See Carrier."""
        return self._document(ref.sha256, bytes_max, cancelled)

    def metadata(self, name: str, bytes_max: int, cancelled: Cancelled) -> bytes:
        """See Carrier."""
        pointers = self._pointers()
        if not pointers:
            raise FetchError(f"metadata {name}: no trainer has named its files")
        pointer = pointers.get(name)
        if pointer is None:
            raise FetchError(f"metadata {name}: the trainer names no such file", ABSENT)
        if pointer.bytes > bytes_max:
            raise FetchError(f"metadata {name}: {pointer.bytes} bytes announced, at most {bytes_max} are taken")
        return self._document(pointer.sha256, bytes_max, cancelled)

    def bring(self, part: Part, came: Came, cancelled: Cancelled) -> None:
        """See Carrier."""
        entry = part.entry

        def accept(number: int, data: bytes) -> bool:
            if len(data) > entry.block_bytes or not part.put(number, [data]):
                return False
            came(len(data))
            return True

        self._transfer(entry.sha256, part.missing, accept, cancelled)

    def _document(self, digest: str, bytes_max: int, cancelled: Cancelled) -> bytes:
        """A blob of unknown length: a block that is shorter than a block is its last. Raises FetchError."""
        for _ in range(TRIES):
            content = bytearray()
            last = False
            while not last and len(content) <= bytes_max:
                got: list[bytes] = []

                def accept(_number: int, data: bytes, got: list[bytes] = got) -> bool:
                    got.append(data)
                    return len(data) <= BLOCK_BYTES

                self._transfer(digest, [len(content) // BLOCK_BYTES], accept, cancelled)
                content += got[-1]
                last = len(got[-1]) < BLOCK_BYTES
            if len(content) <= bytes_max and sha256(content).hexdigest() == digest:
                return bytes(content)
            self._count("blocks_wrong", 1)  # which one cannot be known
        raise FetchError(f"blob {digest[:12]}: what is published as its blocks is something else, {TRIES} times")

    def _transfer(self, digest: str, missing: Iterable[int], accept: Accept, cancelled: Cancelled) -> None:
        """Fetch these blocks; `accept` says whether the bytes of one are right. Raises FetchError."""
        now = self._clock.monotonic()
        transfer, heard, asked_on = Transfer(missing, now), now, 0
        key = topics.BLOCK(sha256=digest, n="0").topic.rpartition("/")[0]
        with self._bulk.listen(key) as box:
            while not transfer.done:
                if cancelled():
                    raise FetchCancelled(f"blob {digest[:12]}: cancelled, {len(transfer.missing)} blocks are missing")
                now = self._clock.monotonic()
                if now - heard > SILENT_S_MAX:
                    raise FetchError(
                        f"blob {digest[:12]}: no block over MQTT for {SILENT_S_MAX:.0f} s, "
                        f"{len(transfer.missing)} are missing (bulk connection: {self._bulk.state})"
                    )
                asked_on = self._ask(key, digest, transfer, now) or asked_on
                for event in _waiting(box, min(LOOK_S, transfer.patience_s(now) or LOOK_S)):
                    if isinstance(event, Connected) and asked_on != self._bulk.connection:
                        transfer.unasked()
                    elif isinstance(event, Inbound) and self._take(event, transfer, accept):
                        heard = self._clock.monotonic()

    def _ask(self, key: str, digest: str, transfer: Transfer, now: float) -> int:
        """Ask for what is due: on which connection, 0 when nothing was or could be asked for."""
        numbers = transfer.ask(now)
        if not numbers:
            return 0
        self._bulk.subscribe(key, [topics.BLOCK(sha256=digest, n=str(n)).topic for n in sorted(transfer.outstanding)])
        address = topics.WANT(**self._own, sha256=digest)
        connection = self._bulk.publish(address, messages.encode(messages.Want(**self._stamp(), blocks=numbers)))
        if connection:
            self._count("blocks_asked", len(numbers))
        else:
            transfer.unasked()
        return connection

    def _take(self, event: Inbound, transfer: Transfer, accept: Accept) -> bool:
        """Take in what was published as a block; true when it is one that was missing."""
        name = event.topic.rpartition("/")[2]
        number = int(name) if name.isdigit() and len(name) < 6 else -1
        self._count("block_bytes_received", len(event.payload))
        if number not in transfer.missing:
            self._count("blocks_twice", 1)
            return False
        if not accept(number, event.payload):
            self._count("blocks_wrong", 1)
            return False
        self._count("blocks_received", 1)
        return transfer.arrived(number, self._clock.monotonic())


def _waiting(box: queue.Queue[object], timeout_s: float) -> Iterable[object]:
    """What is in the box, after waiting for the first of it."""
    try:
        yield box.get(timeout=timeout_s)
        while True:
            yield box.get_nowait()
    except queue.Empty:
        return
