"""The registry of releases: `releases/name@1.2/` with the files and `release.json`, found by name or by hash.

Law of this file: a registered release never changes. Registering the same bytes again changes nothing; other bytes
under a version that exists are refused. What is handed out was hashed when it was taken in.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edged.wire.blocks import block_bytes
from edged.wire.manifest import (
    Calibration,
    FileEntry,
    Kind,
    ReleaseId,
    ReleaseManifest,
    ReleaseRef,
    Thresholds,
)
from trainer.files import make_folder, sha256_of, sync_folder

MANIFEST = "release.json"


class ReleaseError(ValueError):
    """A release cannot be registered or found; the message names the release, what is wrong and the fix."""


@dataclass(frozen=True, slots=True)
class StoredRelease:
    """One release of the registry: its reference, what it is, and the folder that holds its files."""

    ref: ReleaseRef
    manifest: ReleaseManifest
    folder: Path


def canonical_bytes(manifest: ReleaseManifest) -> bytes:
    """The bytes of a manifest that is made now: sorted keys, no spaces, UTF-8. One that exists keeps the bytes that it was
    written with, because they are what pins it: a later version of this program would write others."""
    value = manifest.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def build_manifest(
    folder: Path,
    release: str,
    *,
    kind: Kind,
    engine: str,
    roles: Mapping[str, str],
    labels: list[str] | None = None,
    input_size: tuple[int, int] | None = None,
    thresholds: Thresholds | None = None,
    calibration: Calibration | None = None,
    base: ReleaseRef | None = None,
    evaluation: dict[str, Any] | None = None,
    lineage: dict[str, Any] | None = None,
    created: str | None = None,
) -> ReleaseManifest:
    """The manifest of the files in `folder`, hashed; `roles` maps a role (`model`, `golden_inputs`) to a file name.

    `created` is ISO 8601 in UTC, now by default. Raises ReleaseError for a missing file or wrong fields.
    """
    for role, name in roles.items():
        if not (folder / name).is_file():
            raise ReleaseError(f"release {release}: {folder / name} (role {role}) is missing; put the file there")
    try:
        return ReleaseManifest(
            release=release,
            kind=kind,
            engine=engine,
            files={role: file_entry(folder / name) for role, name in roles.items()},
            labels=labels or [],
            input_size=input_size,
            thresholds=thresholds or Thresholds(),
            calibration=calibration or Calibration(),
            base=base,
            evaluation=evaluation or {},
            lineage=lineage or {},
            created=created or datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
    except ValidationError as error:
        raise ReleaseError(f"release {release}: {_first(error)}") from None


def file_entry(path: Path) -> FileEntry:
    """What a release says of the file at `path`: its hash, its size, its blocks."""
    size = path.stat().st_size
    with path.open("rb") as file:
        return FileEntry.of(path.name, size, iter(lambda: file.read(block_bytes(size)), b""))


class Registry:
    """The releases in one folder. Several processes may use it at once; threads may share one object."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, StoredRelease] = {}
        self._blobs: dict[str, Path] = {}

    def register(self, source: Path) -> ReleaseRef:
        """Copy the release in the folder `source` into the registry, byte for byte; the reference that pins it.

        The same release again (whenever it was made) returns the first one's reference. Raises ReleaseError when the
        version exists with other content, or when a file is not what the folder's manifest says.
        """
        written = _read_bytes(source / MANIFEST)
        manifest = _parse(source / MANIFEST, written)
        existing = self._find(manifest.release)
        if existing is not None:
            return self._same(existing, manifest)
        make_folder(self.folder)
        beside = Path(tempfile.mkdtemp(prefix=f".{manifest.release}.", dir=self.folder))
        try:
            for role, entry in manifest.files.items():
                _copy_checked(source / entry.path, beside / entry.path, entry, f"{manifest.release} ({role})")
            _write_synced(beside / MANIFEST, written)
            sync_folder(beside)
            beside.chmod(0o755)
            try:
                os.rename(beside, self.folder / manifest.release)
            except OSError:  # another process was faster
                existing = self._find(manifest.release)
                if existing is None:
                    raise
                return self._same(existing, manifest)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return self.get(manifest.release).ref

    def get(self, release: str) -> StoredRelease:
        """The release called `name@version`; raises ReleaseError, naming those that exist."""
        found = self._find(release)
        if found is None:
            known = ", ".join(str(stored.ref.release) for stored in self.list()) or "none yet"
            raise ReleaseError(f"release {release!r} is not in {self.folder}; registered: {known}")
        return found

    def list(self, name: str | None = None) -> list[StoredRelease]:
        """All releases (of `name`), by name and then by version as numbers."""
        self._scan()
        with self._lock:
            stored = list(self._known.values())
        chosen = [each for each in stored if name is None or ReleaseId(each.ref.release).name == name]
        return sorted(chosen, key=lambda each: ReleaseId(each.ref.release))

    def next_version(self, name: str) -> ReleaseId:
        """The version after the newest one of `name`, also after those that were rolled back; 1.0 for the first."""
        stored = self.list(name)
        return ReleaseId(stored[-1].ref.release).next() if stored else ReleaseId(f"{name}@1.0")

    def blob(self, digest: str) -> Path | None:
        """The file with this SHA-256, of any release (its manifest too); None when there is none."""
        with self._lock:
            path = self._blobs.get(digest)
        if path is None:
            self._scan()
            with self._lock:
                path = self._blobs.get(digest)
        return path

    def _find(self, release: str) -> StoredRelease | None:
        canonical = _canonical(release)
        with self._lock:
            known = self._known.get(canonical)
        if known is None and (self.folder / canonical / MANIFEST).is_file():
            known = self._load(self.folder / canonical)
        return known

    def _scan(self) -> None:
        if not self.folder.is_dir():
            return
        for folder in self.folder.iterdir():
            if folder.name not in self._known and not folder.name.startswith(".") and (folder / MANIFEST).is_file():
                self._load(folder)

    def _load(self, folder: Path) -> StoredRelease:
        manifest = read_manifest(folder)
        if manifest.release != folder.name:
            raise ReleaseError(f"{folder} holds release {manifest.release}: rename the folder back, or remove it")
        stored = StoredRelease(reference(folder), manifest, folder)
        with self._lock:
            self._known[manifest.release] = stored
            self._blobs[stored.ref.sha256] = folder / MANIFEST
            for entry in manifest.files.values():
                self._blobs[entry.sha256] = folder / entry.path
        return stored

    def _same(self, existing: StoredRelease, manifest: ReleaseManifest) -> ReleaseRef:
        undated = {"created": ""}
        if existing.manifest.model_copy(update=undated) == manifest.model_copy(update=undated):
            return existing.ref
        raise ReleaseError(
            f"release {manifest.release} exists with other content: a release never changes; "
            f"register this as {ReleaseId(manifest.release).next()} or higher"
        )


