"""Samples as blocks: a real store and connection hand over what a job claims, and nothing else, whatever breaks."""

from __future__ import annotations

import hashlib
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from edged.bulk import Bulk
from edged.clock import SystemClock
from edged.fetch import Fetcher, FetchError
from edged.link import LinkOptions
from edged.mqtt_carrier import MqttCarrier
from edged.stamp import Stamp
from edged.uploads import Uploads
from edged.wire import messages, topics
from edged.wire.blocks import BLOCK_BYTES
from tests.support.blocks import BlockHost
from tests.support.device import SITE, Bus, until
from tests.system.broker import Broker


class Holder:
    """A device that holds samples of several sizes."""

    def __init__(self, folder: Path, broker: Broker, name: str = "dev1") -> None:
        folder.mkdir()
        self.counted, self.ended = Counter[str](), threading.Event()
        certificate, key = broker.certificate(f"{name}~blk") if broker.ca else (None, None)
        options = LinkOptions(broker.host, broker.port, f"{name}~blk", broker.ca, certificate, key, reconnect_s_max=1)
        self.bulk = Bulk(options, self._count)
        self.uploads = Uploads(Fetcher(), self.bulk, SITE, name, SystemClock(), self._count, lambda _: None)
        self.samples: dict[str, Path] = {}
        for size in (1, 3000, BLOCK_BYTES, BLOCK_BYTES + 1, 700_000):
            data = random.Random(f"{name} {size}").randbytes(size)
            digest = hashlib.sha256(data).hexdigest()
            self.samples[digest] = folder / digest
            self.samples[digest].write_bytes(data)

    def _count(self, name: str, n: int) -> None:
        self.counted[name] += n

    @property
    def sizes(self) -> dict[str, int]:
        return {digest: path.stat().st_size for digest, path in self.samples.items()}

    def answering(self) -> threading.Thread:
        """Hand everything over, in a thread that ends when the trainer has it."""

        def answer() -> None:
            with suppress(FetchError):
                self.uploads.answer(self.samples, self.ended.is_set)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """It is gone."""
        self.ended.set()
        self.bulk.close()


@pytest.fixture
def holder(tmp_path: Path, broker: Broker) -> Iterator[Holder]:
    made = Holder(tmp_path / "dev1", broker)
    yield made
    made.close()


def kept(host: BlockHost) -> dict[str, bytes]:
    folder = host.config.samples
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def whole(host: BlockHost, holder: Holder) -> bool:
    return kept(host) == {digest: path.read_bytes() for digest, path in holder.samples.items()}


def claim_again_until_done(host: BlockHost, holder: Holder, thread: threading.Thread) -> None:
    """As the coordinator does: whom nobody told that all is here, because he was just coming back, is told at the next
    claim."""

    def claim() -> bool:
        host.blocks.pull("dev1", holder.sizes)
        thread.join(1.0)
        return not thread.is_alive()

    until("the device is done", claim, 60)


def test_every_claimed_sample_arrives_and_the_device_is_told(tmp_path: Path, broker: Broker, holder: Holder) -> None:
    with BlockHost(tmp_path / "host", broker, claimed=lambda _: True) as host:
        thread = holder.answering()
        host.blocks.pull("dev1", holder.sizes)
        until("the device is done", lambda: not thread.is_alive())
        assert whole(host, holder)
        assert sorted(host.arrived) == sorted(holder.samples)
        again = holder.answering()  # the claim is repeated: nothing is sent twice
        sent = holder.counted["blocks_sent"]
        claim_again_until_done(host, holder, again)
        assert holder.counted["blocks_sent"] == sent


