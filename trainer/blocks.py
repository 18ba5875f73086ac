"""Blocks over MQTT, the trainer's side: answers `up/want` with blocks of releases, and fetches claimed samples.

A connection and a thread of their own, `{trainer}~blk`: megabytes never stand in front of a command. Law of this file:
only what the registry or the signed metadata holds is published; a block is published once for all who wait for it; and
everything that waits is bounded and counted.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edged.core.bandwidth import Bucket
from edged.link import Connected, Disconnected, Inbound, Link, LinkOptions
from edged.wire import messages, topics
from edged.wire.blocks import BLOCK_BYTES, MQTT_BLOCK_BYTES_MAX, block_bytes, block_count, span
from edged.wire.bundle import BULK
from edged.wire.messages import InvalidPayload
from trainer.config import TrainerConfig
from trainer.core.asked import Asked, Block
from trainer.host import new_id
from trainer.pulls import Pulls
from trainer.releases import Registry, ReleaseError

log = logging.getLogger(__name__)

LOOK_S = 0.1  # at most, between two looks at what is due
METADATA_S = 2.0  # between two looks at the metadata files
UNKNOWN_S, UNKNOWN_MAX = 10.0, 1024  # a blob that is not there is looked for again after this; how many are remembered


class Blocks:
    """`start` and `stop` it; `pull` from any thread. `metadata`: the signed metadata files that clients may ask for now."""

    def __init__(
        self, config: TrainerConfig, registry: Registry, *, claimed: Callable[[str], bool],
        arrived: Callable[[str], None], metadata: Callable[[], dict[str, Path]] = dict,
    ) -> None:  # fmt: skip
        """Raises BadCredentials."""
        self.counters: dict[str, int] = {}
        self._config, self._registry, self._metadata = config, registry, metadata
        self._asked, self._bucket, self._open_at = (
            Asked(config.blocks.window_s, config.blocks.patience_s, config.blocks.gather_s),
            Bucket(),
            0.0,
        )
        self._boot, self._numbers = new_id(), itertools.count(1)
        self._want = topics.WANT.filter(site=config.site)
        self._link = Link(_options(config), [self._want]) if usable(config) else None
        self._pulls = Pulls(
            config.site, config.samples, config.http.sample_bytes_max, claimed=claimed, arrived=arrived,
            ask=lambda address, message: self._say(address, message), envelope=self._envelope, count=self._count,
        )  # fmt: skip
        self._orders: queue.Queue[tuple[str, str, int]] = queue.Queue()
        self._unknown: dict[str, float] = {}
        self._documents: dict[str, bytes] = {}  # SHA-256 -> a metadata file, as it was announced last or before that
        self._announced: dict[str, str] | None = None  # name -> SHA-256
        self._looked = -1e9
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="blocks", daemon=True)

    @property
    def serving(self) -> bool:
        """Whether devices are answered."""
        return self._link is not None

    def start(self) -> None:
        """Connect and serve."""
        if self._link is None:
            log.warning(
                "broker.bulk_certificate and bulk_key are not set: nothing is served over MQTT, only over HTTPS"
            )
            return
        self._link.start()
        self._thread.start()

    def stop(self) -> None:
        """End it; devices go on where they are when it is back."""
        self._stopping.set()
        if self._link is not None and self._thread.is_alive():
            self._thread.join()
            self._link.stop()

    def pull(self, device: str, wanted: dict[str, int]) -> None:
        """Have these samples (SHA-256 -> bytes) from a device; asking again changes nothing."""
        for sha256, size in wanted.items():
            self._orders.put((device, sha256, size))

    def _run(self) -> None:
        assert self._link is not None
        while not self._stopping.is_set():
            try:
                self._turn(self._link)
            except Exception:  # one broken file or message must not end the service of all others
                self._count("blocks_faults", 1)
                log.exception("blocks")
                self._stopping.wait(LOOK_S)

    def _turn(self, link: Link) -> None:
        now = time.monotonic()
        self._take_in(link, min(LOOK_S, max(self._asked.wait_s(now), self._open_at - now, 0.001)))
        now = time.monotonic()
        while not self._orders.empty():
            self._pulls.pull(*self._orders.get(), now)
        self._pulls.begin(now)
        link.subscribe([self._want, *self._pulls.subscriptions()])
        if link.connected:
            self._pulls.ask(now)
            self._announce(link)
            self._publish(link)
        link.ensure_alive()

    def _take_in(self, link: Link, timeout_s: float) -> None:
        try:
            event = link.inbox.get(timeout=timeout_s)
            while True:
                if isinstance(event, Inbound):
                    link.acknowledge(event)
                    self._on_message(event)
                elif isinstance(event, Connected):
                    self._pulls.reconnected()
                    self._announced = None
                elif isinstance(event, Disconnected):
                    self._count("broker_disconnects", 1)
                    log.warning("broker (blocks): %s", event.reason)
                event = link.inbox.get_nowait()
        except queue.Empty:
            return

    def _on_message(self, message: Inbound) -> None:
        now = time.monotonic()
        fields = topics.BLOB.match(message.topic)
        if fields is not None:
            self._pulls.take(fields["dev"], fields["sha256"], fields["n"], message.payload, now)
            return
        try:
            _, fields, want = messages.decode(message.topic, message.payload)
        except InvalidPayload as error:
            self._count("payloads_invalid", 1)
            log.debug("%s", error)
            return
        assert isinstance(want, messages.Want)
        refused = self._asked.want(fields["dev"], fields["sha256"], want.blocks, now)
        self._count("blocks_asked", len(want.blocks))
        self._count("blocks_refused", refused)

    def _publish(self, link: Link) -> None:
        """Publish what is due, as far as the connection and the bandwidth take it."""
        rate = self._config.blocks.kib_s * 1024.0
        while (now := time.monotonic()) >= self._open_at and (block := self._asked.due(now)) is not None:
            data = self._read(block)
            if data is None:
                self._count("blocks_unknown", self._asked.published(block))
                continue
            if not link.publish(topics.BLOCK(sha256=block[0], n=str(block[1])), data):
                return  # its buffer is full: again at the next turn
            self._count("blocks_published", 1)
            self._count("block_bytes_published", len(data))
            self._count("blocks_answered", self._asked.published(block))
            self._open_at = now + self._bucket.take(len(data), rate, now)

    def _read(self, block: Block) -> bytes | None:
        """The bytes of a block, empty for the one after a last full block; None: there is none, or it cannot be read."""
        sha256, number = block
        document = self._documents.get(sha256)
        path = self._blob(sha256) if document is None else None
        try:
            size = len(document) if document is not None else path.stat().st_size if path is not None else -1
            if size < 0 or number > block_count(size) or block_bytes(size) > MQTT_BLOCK_BYTES_MAX:
                return None
            if number == block_count(size):
                return b"" if size % BLOCK_BYTES == 0 else None
            start, end = span(number, size)
            if document is not None:
                return document[start:end]
            assert path is not None
            with path.open("rb") as file:
                file.seek(start)
                return file.read(end - start)
        except OSError as error:
            log.error("blob %s: %s", sha256, error)
            return None

    def _blob(self, sha256: str) -> Path | None:
        now = time.monotonic()
        if now - self._unknown.get(sha256, -UNKNOWN_S) < UNKNOWN_S:
            return None
        try:
            path = self._registry.blob(sha256)
        except ReleaseError as error:
            log.error("%s", error)
            path = None
        if path is None:
            if len(self._unknown) >= UNKNOWN_MAX:
                self._unknown.clear()
            self._unknown[sha256] = now
        return path

    def _announce(self, link: Link) -> None:
        """Tell what metadata there is, when it has changed or the connection is another one."""
        if self._announced is not None and time.monotonic() - self._looked < METADATA_S:
            return
        self._looked = time.monotonic()
        try:
            found = {name: path.read_bytes() for name, path in self._metadata().items()}
        except OSError as error:  # being replaced just now: the next look finds it
            log.warning("metadata: %s", error)
            return
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}
        if hashes == self._announced or (not found and self._announced is None):
            self._announced = hashes
            return
        files = {n: messages.MetadataFile(sha256=hashes[n], bytes=len(data)) for n, data in found.items()}
        message = messages.Metadata(**self._envelope(), files=files)
        if link.publish(topics.METADATA(trainer=self._config.name), messages.encode(message)):
            # Whoever has not heard of the new ones yet asks for those before: an answer that is old is better than none.
            before = {
                each: self._documents[each] for each in (self._announced or {}).values() if each in self._documents
            }
            self._announced, self._documents = hashes, before | {hashes[name]: data for name, data in found.items()}

    def _say(self, address: topics.Address, message: messages.AskBlocks) -> bool:
        return self._link is not None and self._link.publish(address, messages.encode(message))

    def _envelope(self) -> dict[str, Any]:
        return {"id": new_id(), "ts": time.time(), "boot": self._boot, "seq": next(self._numbers)}

    def _count(self, name: str, n: int) -> None:
        if n:
            self.counters[name] = self.counters.get(name, 0) + n


def usable(config: TrainerConfig) -> bool:
    """Whether there can be a second connection: with TLS it needs a certificate of its own."""
    return config.broker.ca is None or config.broker.bulk_certificate is not None


def _options(config: TrainerConfig) -> LinkOptions:
    broker = config.broker
    return LinkOptions(
        broker.host, broker.port, f"{config.name}{BULK}", broker.ca, broker.bulk_certificate, broker.bulk_key,
        keepalive_s=broker.keepalive_s,
    )  # fmt: skip