def read_manifest(folder: Path) -> ReleaseManifest:
    """The manifest in a release's folder; raises ReleaseError when it is missing or wrong."""
    return _parse(folder / MANIFEST, _read_bytes(folder / MANIFEST))


def reference(folder: Path) -> ReleaseRef:
    """The name and hash that pin the release in `folder`; raises ReleaseError."""
    return ReleaseRef(release=read_manifest(folder).release, sha256=sha256_of(folder / MANIFEST))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReleaseError(f"{path}: {error.strerror}; a release's folder holds its {MANIFEST}") from None


def _parse(path: Path, data: bytes) -> ReleaseManifest:
    try:
        return ReleaseManifest.model_validate_json(data)
    except ValidationError as error:
        raise ReleaseError(f"{path}: {_first(error)}") from None


def _canonical(release: str) -> str:
    try:
        return str(ReleaseId(release))
    except ValueError as error:
        raise ReleaseError(str(error)) from None


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or "manifest"
    return f"{where} = {str(first.get('input'))[:80]!r}: {first['msg']}"


def _copy_checked(source: Path, target: Path, entry: FileEntry, what: str) -> None:
    if not source.is_file():
        raise ReleaseError(f"release {what}: {source} is missing; put the file there")
    shutil.copyfile(source, target)
    # The copy is hashed, not the source: what counts is what will be handed out.
    found = sha256_of(target)
    if found != entry.sha256:
        raise ReleaseError(
            f"release {what}: {source} has SHA-256 {found}, the manifest says {entry.sha256}: "
            "the file changed after the manifest was made; make the manifest again"
        )
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    target.chmod(0o644)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
