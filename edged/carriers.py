"""What brings bytes here: one interface, and the carrier over HTTPS with its mirrors (over MQTT: mqtt_carrier.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Protocol, TypeVar

from edged.fetch import ABSENT, Cancelled, FetchCancelled, Fetcher, FetchError, WrongContent
from edged.part import Part
from edged.releases import MANIFEST
from edged.wire.manifest import FileEntry, ReleaseRef

Came = Callable[[int], None]  # is told how many bytes have come, and may wait: that is how bandwidth is limited
Count = Callable[[str, int], None]
T = TypeVar("T")


class Carrier(Protocol):
    """Brings blobs. Everything it brings is checked by what a release or desired state says of it; it is never believed."""

    def unusable(self, entries: Sequence[FileEntry]) -> str:
        """Why it cannot be used now, for these files; empty: it can."""
        ...

    def manifest(self, ref: ReleaseRef, bytes_max: int, cancelled: Cancelled) -> bytes:
        """The bytes of `release.json` that `ref` pins. Raises FetchError (try later) or WrongContent."""
        ...

    def metadata(self, name: str, bytes_max: int, cancelled: Cancelled) -> bytes:
        """A file of signed metadata, not verified. Raises FetchError, with status 404 when there is none of this name."""
        ...

    def bring(self, part: Part, came: Came, cancelled: Cancelled) -> None:
        """Fill `part`. Raises FetchError (what came stays), WrongContent, or OSError when it cannot be written."""
        ...


class Https:
    """Blocks by Range requests from several addresses: what one of them cannot bring, or brings wrong, the next one is
    asked for. A peer that has the files is an address like any other. `urls`: best first."""

    def __init__(self, fetcher: Fetcher, urls: Callable[[], list[str]], count: Count) -> None:
        self._fetcher, self._urls, self._count = fetcher, urls, count

    def unusable(self, entries: Sequence[FileEntry]) -> str:
        """See Carrier."""
        return (
            ""
            if self._urls()
            else "the trainer's address is not known yet: it announces itself on MQTT, or set host.url"
        )

    def manifest(self, ref: ReleaseRef, bytes_max: int, cancelled: Cancelled) -> bytes:
        """See Carrier."""

        def get(url: str) -> bytes:
            data = self._fetcher.get_bytes(f"{url}/releases/{ref.release}/{MANIFEST}", bytes_max)
            found = sha256(data).hexdigest()
            if found != ref.sha256:
                raise WrongContent(
                    f"{url}: {ref.release}: manifest has sha256 {found[:12]}, desired state pins {ref.sha256[:12]}"
                )
            return data

        return self._from_any(get)

    def metadata(self, name: str, bytes_max: int, cancelled: Cancelled) -> bytes:
        """See Carrier."""
        return self._from_any(lambda url: self._fetcher.get_bytes(f"{url}/metadata/{name}", bytes_max))

    def bring(self, part: Part, came: Came, cancelled: Cancelled) -> None:
        """See Carrier."""
        entry = part.entry

        def get(url: str) -> None:
            wrong = self._fetcher.blocks(f"{url}/blobs/{entry.sha256}", part, came, cancelled)
            self._count("blocks_wrong", len(wrong))
            if wrong:
                number = min(wrong)
                raise WrongContent(
                    f"{url}: {entry.path}: block {number}: expected sha256 {entry.blocks[number]}, got other bytes"
                )

        self._from_any(get)

    def _from_any(self, get: Callable[[str], T]) -> T:
        """What `get` returns for the first address that has it. When none has: WrongContent where every one that answered
        had other bytes, else FetchError, for which it may be tried again."""
        failed: list[FetchError] = []
        wrong: list[WrongContent] = []
        for url in self._urls():
            try:
                return get(url.rstrip("/"))
            except FetchCancelled:
                raise
            except FetchError as error:
                failed.append(error)
            except WrongContent as error:
                wrong.append(error)
        said = "; ".join(str(error) for error in (*failed, *wrong)) or "no address of a trainer is known"
        if wrong and not failed:
            raise WrongContent(said)
        # A mirror that cannot be reached does not take back what another address said.
        raise FetchError(said, ABSENT if any(error.status == ABSENT for error in failed) else None)
