"""Which blocks devices wait for, and when each is published: once for everybody who is fetching the same.

A block is due `window_s` after the first device asked for it, when every device that is fetching its blob waits for it or
has had it; otherwise after `patience_s`. So devices that are level stay so; who is behind is served soon and catches up
while those before him wait; and a slow one holds the others up so far and no further. When nobody was fetching anything,
nothing is due for `gather_s`: a release is told to many at once, and they begin together.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from edged.wire.blocks import WINDOW

FETCHING_S = 10.0  # since a device last asked for a block of a blob: it is fetching that
WAITING_MAX = 4096  # blocks that wait for their publication

Block = tuple[str, int]  # SHA-256 of the blob, number


@dataclass(slots=True)
class _Waiting:
    since: float
    devices: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Fetching:
    asked: float = 0.0
    had: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Blob:
    devices: defaultdict[str, _Fetching] = field(default_factory=lambda: defaultdict(_Fetching))
    had: Counter[int] = field(default_factory=Counter)  # block -> how many of these devices have had it


class Asked:
    """The wants of a fleet; every time is seconds of one rising clock."""

    def __init__(self, window_s: float, patience_s: float, gather_s: float = 0.0) -> None:
        self._window_s, self._patience_s, self._gather_s = window_s, max(window_s, patience_s), gather_s
        self._gathered = -math.inf  # nothing is due before
        self._waiting: dict[Block, _Waiting] = {}  # in the order of asking
        self._complete: list[tuple[float, Block]] = []  # heap: when each is due; may name some that are out already
        self._of: Counter[str] = Counter()  # device -> blocks that it waits for
        self._blobs: defaultdict[str, _Blob] = defaultdict(_Blob)
        self._pruned = 0.0

    def want(self, device: str, sha256: str, numbers: list[int], now: float) -> int:
        """A device asks for blocks; how many of them were refused, because it waits for too many or everybody does."""
        self._prune(now)
        if not self._blobs:
            self._gathered = now + self._gather_s
        blob = self._blobs[sha256]
        blob.devices[device].asked = now
        return sum(not self._want(blob, device, (sha256, number), now) for number in numbers)

    def _want(self, blob: _Blob, device: str, block: Block, now: float) -> bool:
        waiting = self._waiting.get(block)
        if waiting is not None and device in waiting.devices:
            return True
        if self._of[device] >= WINDOW or (waiting is None and len(self._waiting) >= WAITING_MAX):
            return False
        if waiting is None:
            waiting = self._waiting[block] = _Waiting(now)
        waiting.devices.add(device)
        self._of[device] += 1
        if block[1] in blob.devices[device].had:  # it was lost on its way
            blob.devices[device].had.discard(block[1])
            blob.had[block[1]] -= 1
        if len(waiting.devices) + blob.had[block[1]] >= len(blob.devices):
            heapq.heappush(self._complete, (waiting.since + self._window_s, block))
        return True

    def due(self, now: float) -> Block | None:
        """The next block to publish; `publish` it, then say so with `published`."""
        at, block = self._next()
        return block if max(at, self._gathered) <= now else None

    def wait_s(self, now: float) -> float:
        """How long nothing is due unless somebody asks."""
        return max(0.0, min(max(self._next()[0], self._gathered) - now, self._patience_s))

    def _next(self) -> tuple[float, Block | None]:
        while self._complete:
            at, block = self._complete[0]
            waiting = self._waiting.get(block)
            if waiting is not None and waiting.since + self._window_s == at:
                break
            heapq.heappop(self._complete)
        oldest = next(iter(self._waiting.items()), None)
        patience: tuple[float, Block | None] = (math.inf, None)
        if oldest is not None:
            patience = (oldest[1].since + self._patience_s, oldest[0])
        return min(self._complete[0], patience) if self._complete else patience

    def published(self, block: Block) -> int:
        """It is out, or there is no such block; for how many devices."""
        waiting = self._waiting.pop(block)
        blob = self._blobs.get(block[0])
        for device in waiting.devices:
            self._of[device] -= 1
            if not self._of[device]:
                del self._of[device]
            if blob is not None and device in blob.devices:
                blob.devices[device].had.add(block[1])
                blob.had[block[1]] += 1
        return len(waiting.devices)

    def _prune(self, now: float) -> None:
        if now - self._pruned < 1.0:
            return
        self._pruned = now
        for sha256, blob in list(self._blobs.items()):
            for device in [name for name, each in blob.devices.items() if now - each.asked >= FETCHING_S]:
                blob.had.subtract(blob.devices.pop(device).had)
            if not blob.devices:
                del self._blobs[sha256]
