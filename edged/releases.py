"""Releases on the device's disk: one folder each, `release.json` beside its files, verified before anything loads them."""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import ValidationError

from edged.files import sha256_of, sync
from edged.wire.manifest import ReleaseManifest, ReleaseRef

MANIFEST = "release.json"
MANIFEST_BYTES_MAX = 4 << 20


class BadRelease(Exception):
    """A release folder that is not what it says it is; the message names the file, what was expected and what is there."""


def read_manifest(folder: Path) -> ReleaseManifest:
    """The manifest of the release in `folder`; raises BadRelease."""
    path = folder / MANIFEST
    try:
        return ReleaseManifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadRelease(
            f"{path}: {error.strerror}; a release folder holds {MANIFEST} and the files it names"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadRelease(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def reference(folder: Path) -> ReleaseRef:
    """The reference (id and hash of the manifest's bytes) of the release in `folder`; raises BadRelease."""
    manifest = read_manifest(folder)
    return ReleaseRef(release=manifest.release, sha256=sha256_of(folder / MANIFEST))


def verify(folder: Path, ref: ReleaseRef) -> ReleaseManifest:
    """Check that `folder` is exactly the release `ref`: manifest, sizes and hashes; raises BadRelease."""
    manifest = read_manifest(folder)
    found = sha256_of(folder / MANIFEST)
    if manifest.release != ref.release or found != ref.sha256:
        raise BadRelease(
            f"{folder / MANIFEST}: expected {ref.release} {ref.sha256[:12]}, found {manifest.release} {found[:12]}"
        )
    for entry in manifest.files.values():
        path = folder / entry.path
        size = path.stat().st_size if path.is_file() else -1
        if size != entry.bytes:
            raise BadRelease(f"{path}: expected {entry.bytes} bytes, found {'no file' if size < 0 else size}")
        digest = sha256_of(path)
        if digest != entry.sha256:
            raise BadRelease(f"{path}: expected sha256 {entry.sha256[:12]}, found {digest[:12]}: the file was changed")
    return manifest


class Releases:
    """The device's release folders below `root`; a folder's name is the release, so that two versions live side by side."""

    def __init__(self, root: Path) -> None:
        self.root = root
        if not root.is_dir():
            root.mkdir(parents=True)
            sync(root.parent)

    def folder(self, ref: ReleaseRef) -> Path:
        """Where this release lies, or will lie; named by id and hash, because an id alone can be forged."""
        return self.root / f"{ref.release}-{ref.sha256[:12]}"

    def begin(self, folder: Path) -> None:
        """Make the folder of a release that is to come, durably: what is fetched into it is not lost with its name."""
        if not folder.is_dir():
            folder.mkdir()
            sync(self.root)

    def candidates(self) -> list[Path]:
        """Every release folder that is there."""
        return sorted(path for path in self.root.iterdir() if path.is_dir() and (path / MANIFEST).is_file())

    def install(self, source: Path) -> ReleaseRef:
        """Copy a verified release folder in (a factory seed, or by hand); idempotent. Raises BadRelease."""
        ref = reference(source)
        manifest = verify(source, ref)
        target = self.folder(ref)
        if target.is_dir():
            return ref
        beside = target.with_name(target.name + ".new")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        for name in (MANIFEST, *(entry.path for entry in manifest.files.values())):
            shutil.copyfile(source / name, beside / name)
            sync(beside / name)
        sync(beside)
        beside.rename(target)
        sync(self.root)
        return ref

    def discard(self, ref: ReleaseRef) -> None:
        """Remove a release's files and what was fetched of it; idempotent."""
        shutil.rmtree(self.folder(ref), ignore_errors=True)

    def keep_only(self, refs: list[ReleaseRef]) -> list[str]:
        """Remove every release folder but these; returns the names of what went."""
        wanted = {self.folder(ref).name for ref in refs}
        gone = [path.name for path in self.root.iterdir() if path.name not in wanted]
        for name in gone:
            shutil.rmtree(self.root / name, ignore_errors=True)
        return gone
