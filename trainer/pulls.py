"""Samples that come as blocks: the trainer asks the device that holds one, checks the whole and keeps it as an upload.

What is asked for is what an open job claims, and nothing else is taken in. All calls on the thread that owns the link.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edged.wire import messages, topics
from edged.wire.blocks import Transfer, block_count, span
from trainer.files import write_whole

log = logging.getLogger(__name__)

ACTIVE_MAX = 16  # samples that are on their way at once
PULL_S_MAX = 120.0  # without a new claim: the device is gone, or has given up
TRIES = 3  # of a sample that comes with other bytes than its name says

Key = tuple[str, str]  # device, SHA-256
Say = Callable[[topics.Address, messages.AskBlocks], bool]


@dataclass(slots=True)
class _Pull:
    size: int
    until: float
    transfer: Transfer | None = None
    parts: dict[int, bytes] = field(default_factory=dict)
    tries: int = 0


class Pulls:
    """`claimed`: whether an open job waits for a hash; `arrived` is told of each sample that is safe here; `ask` sends a
    question, or says that it cannot now."""

    def __init__(
        self, site: str, samples: Path, bytes_max: int, *, claimed: Callable[[str], bool],
        arrived: Callable[[str], None], ask: Say, envelope: Callable[[], dict[str, object]],
        count: Callable[[str, int], None],
    ) -> None:  # fmt: skip
        self._site, self._samples, self._bytes_max = site, samples, bytes_max
        self._claimed, self._arrived, self._say, self._envelope, self._count = claimed, arrived, ask, envelope, count
        self._pulls: dict[Key, _Pull] = {}
        self._ended: dict[Key, None] = {}  # whose devices are still to be told that they are here

    def pull(self, device: str, sha256: str, size: int, now: float) -> None:
        """Have a sample of `size` bytes; one that is here already ends at once."""
        key = (device, sha256)
        if (self._samples / sha256).is_file():
            self._ended[key] = None
        elif size > self._bytes_max:
            self._count("samples_too_large", 1)
            log.error("sample %s of %s has %d bytes, at most %d are taken", sha256, device, size, self._bytes_max)
        elif key in self._pulls:
            self._pulls[key].until = now + PULL_S_MAX
        else:
            self._pulls[key] = _Pull(size, now + PULL_S_MAX)

    def subscriptions(self) -> list[str]:
        """What must be listened to now."""
        return [
            topics.BLOB.filter(site=self._site, dev=device, sha256=sha256)
            for (device, sha256), pull in self._pulls.items() if pull.transfer is not None
        ]  # fmt: skip

    def reconnected(self) -> None:
        """What was asked for may not have been heard."""
        for pull in self._pulls.values():
            if pull.transfer is not None:
                pull.transfer.unasked()

    def begin(self, now: float) -> None:
        """Give up what has taken too long, and begin what there is room for. Listen to `subscriptions`, then `ask`."""
        for key in [key for key, pull in self._pulls.items() if now > pull.until]:
            log.warning("sample %s of %s did not come: it is claimed again, or given up", key[1], key[0])
            self._count("pulls_given_up", 1)
            del self._pulls[key]
        active = [pull for pull in self._pulls.values() if pull.transfer is not None]
        room, count = self._bytes_max - sum(pull.size for pull in active), ACTIVE_MAX - len(active)
        for pull in self._pulls.values():
            if pull.transfer is None and count > 0 and pull.size <= room:
                pull.transfer = Transfer(range(block_count(pull.size)), now)
                room, count = room - pull.size, count - 1

    def ask(self, now: float) -> None:
        """Ask for what is missing, and tell devices what is here."""
        for key in list(self._ended):
            if self._ask(key, []):
                del self._ended[key]
        for key, pull in self._pulls.items():
            numbers = pull.transfer.ask(now) if pull.transfer is not None else []
            if numbers and pull.transfer is not None and not self._ask(key, numbers):
                pull.transfer.unasked()

    def take(self, device: str, sha256: str, number: str, data: bytes, now: float) -> None:
        """A block came."""
        pull = self._pulls.get((device, sha256))
        known = number.isdigit() and len(number) < 6
        if pull is None or pull.transfer is None or not known or int(number) not in pull.transfer.missing:
            self._count("sample_blocks_unasked", 1)
            return
        start, end = span(int(number), pull.size)
        if len(data) != end - start:
            self._count("sample_blocks_wrong", 1)
            return
        pull.parts[int(number)] = data
        pull.transfer.arrived(int(number), now)
        pull.until = max(pull.until, now + PULL_S_MAX / 2)
        if pull.transfer.done:
            self._finish((device, sha256), pull, now)

    def _finish(self, key: Key, pull: _Pull, now: float) -> None:
        device, sha256 = key
        content = b"".join(pull.parts[number] for number in sorted(pull.parts))
        if hashlib.sha256(content).hexdigest() != sha256:
            self._count("sample_blocks_wrong", 1)
            pull.tries, pull.parts, pull.transfer = pull.tries + 1, {}, None
            log.warning("sample %s of %s came with other bytes than its name says", sha256, device)
            if pull.tries >= TRIES:
                del self._pulls[key]
            return
        del self._pulls[key]
        if not self._claimed(sha256):
            self._count("samples_unclaimed", 1)
            return
        write_whole(self._samples / sha256, content)
        self._count("samples_pulled", 1)
        self._ended[key] = None
        self._arrived(sha256)

    def _ask(self, key: Key, numbers: list[int]) -> bool:
        device, sha256 = key
        address = topics.ASK_BLOCKS(site=self._site, dev=device, sha256=sha256)
        return self._say(address, messages.AskBlocks(**self._envelope(), blocks=numbers))  # type: ignore[arg-type]
