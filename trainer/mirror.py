"""Releases in an object store, for devices to fetch them from: what `trainer serve` answers with, as files at an fsspec URL.

    URL/blobs/SHA256   URL/releases/NAME@VERSION/release.json   URL/metadata/NAME

Devices take it for another address of the trainer and check every byte, so it is trusted with nothing. Law of this file:
what names another file comes after it, so that a copy that was broken off leads nowhere; what has the right size is there,
for the name of a blob is its hash and half a file is shorter.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, TrainerConfig
from trainer.host import Host
from trainer.releases import MANIFEST, Registry, ReleaseError
from trainer.signing import repository_of

log = logging.getLogger(__name__)

LOOK_S = 10.0  # between two looks at what is new
RETRY_S = 60.0  # after one that failed
END_S_MAX = 10.0

Files = Callable[[], Mapping[str, Path]]


class MirrorError(RuntimeError):
    """The store does not take the files; the message names it, what it said and the fix."""


@dataclass(slots=True)
class Copied:
    """What a run did: files and bytes that were copied, and files that were there."""

    files: int = 0
    bytes: int = 0
    there: int = 0


class Mirror:
    """The files of a registry, and of the signed metadata, at `url`. `options`: for the driver (`endpoint_url`, `anon`...);
    keys come from where the driver looks for them, for s3 the environment or ~/.aws."""

    def __init__(self, url: str, options: Mapping[str, Any], registry: Registry, metadata: Files = dict) -> None:
        """Raises ConfigError when the URL is none, or its driver is not installed."""
        import fsspec  # here: most trainers have no store

        self.url, self._registry, self._metadata = url.rstrip("/"), registry, metadata
        self._done: set[str] = set()  # blobs and manifests never change, so they are asked for once
        # A listing that is remembered would hide what another has removed.
        kept = {"use_listings_cache": False} | ({"auto_mkdir": True} if self.url.startswith("file:") else {})
        try:
            self._store, self._root = fsspec.core.url_to_fs(self.url, **(kept | dict(options)))
        except (ImportError, ValueError, TypeError) as error:
            raise ConfigError(
                f"storage.mirror {self.url}: {error}; for s3:// install s3fs, for gs:// gcsfs, for abfs:// adlfs"
            ) from None

    def sync(self) -> Copied:
        """Copy what the store does not have; raises MirrorError and ReleaseError. What was copied before stays."""
        copied = Copied()
        try:
            for name, path in self._fixed():
                if name not in self._done:
                    self._copy(name, path, copied)
                    self._done.add(name)
            for name, path in self._metadata().items():  # the timestamp last: it leads to all others
                self._replace(f"metadata/{name}", path, copied)
        except (MirrorError, ReleaseError):
            raise
        except Exception as error:  # every driver has its own
            text = " ".join(str(error).split()) or type(error).__name__
            raise MirrorError(
                f"{self.url}: {text}; are the keys, the bucket and its rights as they should be?"
            ) from error
        return copied

    def _fixed(self) -> Iterator[tuple[str, Path]]:
        for stored in self._registry.list():
            for entry in stored.manifest.files.values():
                yield f"blobs/{entry.sha256}", stored.folder / entry.path
            yield f"releases/{stored.ref.release}/{MANIFEST}", stored.folder / MANIFEST

    def _copy(self, name: str, path: Path, copied: Copied) -> None:
        size, target = path.stat().st_size, f"{self._root}/{name}"
        if self._size(target) == size:
            copied.there += 1
            return
        self._store.put_file(str(path), target)
        if self._size(target) != size:
            raise MirrorError(f"{self.url}/{name}: it has other than {size} bytes after it was written; try again")
        copied.files, copied.bytes = copied.files + 1, copied.bytes + size

    def _replace(self, name: str, path: Path, copied: Copied) -> None:
        data, target = path.read_bytes(), f"{self._root}/{name}"
        if self._size(target) == len(data) and self._store.cat_file(target) == data:
            copied.there += 1
            return
        self._store.pipe_file(target, data)
        copied.files, copied.bytes = copied.files + 1, copied.bytes + len(data)

    def _size(self, target: str) -> int | None:
        try:
            size = self._store.info(target)["size"]
        except FileNotFoundError:
            return None
        return int(size)


class Mirroring:
    """Keeps the store as the registry is, in a thread of its own: a store that is slow or away holds up nothing.
    `tick` is called again and again; it starts a copy when one is due. Without `storage.mirror` nothing is done."""

    def __init__(self, host: Host) -> None:
        """Raises ConfigError."""
        self.counters: dict[str, int] = {}
        self._host, self._due, self._said = host, 0.0, ""
        self._thread: threading.Thread | None = None
        self._mirror = mirror_of(host.config, host.registry) if host.config.storage.mirror else None

    def tick(self) -> None:
        """Start a copy when it is time, at most one at once."""
        if self._mirror is None or (self._thread is not None and self._thread.is_alive()):
            return
        if not 0 <= self._due - self._host.now() <= RETRY_S:  # due, or the clock was set back
            self._thread = threading.Thread(target=self._run, args=(self._mirror,), name="mirror", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Wait a moment for a copy that is under way; what it lacks the next process copies."""
        if self._thread is not None:
            self._thread.join(END_S_MAX)

    def _run(self, mirror: Mirror) -> None:
        try:
            copied = mirror.sync()
            self._said, self._due = "", self._host.now() + LOOK_S
            self._count("mirror_files", copied.files)
            if copied.files:
                log.info("%s: %d files, %d bytes copied", mirror.url, copied.files, copied.bytes)
        except (MirrorError, ReleaseError, OSError) as error:
            self._due = self._host.now() + RETRY_S
            self._count("mirror_failures", 1)
            if str(error) != self._said:
                log.error(
                    "mirror: %s; tried again every %.0f s, devices ask the next address meanwhile", error, RETRY_S
                )
            self._said = str(error)

    def _count(self, name: str, n: int) -> None:
        if n:
            self.counters[name] = self.counters.get(name, 0) + n


def mirror_of(config: TrainerConfig, registry: Registry, url: str = "") -> Mirror:
    """The mirror at `url`, by default the configured one; raises ConfigError."""

    def metadata() -> Mapping[str, Path]:
        repository = repository_of(config)
        return repository.files() if repository is not None else {}

    return Mirror(url or config.storage.mirror, config.storage.options, registry, metadata)
