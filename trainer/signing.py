"""Signing where the trainer works unattended: releases as they are registered, metadata before it expires."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from edged.wire.manifest import ReleaseId, ReleaseRef
from trainer import ceremony
from trainer.config import TrainerConfig
from trainer.host import Host
from trainer.keys import TrustError
from trainer.releases import MANIFEST, Registry, StoredRelease
from trainer.repository import OFFLINE, Lifetimes, Repository, exists

log = logging.getLogger(__name__)

LOOK_S = 60.0
AGAIN_S = 86400.0  # a warning that still holds is said again after this
WARN_SHARE = 0.25  # of an offline role's life: three months of a year to bring the custodians together


def repository_of(config: TrainerConfig) -> Repository | None:
    """The trainer's signed metadata; None: there are no keys, and releases are not signed."""
    trust = config.trust
    return Repository(trust.folder, Lifetimes(**trust.lifetimes())) if exists(trust.folder) else None


def register(config: TrainerConfig, registry: Registry, folder: Path) -> ReleaseRef:
    """Register the release in `folder`, and sign it where there are keys; idempotent. Raises ReleaseError, TrustError."""
    ref = registry.register(folder)
    repository = repository_of(config)
    if repository is not None:
        sign(repository, registry.get(ref.release))
    return ref


def sign(repository: Repository, stored: StoredRelease) -> None:
    """Let devices install a registered release; raises TrustError."""
    repository.sign(stored.ref, (stored.folder / MANIFEST).stat().st_size)


def installable(config: TrainerConfig, stored: StoredRelease) -> None:
    """Raises TrustError for a release that devices would refuse."""
    repository, release = repository_of(config), stored.ref.release
    if repository is None:
        return
    reason = repository.revoked().get(release)
    if reason is not None:
        raise TrustError(f"{release} was revoked: {reason}")
    if repository.signed().get(release) != stored.ref.sha256:
        raise TrustError(f"{release} is not signed, and devices would refuse it: `trainer release sign {release}`")


def forgotten(config: TrainerConfig, release: str) -> bool:
    """Whether there are keys, and they did not sign this release: it is older than they are. One that was revoked is not
    forgotten: nobody should go back to it, and what replaces it must not wait for that."""
    repository = repository_of(config)
    return repository is not None and release not in {**repository.signed(), **repository.revoked()}


def listing(registry: Registry, repository: Repository | None, name: str | None = None) -> list[dict[str, Any]]:
    """The releases (of `name`), and whether devices may install them; also what is signed and was never registered
    here: nobody but a thief of the key signs that."""
    signed, revoked = (repository.signed(), repository.revoked()) if repository is not None else ({}, {})
    rows = [
        {
            "release": each.ref.release,
            "kind": each.manifest.kind,
            "bytes": sum(entry.bytes for entry in each.manifest.files.values()),
            "created": each.manifest.created,
            "sha256": each.ref.sha256,
            "signed": signed.pop(each.ref.release, None) == each.ref.sha256,
            "revoked": revoked.get(each.ref.release),
        }
        for each in registry.list(name)
    ]
    strange = {"kind": None, "bytes": None, "created": "NOT REGISTERED HERE", "signed": True, "revoked": None}
    return rows + [
        {"release": release, **strange, "sha256": sha256}
        for release, sha256 in sorted(signed.items())
        if name is None or ReleaseId(release).name == name
    ]


class Signing:
    """Keeps the metadata of a running trainer fresh; `tick` is called by the coordinator's thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._looked = -LOOK_S
        self._said: dict[str, tuple[str, float]] = {}  # kind -> what was said, and when (monotonic)

    def tick(self) -> None:
        """Look once a minute: renew what is due, say what people must do."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        repository = repository_of(self._host.config)
        if repository is None:
            folder = self._host.config.trust.folder
            text = f"no keys in {folder}: only devices with `unsigned = true` install releases; see `trainer keys init`"
            self._say("releases_unsigned", text, again_s=float("inf"))
            return
        try:
            published = ceremony.finish(repository)
            renewed = repository.renew()
        except (TrustError, OSError) as error:
            self._say("metadata_not_renewed", f"{error}; devices refuse installs when the present metadata expires")
            return
        current = repository.current()
        for text in (published, ", ".join(f"{role} {current.role(role).signed.version}" for role in renewed)):
            if text:
                with self._host.database.write() as connection:
                    self._host.announce(connection, "metadata_renewed", text)
        for role in OFFLINE:
            if repository.left(current, role) < WARN_SHARE:
                text = f"{role} expires on {current.role(role).signed.expires:%Y-%m-%d}: `trainer keys renew {role}`"
                self._say(f"{role}_expires", text)

    def _say(self, kind: str, text: str, again_s: float = AGAIN_S) -> None:
        said, at = self._said.get(kind, ("", 0.0))
        if text == said and time.monotonic() - at < again_s:
            return
        self._said[kind] = (text, time.monotonic())
        log.warning("%s: %s", kind, text)
        with self._host.database.write() as connection:
            self._host.announce(connection, kind, text)
