"""A trainer's half of delivery in this process, releases of a size, and a release's way to a device."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from edged.wire import messages, topics
from edged.wire.manifest import ReleaseRef
from tests.support.device import SITE, Bus
from tests.system.broker import Broker
from trainer.blocks import Blocks
from trainer.config import Blocks as BlocksConfig
from trainer.config import TrainerConfig
from trainer.config_network import Broker as BrokerConfig
from trainer.releases import Registry, file_entry, reference

NAME = "host"


def ballasted(toy: Path, folder: Path, kib: int, release: str = "toy@1.1", seed: int = 1) -> ReleaseRef:
    """The release `toy` with a file of `kib` KiB more, which no block repeats."""
    shutil.copytree(toy, folder)
    (folder / "ballast.bin").write_bytes(random.Random(seed).randbytes(kib << 10))
    fields = json.loads((folder / "release.json").read_bytes())
    fields["release"] = release
    fields["files"]["ballast"] = file_entry(folder / "ballast.bin").model_dump()
    (folder / "release.json").write_text(json.dumps(fields))
    return reference(folder)


class BlockHost:
    """`with BlockHost(...) as host:` answers wants for the releases of `registry`; `stop` and `start` it at will."""

    def __init__(
        self, folder: Path, broker: Broker, bus: Bus | None = None, *, url: str = "",
        claimed: Callable[[str], bool] = lambda _: False, **blocks: Any,
    ) -> None:  # fmt: skip
        self.registry = Registry(folder / "registry")
        self.metadata: dict[str, Path] = {}
        self.arrived: list[str] = []
        tls: dict[str, Any] = {}
        if broker.ca is not None:
            certificate, key = broker.certificate(NAME)
            bulk_certificate, bulk_key = broker.certificate(f"{NAME}~blk")
            tls = {"ca": broker.ca, "certificate": certificate, "key": key}
            tls |= {"bulk_certificate": bulk_certificate, "bulk_key": bulk_key}
        self.config = TrainerConfig(
            name=NAME, site=SITE, data_dir=folder, broker=BrokerConfig(host=broker.host, port=broker.port, **tls),
            blocks=BlocksConfig(**blocks),
        )  # fmt: skip
        self._bus, self._url, self._claimed = bus, url, claimed
        self.blocks = self._make()

    def _make(self) -> Blocks:
        return Blocks(
            self.config, self.registry, claimed=self._claimed, arrived=self.arrived.append,
            metadata=lambda: dict(self.metadata),
        )  # fmt: skip

    @property
    def counters(self) -> dict[str, int]:
        """What it has counted since it was started."""
        return self.blocks.counters

    def start(self) -> None:
        """Serve, and say so."""
        self.blocks.start()
        if self._bus is not None:
            state = messages.HostState(**self._bus.stamp(), state="online", url=self._url, blocks=True)
            self._bus.say(topics.HOST(trainer=NAME), state)

    def stop(self) -> None:
        """End, and forget everything but the files, as a kill would; the announcement stays."""
        self.blocks.stop()
        self.blocks = self._make()

    def __enter__(self) -> BlockHost:
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.blocks.stop()


class Forger:
    """Publishes wrong bytes as blocks of a blob as long as it lives."""

    def __init__(self, bus: Bus, sha256: str, count: int, size: int) -> None:
        self._stop = threading.Event()
        self.published = 0

        def run() -> None:
            number = 0
            while not self._stop.wait(0.002):
                address = topics.BLOCK(sha256=sha256, n=str(number % count))
                if bus.link.publish(address, bytes([number % 256]) * size):
                    self.published += 1
                    number += 1

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more."""
        self._stop.set()
        self._thread.join()
