"""The signed metadata of releases (TUF): what devices may install, in `metadata/`, and the online keys, in `keys/`.

Law of this file: what devices may see is what `timestamp.json` leads to, and it is written last. Everything else has its
version in its name and is never changed once a timestamp led to it, so that a crash between two files leaves the state
before, and a device in the middle of a refresh finds what it began with. All changes hold one lock, across processes.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from edged.wire.manifest import ReleaseRef
from edged.wire.trust import METADATA_BYTES_MAX, MODELS, role_of, target_path
from trainer.files import write_json, write_whole
from trainer.keys import TrustError, load_online

OFFLINE = (Root.type, Targets.type)
ONLINE = (MODELS, Snapshot.type, Timestamp.type)
OLD_VERSIONS_MAX = 8  # of a file, kept for devices in the middle of a refresh; of root all are kept
DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """Days from signing to expiry. The timestamp's bounds how long a device can be kept from news; the others', how long
    a stolen key is of use when devices hear nothing of its revocation."""

    root: float = 365.0
    targets: float = 365.0
    models: float = 7.0
    snapshot: float = 7.0
    timestamp: float = 1.0

    def seconds(self, role: str) -> float:
        """The life of metadata of this role."""
        return float(getattr(self, role)) * DAY_S


@dataclass(slots=True)
class Current:
    """One consistent state of all roles."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    models: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]

    def role(self, name: str) -> Metadata[Any]:
        """The metadata of a role."""
        found: Metadata[Any] = getattr(self, name)
        return found

    def keyids(self, role: str) -> list[str]:
        """The ids of the keys that may sign a role."""
        delegator = self.targets.signed if role == MODELS else self.root.signed
        return list(delegator.get_delegated_role(role).keyids)

    def verified(self, role: str) -> bool:
        """Whether enough of the role's keys have signed it."""
        metadata = self.role(role)
        delegator = self.targets.signed if role == MODELS else self.root.signed
        return bool(delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures))


