"""A release as blocks over the second connection of a simulated device: asked for, awaited and verified as real ones do.

Law of this file: a block counts when its bytes have the hash that the manifest names, and the manifest when its own bytes
have the hash that desired state names. The bytes are then let go: a simulated device has no disk and runs no model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any

from pydantic import ValidationError

from edged.link import Connected, Inbound, LinkEvent
from edged.wire import messages, topics
from edged.wire.blocks import BLOCK_BYTES, MQTT_BLOCK_BYTES_MAX, Transfer
from edged.wire.manifest import FileEntry, ReleaseManifest, ReleaseRef
from trainer.simulate.link import LoopLink

MANIFEST_BYTES_MAX = 4 << 20
SILENT_S_MAX = 30.0  # without one right block
LOOK_S = 0.5
TRIES = 3  # of a manifest: it has one hash for all its blocks

Accept = Callable[[int, bytes], bool]
Count = Callable[..., None]


class FetchFailed(Exception):
    """It did not come; later it may."""


class WrongRelease(Exception):
    """What came is not what was promised."""


class Fetch:
    """One release on its way to one device. `take` is given what happens to `link`, on the loop."""

    def __init__(self, site: str, device: str, stamp: Callable[[], dict[str, Any]], count: Count) -> None:
        self.link: LoopLink | None = None  # set before `release`
        self.bytes = self.total = 0
        self._own, self._stamp, self._count = {"site": site, "dev": device}, stamp, count
        self._box: asyncio.Queue[LinkEvent] = asyncio.Queue()
        self._connected = False
        self._connection = self._asked_on = 0  # what was asked for on an earlier one may be lost

    def take(self, event: LinkEvent) -> None:
        """Something has happened to the connection."""
        if isinstance(event, Connected):
            self._connected = True
            self._connection += 1
        elif not isinstance(event, Inbound):
            self._connected = False
        self._box.put_nowait(event)

    async def release(self, ref: ReleaseRef) -> ReleaseManifest:
        """Every file of the release, verified; raises FetchFailed, WrongRelease."""
        manifest = await self._manifest(ref)
        self.total = sum(entry.bytes for entry in manifest.files.values())
        for entry in {each.sha256: each for each in manifest.files.values()}.values():
            await self._file(entry)
        return manifest

    async def _manifest(self, ref: ReleaseRef) -> ReleaseManifest:
        for _ in range(TRIES):
            content, last = bytearray(), False
            while not last and len(content) <= MANIFEST_BYTES_MAX:
                got: list[bytes] = []

                def accept(_number: int, data: bytes, got: list[bytes] = got) -> bool:
                    got.append(data)
                    return len(data) <= BLOCK_BYTES

                await self._blocks(ref.sha256, [len(content) // BLOCK_BYTES], accept)
                content += got[-1]
                last = len(got[-1]) < BLOCK_BYTES
            if sha256(content).hexdigest() == ref.sha256:
                return _parsed(bytes(content), ref)
            self._count("blocks_wrong")
        raise FetchFailed(f"the manifest of {ref.release}: other bytes were published {TRIES} times")

    async def _file(self, entry: FileEntry) -> None:
        if entry.block_bytes > MQTT_BLOCK_BYTES_MAX:
            raise FetchFailed(f"{entry.path} has {entry.bytes} bytes: its blocks are too large for a broker")

        def accept(number: int, data: bytes) -> bool:
            if sha256(data).hexdigest() != entry.blocks[number]:
                return False
            self.bytes += len(data)
            return True

        await self._blocks(entry.sha256, range(len(entry.blocks)), accept)

    async def _blocks(self, digest: str, missing: Iterable[int], accept: Accept) -> None:
        loop = asyncio.get_running_loop()
        transfer, heard = Transfer(missing, loop.time()), loop.time()
        while not transfer.done:
            if loop.time() - heard > SILENT_S_MAX:
                raise FetchFailed(f"blob {digest[:12]}: no block for {SILENT_S_MAX:.0f} s")
            self._ask(digest, transfer, loop.time())
            try:
                wait_s = min(LOOK_S, transfer.patience_s(loop.time()) or LOOK_S)
                event = await asyncio.wait_for(self._box.get(), wait_s)
            except TimeoutError:
                continue
            if isinstance(event, Connected) and self._asked_on != self._connection:
                transfer.unasked()
            elif isinstance(event, Inbound) and self._took(event, digest, transfer, accept):
                heard = loop.time()
        if self.link is not None:
            self.link.subscribe([])

    def _ask(self, digest: str, transfer: Transfer, now: float) -> None:
        numbers = transfer.ask(now)
        if not numbers or self.link is None:
            return
        self.link.subscribe([topics.BLOCK(sha256=digest, n=str(n)).topic for n in sorted(transfer.outstanding)])
        want = messages.Want(**self._stamp(), blocks=numbers)
        if not self._connected or not self.link.publish(topics.WANT(**self._own, sha256=digest), messages.encode(want)):
            transfer.unasked()
            return
        self._asked_on = self._connection
        self._count("blocks_asked", len(numbers))

    def _took(self, event: Inbound, digest: str, transfer: Transfer, accept: Accept) -> bool:
        fields = topics.BLOCK.match(event.topic)
        if fields is None or fields["sha256"] != digest or not fields["n"].isdigit():
            return False
        number = int(fields["n"])
        if number not in transfer.missing:
            self._count("blocks_twice")
            return False
        if not accept(number, event.payload):
            self._count("blocks_wrong")
            return False
        self._count("blocks_received")
        self._count("block_bytes", len(event.payload))
        return transfer.arrived(number, asyncio.get_running_loop().time())


def _parsed(content: bytes, ref: ReleaseRef) -> ReleaseManifest:
    try:
        manifest = ReleaseManifest.model_validate_json(content)
    except ValidationError as error:
        raise WrongRelease(f"{ref.release}: its manifest is none: {error.error_count()} errors") from None
    if manifest.release != ref.release:
        raise WrongRelease(f"{ref.release}: its manifest is that of {manifest.release}")
    return manifest
