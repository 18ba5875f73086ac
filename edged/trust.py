"""What this device may install: releases that its owner signed, by TUF metadata that is verified and kept here.

Whoever delivers metadata and bytes is trusted with nothing. Expired metadata, or a clock that is wrong, refuses installs
and nothing else. The library is imported when an update needs it. Ed25519 is verified in pure Python, 5 to 7 ms a
signature on an x86-64 core, half a second an install: not worth a cryptography package on a device.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edged.clock import Clock
from edged.config import Trust as TrustConfig
from edged.fetch import FetchCancelled, FetchError, WrongContent
from edged.files import sync
from edged.releases import MANIFEST_BYTES_MAX
from edged.wire.manifest import ReleaseRef
from edged.wire.trust import METADATA_BYTES_MAX, MODELS, ROOT_ROTATIONS_MAX, SIGNED_AT, role_of, target_path

if TYPE_CHECKING:
    from tuf.ngclient import Updater

log = logging.getLogger(__name__)

# A clock may be set back by so much without being called wrong: time servers correct by seconds.
CLOCK_SLACK_S = 300.0
REFRESHED = "refreshed.json"  # of the last refresh: when, and what it found
_BASE = "metadata:/"  # the library puts file names behind an address; here they are names alone

Metadata = Callable[[str, int], bytes]
Cancelled = Callable[[], bool]


class Untrusted(Exception):
    """This release must not be installed now; the message says why and what to do. It may be tried again later."""


class Trust:
    """Admits releases. For one thread at a time.

    `metadata(name, bytes_max)`: the bytes of a metadata file, from anywhere; raises FetchError, with status 404 where
    there is no such file, or WrongContent when it is longer. `folder`: where verified metadata is kept.
    """

    def __init__(self, config: TrustConfig, folder: Path, metadata: Metadata, clock: Clock) -> None:
        self._config, self._folder, self._metadata, self._clock = config, folder, metadata, clock
        self._refused = ""

    def admit(self, ref: ReleaseRef, cancelled: Cancelled) -> int:
        """The signed length in bytes of this release's `release.json` (its limit, where releases need no signature).

        Fetches what is new of the metadata. Raises Untrusted, or FetchError when the metadata cannot be had.
        """
        if self._config.unsigned:
            return MANIFEST_BYTES_MAX
        try:
            size = self._signed(ref, cancelled)
        except Untrusted as error:
            self._refused = str(error)
            raise
        self._refused = ""
        return size

    def status(self) -> dict[str, Any]:
        """What `edged status` shows."""
        return {**describe(self._config, self._folder), "refused": self._refused or None}

    def _signed(self, ref: ReleaseRef, cancelled: Cancelled) -> int:
        from tuf.api import exceptions

        bootstrap = self._bootstrap()
        floor = read_refreshed(self._folder).get("at", 0.0)
        if self._clock.now() < floor - CLOCK_SLACK_S:
            raise Untrusted(
                f"the clock says {_date(self._clock.now())}, but signatures were checked at {_date(floor)} already: with a "
                "clock that goes back, expired metadata would pass; set the clock"
            )
        fetcher = _Names(self._metadata, cancelled)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            updater = _library()(self._folder, fetcher, bootstrap)
            # The library reads the machine's clock, and ours is an argument.
            updater._trusted_set.reference_time = datetime.fromtimestamp(self._clock.now(), UTC)
            found = updater.get_targetinfo(target_path(ref.release))
        except exceptions.ExpiredMetadataError as error:
            raise Untrusted(f"{error}: nothing is installed until the trainer renews it; is the clock right?") from None
        except (exceptions.RepositoryError, exceptions.DownloadLengthMismatchError) as error:
            raise Untrusted(f"the metadata of releases is not what the owner signed: {error}") from None
        except exceptions.DownloadError as error:
            raise fetcher.failure or FetchError(str(error)) from None
        except OSError as error:
            raise FetchError(f"metadata of releases: {error}") from error
        self._remember(updater)
        if found is None:
            raise Untrusted(f"{ref.release} is not signed: nobody released it, or it was revoked")
        if found.hashes.get("sha256") != ref.sha256:
            raise Untrusted(
                f"{ref.release}: desired state pins {ref.sha256[:12]}, signed is {found.hashes.get('sha256', '')[:12]}"
            )
        return int(found.length)

    def _bootstrap(self) -> bytes:
        root = self._config.root
        if root is None:
            raise Untrusted(
                "this device knows no root and accepts no release: enrol it, so that [trust] root names the file that "
                "its owner's keys are in; unsigned = true accepts anybody's"
            )
        try:
            return root.read_bytes()
        except OSError as error:
            raise Untrusted(f"[trust] root {root}: {error.strerror}; enrol this device again") from None

    def _remember(self, updater: Updater) -> None:
        """The refresh was good, so the clock is believed from here on. It cannot run away: a time at which anything was
        expired was no good refresh."""
        trusted = updater._trusted_set
        now, signed_at = self._clock.now(), trusted.root.unrecognized_fields.get(SIGNED_AT, 0)
        if now < signed_at - CLOCK_SLACK_S:  # a device without a battery for its clock, before it ever saw the time
            raise Untrusted(
                f"the clock says {_date(now)}, but root {trusted.root.version} was signed at {_date(signed_at)}: set it"
            )
        roles = [role for role in METADATA_BYTES_MAX if role in trusted]
        state = {
            "at": max(now, read_refreshed(self._folder).get("at", 0.0)),
            "root_version": trusted.root.version,
            "expires": {role: trusted[role].expires.timestamp() for role in roles},
        }
        write_durably(self._folder / REFRESHED, json.dumps(state).encode())


def describe(config: TrustConfig, folder: Path) -> dict[str, Any]:
    """Whom this device trusts and what its last refresh found: `mode` (signed, unsigned, closed), `root_version`,
    `expires` by role and `at` in seconds since the epoch; `floor`: a clock before it refuses installs."""
    mode = "unsigned" if config.unsigned else "signed" if config.root is not None else "closed"
    refreshed = read_refreshed(folder) if mode == "signed" else {}
    floor = refreshed["at"] - CLOCK_SLACK_S if "at" in refreshed else None
    return {"mode": mode, "root": str(config.root) if config.root else None, "floor": floor, **refreshed}


def read_root(path: Path) -> tuple[int, float]:
    """The version of the root in this file, and when it expires (seconds since the epoch). Raises Untrusted."""
    from tuf.api import exceptions
    from tuf.api.metadata import Metadata as Signed
    from tuf.api.metadata import Root

    try:
        root: Signed[Root] = Signed.from_bytes(path.read_bytes())
        root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
    except OSError as error:
        raise Untrusted(f"{path}: {error.strerror}") from None
    except (exceptions.RepositoryError, AttributeError) as error:
        raise Untrusted(f"{path} is no root: {error}") from None
    return root.signed.version, root.signed.expires.timestamp()


def read_refreshed(folder: Path) -> dict[str, Any]:
    """What the last refresh left; empty before the first. Damaged counts as none, and is said."""
    path = folder / REFRESHED
    try:
        state = json.loads(path.read_bytes())
        return {"at": float(state["at"]), "root_version": int(state["root_version"]), "expires": dict(state["expires"])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.error("%s: %s: the clock is believed as at the first refresh", path, error)
        return {}


def write_durably(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename, fsync: after a power cut the old bytes are there or the new ones."""
    beside = path.with_name(f".{path.name}.new")  # one name: what a power cut leaves is overwritten
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


