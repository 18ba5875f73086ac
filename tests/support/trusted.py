"""An owner of keys who releases, a device that installs through the real way of fetching, and a thief between the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, MetaFile, Snapshot, Timestamp

from edged.carriers import Https
from edged.clock import SystemClock
from edged.config import Trust as TrustConfig
from edged.config_host import Host
from edged.delivery import Delivery
from edged.fetch import Fetcher
from edged.releases import Releases, verify
from edged.trust import Trust
from edged.wire.manifest import ReleaseRef
from edged.wire.trust import MODELS
from tests.support.files import FileServer
from trainer import ceremony, keys
from trainer.releases import MANIFEST, Registry
from trainer.repository import Repository, exists

DAY_S = 86400.0


def passphrase(_path: Path) -> str:
    """Of every offline key in the tests."""
    return "correct horse battery"


class Owner:
    """Has a trust folder, three media with offline keys, and a registry; publishes on a FileServer."""

    def __init__(self, folder: Path) -> None:
        """Makes the keys, unless `folder` has them."""
        self.media = [folder / f"medium{number}" for number in range(3)]
        if not exists(folder / "trust"):
            ceremony.create(folder / "trust", self.media, passphrase)
        self.repository = Repository(folder / "trust")
        self.registry = Registry(folder / "registry")

    def release(self, folder: Path) -> ReleaseRef:
        """Register and sign."""
        ref = self.registry.register(folder)
        self.repository.sign(ref, (folder / MANIFEST).stat().st_size)
        return ref

    def offline(self, role: str) -> list[keys.Key]:
        """The offline keys of a role, by medium."""
        return [keys.load(path, passphrase) for medium in self.media for path in sorted(medium.glob(f"{role}-*.key"))]

    def online(self, role: str) -> keys.Key:
        """The key of an online role."""
        return keys.load_online(self.repository.keys, role, self.repository.current().keyids(role))[0]

    def publish(self, server: FileServer) -> dict[str, bytes]:
        """Serve what is signed now, and the releases; the metadata files as they are now."""
        served = {name: path.read_bytes() for name, path in self.repository.files().items()}
        server.files.update({f"/metadata/{name}": data for name, data in served.items()})
        for stored in self.registry.list():
            server.publish(stored.folder, stored.ref)
        return served

    def at(self, now: float) -> Repository:
        """The same repository at another time."""
        return Repository(self.repository.folder, now=lambda: now)


class Device:
    """What a device has of trust and releases; `again()` is the same after a restart."""

    def __init__(self, folder: Path, root: Path | None, url: str, clock: Any = None, unsigned: bool = False) -> None:
        self.folder, self.root, self.url, self.clock = folder, root, url, clock or SystemClock()
        self.releases = Releases(folder / "releases")
        config = TrustConfig(root=root, unsigned=unsigned)
        https = Https(Fetcher(), lambda: [url], lambda _name, _count: None)
        host = Host(carrier="https")
        self.delivery = Delivery(
            {"https": https}, lambda: host, self.releases, self.clock, lambda _name, _count: None, lambda: None
        )
        self.trust = Trust(config, folder / "trust", self.delivery.metadata, self.clock)
        self.delivery.admit = self.trust.admit

    def again(self) -> Device:
        """After a restart."""
        return Device(self.folder, self.root, self.url, self.clock)

    def install(self, ref: ReleaseRef) -> None:
        """Fetch a release as an update does, and check what came; raises what the fetch raises."""
        folder = self.releases.folder(ref)
        self.delivery.fetch(ref, folder, lambda: False)
        verify(folder, ref)


class Wall:
    """A clock whose wall time a test sets."""

    def __init__(self, now: float) -> None:
        self.time = now

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def real(self, seconds: float) -> float:
        return seconds


def forged(data: bytes, change: Callable[[Any], object], signers: Sequence[keys.Key]) -> bytes:
    """The metadata in `data` with a change, signed anew by these keys alone."""
    metadata: Metadata[Any] = Metadata.from_bytes(data)
    change(metadata.signed)
    metadata.signatures.clear()
    for key in signers:
        metadata.sign(key.signer, append=True)
    return metadata.to_bytes()


def bump(signed: Any) -> None:
    """The next version."""
    signed.version += 1


def leading_to(
    served: dict[str, bytes], models: bytes, snapshot_key: keys.Key, timestamp_key: keys.Key
) -> dict[str, bytes]:
    """What `served` becomes when a thief of these two keys leads devices to other metadata of the role models."""
    number = Metadata.from_bytes(models).signed.version
    before: Metadata[Timestamp] = Metadata.from_bytes(served["timestamp.json"])
    old = f"{before.signed.snapshot_meta.version}.snapshot.json"

    def point(snapshot: Snapshot) -> None:
        bump(snapshot)
        snapshot.meta[f"{MODELS}.json"] = MetaFile.from_data(number, models, ["sha256"])

    snapshot = forged(served[old], point, [snapshot_key])
    version = before.signed.snapshot_meta.version + 1

    def follow(timestamp: Timestamp) -> None:
        bump(timestamp)
        timestamp.snapshot_meta = MetaFile.from_data(version, snapshot, ["sha256"])

    timestamp = forged(served["timestamp.json"], follow, [timestamp_key])
    return {f"{number}.{MODELS}.json": models, f"{version}.snapshot.json": snapshot, "timestamp.json": timestamp}