def test_nothing_but_what_was_claimed_is_answered(tmp_path: Path, broker: Broker, bus: Bus, holder: Holder) -> None:
    """L6: an image stays on its device unless a manifest names it."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"of another job")
    digest = hashlib.sha256(secret.read_bytes()).hexdigest()
    holder.answering()
    address = topics.ASK_BLOCKS(site=SITE, dev="dev1", sha256=digest)
    until("it listens", lambda: holder.bulk.state == "connected")

    def ask() -> bool:
        bus.say(address, messages.AskBlocks(**bus.stamp(), blocks=[0]))
        return holder.counted["blocks_refused"] > 0

    until("it refuses", ask)
    assert holder.counted["blocks_sent"] == 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize("victim", ["broker", "trainer", "device"])
def test_whoever_is_killed_the_samples_arrive_once_the_claim_is_repeated(
    tmp_path: Path, broker: Broker, holder: Holder, victim: str
) -> None:
    with BlockHost(tmp_path / "host", broker, claimed=lambda _: True) as host:
        thread = holder.answering()
        host.blocks.pull("dev1", holder.sizes)
        until("the first are here", lambda: len(kept(host)) >= 1)
        if victim == "broker":
            broker.kill9()
            broker.start()
        elif victim == "trainer":
            host.stop()
            host.start()
        else:
            holder.close()
            holder = Holder(tmp_path / "again", broker)  # the same samples: they are in its store
            thread = holder.answering()
        claim_again_until_done(host, holder, thread)
        assert whole(host, holder)
        holder.close()


def test_other_bytes_than_the_name_says_are_not_kept(tmp_path: Path, broker: Broker, bus: Bus, holder: Holder) -> None:
    with BlockHost(tmp_path / "host", broker, claimed=lambda _: True) as host:
        for path in holder.samples.values():
            path.write_bytes(bytes(path.stat().st_size))
        holder.answering()
        host.blocks.pull("dev1", holder.sizes)
        until("all are given up", lambda: host.counters.get("sample_blocks_wrong", 0) >= 3 * len(holder.samples))
        assert kept(host) == {}
        assert host.arrived == []


def test_what_no_job_claims_any_more_is_not_kept(tmp_path: Path, broker: Broker, holder: Holder) -> None:
    with BlockHost(tmp_path / "host", broker) as host:
        holder.answering()
        host.blocks.pull("dev1", holder.sizes)
        until("they came", lambda: host.counters.get("samples_unclaimed", 0) == len(holder.samples))
        assert kept(host) == {}


def test_a_trainer_that_asks_for_nothing_is_not_waited_for_for_ever(
    tmp_path: Path, broker: Broker, holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edged.uploads.UNASKED_S_MAX", 1.0)
    with pytest.raises(FetchError, match="asked for nothing for 1 s, 5 samples are still here"):
        holder.uploads.answer(holder.samples, lambda: False)


def test_metadata_is_named_and_fetched_as_it_is(tmp_path: Path, broker: Broker, bus: Bus) -> None:
    """The trainer names the files; what a device gets is their bytes, and who replaces one is seen at once."""
    with BlockHost(tmp_path / "host", broker) as host:
        file = tmp_path / "timestamp.json"
        big = random.Random(1).randbytes(2 * BLOCK_BYTES)  # the block after its last is empty
        (tmp_path / "snapshot.json").write_bytes(big)
        file.write_bytes(b'{"version": 1}')
        host.metadata |= {file.name: file, "1.snapshot.json": tmp_path / "snapshot.json"}

        def newest() -> dict[str, messages.MetadataFile]:
            heard = bus.of(messages.Metadata)
            return heard[-1].files if heard else {}

        until("it is announced", newest)
        bulk = Bulk(LinkOptions(broker.host, broker.port, "dev1~blk"), lambda _name, _n: None)
        carrier = MqttCarrier(
            bulk, SITE, "dev1", Stamp(SystemClock()), SystemClock(), lambda _name, _n: None, lambda: True, newest
        )
        assert carrier.metadata("timestamp.json", 100, lambda: False) == b'{"version": 1}'
        assert carrier.metadata("1.snapshot.json", 1 << 20, lambda: False) == big
        with pytest.raises(FetchError, match="names no such file") as failed:
            carrier.metadata("2.root.json", 100, lambda: False)
        assert failed.value.status == 404
        with pytest.raises(FetchError, match="131072 bytes announced, at most 100 are taken"):
            carrier.metadata("1.snapshot.json", 100, lambda: False)
        file.write_bytes(b'{"version": 2}')
        second = hashlib.sha256(b'{"version": 2}').hexdigest()
        until("the new one is announced", lambda: newest()["timestamp.json"].sha256 == second)
        assert carrier.metadata("timestamp.json", 100, lambda: False) == b'{"version": 2}'
        bulk.close()
