"""Samples to the trainer, always outbound: by PUT to its address, or as blocks that it asks for over MQTT."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from pathlib import Path

from edged.bulk import Bulk
from edged.carriers import Count
from edged.clock import Clock
from edged.fetch import Cancelled, Fetcher, FetchError
from edged.link import Inbound
from edged.wire import messages, topics
from edged.wire.blocks import block_bytes, block_count, span

UNASKED_S_MAX = 60.0  # that samples wait for the trainer to ask for them; it claims them again then
LOOK_S = 0.5


class Uploads:
    """Hands samples over. `pace`: told how many bytes go, waits as bandwidth says."""

    def __init__(
        self, fetcher: Fetcher, bulk: Bulk, site: str, device: str, clock: Clock, count: Count,
        pace: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._fetcher, self._bulk, self._own, self._clock = fetcher, bulk, {"site": site, "dev": device}, clock
        self._count, self._pace = count, pace

    def put(self, url: str, path: Path, sha256: str) -> None:
        """Upload one sample to `url`/{sha256}. Raises FetchError or WrongContent."""
        self._fetcher.upload(f"{url.rstrip('/')}/{sha256}", path, sha256, self._pace)

    def answer(self, samples: Mapping[str, Path], cancelled: Cancelled) -> None:
        """Answer the trainer's questions for blocks of these samples (SHA-256 -> file), and of nothing else, until it says
        that it has every one. Raises FetchError, also when it is `cancelled`."""
        key = topics.ASK_BLOCKS(**self._own, sha256="0").topic.rpartition("/")[0]
        waiting, heard = set(samples), self._clock.monotonic()
        with self._bulk.listen(key) as box:
            self._bulk.subscribe(key, [topics.ASK_BLOCKS.filter(**self._own)])
            while waiting:
                if cancelled():
                    raise FetchError("the device is stopping: ask again")
                if self._clock.monotonic() - heard > UNASKED_S_MAX:
                    raise FetchError(
                        f"the trainer has asked for nothing for {UNASKED_S_MAX:.0f} s, {len(waiting)} samples are still here"
                        f" (bulk connection: {self._bulk.state})"
                    )
                try:
                    event = box.get(timeout=LOOK_S)
                except queue.Empty:
                    continue
                if isinstance(event, Inbound) and self._answer(event, samples, waiting):
                    heard = self._clock.monotonic()

    def _answer(self, event: Inbound, samples: Mapping[str, Path], waiting: set[str]) -> bool:
        """Answer one question; false when it is none that is answered."""
        try:
            _, fields, asked = messages.decode(event.topic, event.payload)
        except messages.InvalidPayload:
            self._count("payloads_invalid", 1)
            return False
        assert isinstance(asked, messages.AskBlocks)
        path = samples.get(fields["sha256"])
        if path is None:
            self._count("blocks_refused", 1)
            return False
        if not asked.blocks:
            waiting.discard(fields["sha256"])
        for number in asked.blocks:
            data = _block(path, number)
            if data is None:
                self._count("blocks_refused", 1)
                continue
            address = topics.BLOB(**self._own, sha256=fields["sha256"], n=str(number))
            # What cannot go now is asked for again.
            self._count("blocks_sent" if self._bulk.publish(address, data) else "blocks_unsent", 1)
            self._pace(len(data))
        return True


def _block(path: Path, number: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if number >= block_count(size):
                return None
            file.seek(span(number, size)[0])
            return file.read(block_bytes(size))
    except OSError:  # evicted meanwhile
        return None