class Repository:
    """The trust folder of a trainer; any number of processes and threads may use it. `now`: seconds since the epoch."""

    def __init__(self, folder: Path, lifetimes: Lifetimes | None = None, now: Callable[[], float] = time.time) -> None:
        self.folder, self.metadata, self.keys = folder, folder / "metadata", folder / "keys"
        self.lifetimes, self.now = lifetimes or Lifetimes(), now

    # What is signed.

    def sign(self, ref: ReleaseRef, size: int) -> None:
        """Let devices install this release, whose `release.json` has `size` bytes; idempotent. Raises TrustError."""
        with self.locked():
            current = self.current()
            reason = self.revoked().get(ref.release)
            if reason is not None:
                raise TrustError(f"{ref.release} was revoked ({reason}) and stays so: release it under a new version")
            path, targets = target_path(ref.release), current.models.signed.targets
            if path in targets and targets[path].hashes.get("sha256") == ref.sha256:
                return
            if path in targets:
                raise TrustError(f"{ref.release} is signed with other bytes: release these under a new version")
            targets[path] = TargetFile(size, {"sha256": ref.sha256}, path)
            self.publish(current, {MODELS})

    def revoke(self, release: str, reason: str) -> bool:
        """Let no device install this release any more, and remember it; whether it was signed. Raises TrustError."""
        with self.locked():
            # Saved first: a crash before the metadata is written is mended by the next `renew`.
            write_json(self.folder / "revoked.json", {**self.revoked(), release: reason})
            current = self.current()
            if current.models.signed.targets.pop(target_path(release), None) is None:
                return False
            self.publish(current, {MODELS})
            return True

    def signed(self) -> dict[str, str]:
        """The releases that devices may install: name@version -> SHA-256 of its release.json."""
        targets = self.current().models.signed.targets
        return {path.partition("/")[2]: target.hashes["sha256"] for path, target in targets.items()}

    def revoked(self) -> dict[str, str]:
        """The releases that were revoked, and why."""
        path = self.folder / "revoked.json"
        try:
            found: dict[str, str] = json.loads(path.read_bytes()) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise TrustError(f"{path}: {error}; restore it from a backup: it names what must not be signed") from None
        return found

    def renew(self) -> list[str]:
        """Sign again what is past half its life, what its own role's keys did not sign (they were just changed), and what
        a crash left undone; the roles. The offline roles are not in it: they need people. Raises TrustError."""
        with self.locked():
            current = self.current()
            due = {role for role in ONLINE if not current.verified(role) or self.left(current, role) < 0.5}
            gone = {target_path(release) for release in self.revoked()} & current.models.signed.targets.keys()
            for path in gone:
                del current.models.signed.targets[path]
            if gone:
                due.add(MODELS)
            return self.publish(current, due) if due else []

    # What devices ask for.

    def files(self) -> dict[str, Path]:
        """Every metadata file that devices may ask for now, by its name."""
        current = self.current()
        names = [f"{number}.root.json" for number in range(1, current.root.signed.version + 1)]
        names += [f"{current.role(role).signed.version}.{role}.json" for role in (Targets.type, MODELS, Snapshot.type)]
        return {name: self.metadata / name for name in (*names, "timestamp.json") if (self.metadata / name).is_file()}

    def read(self, name: str) -> bytes | None:
        """The bytes of a metadata file; None when there is none of this name."""
        try:
            return (self.metadata / name).read_bytes() if role_of(name) else None
        except FileNotFoundError:
            return None

    def root(self) -> Path:
        """The newest root: what a device is enrolled with."""
        return self.metadata / f"{self._root_version()}.root.json"

    # For ceremonies, and for the list of keys.

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process or thread changes things at a time."""
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def current(self) -> Current:
        """The state that devices see; raises TrustError when a file of it is missing or damaged."""
        timestamp: Metadata[Timestamp] = self._load(Timestamp.type)
        snapshot: Metadata[Snapshot] = self._load(Snapshot.type, timestamp.signed.snapshot_meta.version)
        versions = {role: snapshot.signed.meta[f"{role}.json"].version for role in (Targets.type, MODELS)}
        return Current(
            self._load(Root.type, self._root_version()), self._load(Targets.type, versions[Targets.type]),
            self._load(MODELS, versions[MODELS]), snapshot, timestamp,
        )  # fmt: skip

    def left(self, current: Current, role: str) -> float:
        """The share of its life that a role's metadata has before it; negative: it has expired."""
        expires: datetime.datetime = current.role(role).signed.expires
        return (expires.timestamp() - self.now()) / self.lifetimes.seconds(role)

    def expiry(self, role: str) -> datetime.datetime:
        """When metadata of this role that is signed now expires."""
        whole = int(self.now() + self.lifetimes.seconds(role))  # metadata knows whole seconds
        return datetime.datetime.fromtimestamp(whole, datetime.UTC)

    def publish(self, current: Current, changed: set[str]) -> list[str]:
        """Sign and write the online roles of `changed` and those that follow from them; the roles. The caller holds the
        lock, and has written the offline roles. Raises TrustError."""
        written = []
        if MODELS in changed:
            self._sign(current, MODELS)
            written.append(MODELS)
        if changed & {MODELS, Targets.type, Snapshot.type}:
            for role in (Targets.type, MODELS):
                version = current.role(role).signed.version
                data = (self.metadata / f"{version}.{role}.json").read_bytes()
                current.snapshot.signed.meta[f"{role}.json"] = MetaFile.from_data(version, data, ["sha256"])
            data = self._sign(current, Snapshot.type)
            version = current.snapshot.signed.version
            current.timestamp.signed.snapshot_meta = MetaFile.from_data(version, data, ["sha256"])
            written.append(Snapshot.type)
        self._sign(current, Timestamp.type)
        self._forget_old(current)
        return [*written, Timestamp.type]

    def _sign(self, current: Current, role: str) -> bytes:
        metadata = current.role(role)
        metadata.signed.version += 1
        metadata.signed.expires = self.expiry(role)
        metadata.signatures.clear()
        for key in load_online(self.keys, role, current.keyids(role)):
            metadata.sign(key.signer, append=True)
        if not current.verified(role):
            raise TrustError(f"role {role}: too few of its keys are in {self.keys}; put them back")
        return write(self.metadata, role, metadata)

    def _forget_old(self, current: Current) -> None:
        for role in (Targets.type, MODELS, Snapshot.type):
            oldest = current.role(role).signed.version - OLD_VERSIONS_MAX
            for path in self.metadata.glob(f"*.{role}.json"):
                if int(path.name.partition(".")[0]) < oldest:
                    path.unlink()

    def _root_version(self) -> int:
        numbers = [int(path.name.partition(".")[0]) for path in self.metadata.glob("*.root.json")]
        if not numbers:
            raise TrustError(f"{self.metadata}: no root is here; restore the folder from a backup")
        return max(numbers)

    def _load(self, role: str, version: int | None = None) -> Metadata[Any]:
        return read(self.metadata / (f"{role}.json" if version is None else f"{version}.{role}.json"))


def exists(folder: Path) -> bool:
    """Whether a trust folder has been made here."""
    return (folder / "metadata" / "timestamp.json").is_file()


def read(path: Path) -> Metadata[Any]:
    """The metadata in a file; raises TrustError."""
    try:
        return Metadata.from_bytes(path.read_bytes())
    except (OSError, RepositoryError) as error:
        raise TrustError(
            f"{path}: {error}; run this as the trainer's user, or restore the trust folder from a backup"
        ) from None


def write(folder: Path, role: str, metadata: Metadata[Any]) -> bytes:
    """Write a role's metadata under its name, whole; its bytes. Raises TrustError when devices would not take so much."""
    data = metadata.to_bytes()
    if len(data) > METADATA_BYTES_MAX[role]:
        raise TrustError(
            f"role {role}: {len(data)} bytes of metadata, devices take at most {METADATA_BYTES_MAX[role]}: "
            "revoke releases that nobody needs"
        )
    name = f"{role}.json" if role == Timestamp.type else f"{metadata.signed.version}.{role}.json"
    write_whole(folder / name, data)
    return data
