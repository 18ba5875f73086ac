"""What looks like something that was escalated a moment ago is not escalated again. Pure: time is an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NOBODY = -1  # the class of a look at a whole frame without any box
BITS_MAX = 8  # of 64: noise and a box that is a pixel off flip about as many, another object about 32 (docs/policy.md)
LEVEL_MAX = 12.0  # grey levels of 255: the gradients of a look do not see that the light has changed
LOOKS_MAX = 4096  # remembered; the oldest are forgotten first
LOOKS_OF_ITEM_MAX = 64  # a frame with more boxes is told apart by its best ones


@dataclass(frozen=True, slots=True)
class Look:
    """What a crop looks like: 64 bits of its horizontal gradients (dHash), its mean grey level, and its class."""

    bits: int
    level: float  # 0..255
    label: int


@dataclass(frozen=True, slots=True)
class _Known:
    at: float
    item: str
    look: Look


class Dedupe:
    """The looks that were escalated, oldest first."""

    def __init__(self) -> None:
        self._known: deque[_Known] = deque(maxlen=LOOKS_MAX)

    def __len__(self) -> int:
        return len(self._known)

    def repeats(self, looks: Sequence[Look], item: str, now: float, window_s: float) -> bool:
        """Whether every look was escalated, by another item, within the last `window_s` seconds; false without looks.

        What is older than that is forgotten. Times must not go back from call to call.
        """
        while self._known and now - self._known[0].at >= window_s:
            self._known.popleft()
        known = [k for k in self._known if k.item != item]
        if not known or not looks:
            return False
        bits = np.array([k.look.bits for k in known], np.uint64)
        levels = np.array([k.look.level for k in known])
        labels = np.array([k.look.label for k in known])

        def seen(look: Look) -> bool:
            alike = (labels == look.label) & (np.abs(levels - look.level) <= LEVEL_MAX)
            differ = (bits[alike] ^ np.uint64(look.bits)).view(np.uint8)
            return bool((np.unpackbits(differ).reshape(-1, 64).sum(axis=1) <= BITS_MAX).any())

        return all(seen(look) for look in looks[:LOOKS_OF_ITEM_MAX])

    def remember(self, looks: Sequence[Look], item: str, now: float) -> None:
        """These were escalated now."""
        self._known.extend(_Known(now, item, look) for look in looks[:LOOKS_OF_ITEM_MAX])