class _Names:
    """Fetches for the library: metadata files by name, none longer than its role may be."""

    def __init__(self, metadata: Metadata, cancelled: Cancelled) -> None:
        self._metadata, self._cancelled = metadata, cancelled
        self.failure: FetchError | None = None  # what a DownloadError of the library was

    def bytes_of(self, url: str, bytes_max: int) -> bytes:
        """The file behind an address of the library; raises the library's errors."""
        from tuf.api import exceptions

        name = url.removeprefix(_BASE)
        # What the metadata says of its own length was signed too, but perhaps with a stolen key.
        bytes_max = min(bytes_max, METADATA_BYTES_MAX[role_of(name) or MODELS])
        try:
            if self._cancelled():
                raise FetchCancelled(f"{name}: cancelled")
            data = self._metadata(name, bytes_max)
        except FetchError as error:
            self.failure = error
            if error.status is not None:
                raise exceptions.DownloadHTTPError(str(error), error.status) from None
            raise exceptions.DownloadError(str(error)) from None
        except WrongContent as error:
            raise exceptions.DownloadLengthMismatchError(str(error)) from None
        if len(data) > bytes_max:
            raise exceptions.DownloadLengthMismatchError(f"{name}: {len(data)} bytes, at most {bytes_max} are taken")
        return data


@cache
def _library() -> Callable[[Path, _Names, bytes], Updater]:
    """The library's client as this device uses it: made from a folder, a source of files and a root."""
    from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

    class Fetcher(FetcherInterface):
        def __init__(self, names: _Names) -> None:
            self._names = names

        def _fetch(self, url: str) -> Any:
            raise NotImplementedError(f"{url}: only whole files are asked for")

        def download_bytes(self, url: str, max_length: int) -> bytes:
            return self._names.bytes_of(url, max_length)

    class Durable(Updater):
        """Its own way of writing leaves an empty file after a power cut on some file systems, and with it no memory of
        which versions were seen."""

        def _persist_file(self, filename: str, data: bytes) -> None:
            write_durably(Path(filename), data)

    config = UpdaterConfig(max_root_rotations=ROOT_ROTATIONS_MAX)  # lengths are limited by _Names
    return lambda folder, names, root: Durable(
        str(folder), _BASE, fetcher=Fetcher(names), config=config, bootstrap=root
    )
