"""Bytes between this device and the trainer over HTTPS: releases down, samples up. Outbound only: no port is open here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from edged.fetch import Fetcher, FetchError, WrongContent
from edged.files import sha256_of
from edged.releases import MANIFEST, BadRelease, Releases, read_manifest
from edged.wire.manifest import ReleaseRef

log = logging.getLogger(__name__)


class HttpCarrier:
    """Fetches a release into a folder: the manifest first, checked against its pinned hash, then each blob."""

    def __init__(
        self, fetcher: Fetcher, url: Callable[[], str | None], releases: Releases,
        admit: Callable[[ReleaseRef, Callable[[], bool]], int],
    ) -> None:  # fmt: skip
        """`admit`: the length in bytes of a release's manifest, if this device may install it (trust.Trust.admit)."""
        self._fetcher, self._url, self._releases, self._admit = fetcher, url, releases, admit

    def fetch(self, ref: ReleaseRef, folder: Path, cancelled: Callable[[], bool]) -> None:
        """Bring every file of `ref` into `folder`; what is there and whole is not fetched again.

        Raises FetchError (try later, also when `cancelled` said so), Untrusted, or WrongContent or BadRelease (it is not
        what was promised).
        """
        manifest_bytes = self._admit(ref, cancelled)
        url = self._host()
        folder.mkdir(parents=True, exist_ok=True)
        manifest_path = folder / MANIFEST
        if not manifest_path.is_file() or sha256_of(manifest_path) != ref.sha256:
            data = self._fetcher.get_bytes(f"{url}/releases/{ref.release}/{MANIFEST}", manifest_bytes)
            beside = manifest_path.with_name(MANIFEST + ".new")
            beside.write_bytes(data)
            found = sha256_of(beside)
            if found != ref.sha256:
                beside.unlink()
                raise WrongContent(
                    f"{ref.release}: manifest has sha256 {found[:12]}, desired state pins {ref.sha256[:12]}"
                )
            beside.replace(manifest_path)
        for entry in read_manifest(folder).files.values():
            target = folder / entry.path
            if target.is_file() and target.stat().st_size == entry.bytes and sha256_of(target) == entry.sha256:
                continue
            if self._link_from_another(entry.sha256, target):
                continue
            self._fetcher.fetch(f"{url}/blobs/{entry.sha256}", target, entry.sha256, entry.bytes, cancelled=cancelled)

    def metadata(self, name: str, bytes_max: int) -> bytes:
        """A file of the releases' signed metadata, as the trainer has it; raises FetchError or WrongContent."""
        return self._fetcher.get_bytes(f"{self._host()}/metadata/{name}", bytes_max)

    def _host(self) -> str:
        url = self._url()
        if not url:
            raise FetchError("the trainer's address is not known yet: it announces itself on MQTT, or set host.url")
        return url

    def _link_from_another(self, sha256: str, target: Path) -> bool:
        """Hard-link the same bytes from a release that is already here: what did not change is not sent."""
        for folder in self._releases.candidates():
            if folder == target.parent:
                continue
            try:
                files = read_manifest(folder).files
            except BadRelease:  # damaged, or just being removed: the bytes come from the trainer then
                continue
            for entry in files.values():
                source = folder / entry.path
                if entry.sha256 == sha256 and source.is_file() and sha256_of(source) == sha256:
                    target.unlink(missing_ok=True)
                    os.link(source, target)
                    return True
        return False

    def upload(self, url: str, path: Path, sha256: str) -> None:
        """Hand one sample's pixels to the trainer. Raises FetchError or WrongContent."""
        self._fetcher.upload(f"{url.rstrip('/')}/{sha256}", path, sha256)
