"""Files over HTTP(S), resumable and checked: the only file of the device that imports httpx.

Law of this file: `target` appears only whole, with the right hash, and on the disk. What was received before a fault
stays beside it as a `.part`, and is never believed: content that is wrong after a resume is fetched once more from its
first byte before anybody is blamed, because a power cut can leave zeros in a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edged.files import sha256_of, sync

if TYPE_CHECKING:
    import httpx

CHUNK_BYTES = 64 << 10
ERROR_TEXT_BYTES_MAX = 300
_CONTENT_RANGE = re.compile(r"^bytes (?:(\d+)-\d+|\*)/(\d+|\*)$")

Progress = Callable[[int, int], None]  # (bytes there, bytes in total)
Cancelled = Callable[[], bool]


class FetchError(Exception):
    """A transfer failed for now: the message names the address and the reason. Try again later; it resumes.

    `status` is the HTTP status when the server answered, else None.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class FetchCancelled(FetchError):
    """The caller's `cancelled` said so; what was received stays for the next time."""


class WrongContent(Exception):
    """The other side has other bytes than were asked for; the message names what was expected and what came."""


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """How to reach servers. With `ca` only servers that it signed are trusted; `certificate`, `key`: ours (mTLS)."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    connect_s: float = 10.0
    read_s: float = 30.0  # silence, not the whole transfer


class Fetcher:
    """HTTP client of a device; safe to use from several threads, one at a time for each target."""

    def __init__(self, options: FetchOptions | None = None) -> None:
        self._options = options or FetchOptions()
        self._context = _tls(self._options)
        self._client: httpx.Client | None = None

    def close(self) -> None:
        """Close the connections that are kept open."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def fetch(
        self,
        url: str,
        target: Path,
        sha256: str,
        size: int,
        progress: Progress | None = None,
        cancelled: Cancelled | None = None,
    ) -> None:
        """Bring exactly `size` bytes with this SHA-256 to `target`, resuming what an earlier call left.

        Raises FetchError (try again), FetchCancelled, or WrongContent, after which nothing of it is kept.
        """
        if target.exists() and target.stat().st_size == size and sha256_of(target) == sha256:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        # Named by the hash, so that a new version under the same name never continues the old one's bytes.
        part = target.with_name(f"{target.name}.{sha256[:16]}.part")
        for other in target.parent.iterdir():
            if other.name.startswith(f"{target.name}.") and other.suffix == ".part" and other != part:
                other.unlink()
        resumed = part.exists()
        try:
            try:
                self._complete(url, part, sha256, size, progress, cancelled)
            except WrongContent:
                part.unlink(missing_ok=True)
                if not resumed:
                    raise
                self._complete(url, part, sha256, size, progress, cancelled)
        except WrongContent:
            part.unlink(missing_ok=True)
            raise
        except OSError as error:
            raise FetchError(f"{url}: cannot write {part}: {error}") from error
        part.replace(target)
        sync(target.parent)

    def _complete(
        self, url: str, part: Path, sha256: str, size: int, progress: Progress | None, cancelled: Cancelled | None
    ) -> None:
        """Fill `part` to `size` bytes, check and fsync it."""
        have = part.stat().st_size if part.exists() else 0
        if have > size:
            part.unlink()
            have = 0
        free = shutil.disk_usage(part.parent).free
        if free < size - have:
            raise FetchError(f"{url}: needs {size - have} bytes at {part.parent}, {free} are free")
        with part.open("r+b" if have else "w+b") as file:
            digest = hashlib.sha256()
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
            if have < size:
                digest = self._receive(url, file, digest, have, size, progress, cancelled)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != sha256:
            raise WrongContent(f"{url}: expected sha256 {sha256}, got {digest.hexdigest()}")

    def _receive(
        self,
        url: str,
        file: BinaryIO,
        digest: hashlib._Hash,
        have: int,
        size: int,
        progress: Progress | None,
        cancelled: Cancelled | None,
    ) -> hashlib._Hash:
        """Append the bytes from `have` to `size`; the digest of all. `file` stands at `have`."""
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with self._request("GET", url, headers=headers) as response:
            if response.status_code == 416:
                # Our part is longer than the server's file, or the server is confused: from the first byte, next time.
                file.truncate(0)
                raise FetchError(f"{url}: the server cannot continue at byte {have}; starting over", 416)
            _expect(response, (200, 206))
            start, total = _content_range(response)
            if total is not None and total != size:
                raise WrongContent(f"{url}: expected {size} bytes, the server has {total}")
            if start not in (0, have):
                raise FetchError(f"{url}: asked for bytes from {have}, got them from {start}", response.status_code)
            if start == 0:
                file.seek(0)
                file.truncate()
                digest, have = hashlib.sha256(), 0
            for chunk in response.iter_raw():
                if have + len(chunk) > size:
                    raise WrongContent(f"{url}: expected {size} bytes, more are coming")
                file.write(chunk)
                digest.update(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(have, size)
                if cancelled is not None and cancelled():
                    raise FetchCancelled(f"{url}: cancelled after {have} of {size} bytes")
        if have < size:
            raise FetchError(f"{url}: the connection ended after {have} of {size} bytes")
        return digest

    def get_bytes(self, url: str, bytes_max: int) -> bytes:
        """A small document; raises FetchError, or WrongContent when it is longer than `bytes_max`."""
        content = bytearray()
        with self._request("GET", url) as response:
            _expect(response, (200,))
            for chunk in response.iter_bytes(CHUNK_BYTES):
                content += chunk
                if len(content) > bytes_max:
                    raise WrongContent(f"{url}: expected at most {bytes_max} bytes, more are coming")
        return bytes(content)

    def get_json(self, url: str, bytes_max: int) -> Any:
        """A small JSON document; raises as `get_bytes`, and WrongContent when it is no JSON."""
        content = self.get_bytes(url, bytes_max)
        try:
            return json.loads(content)
        except ValueError as error:
            raise WrongContent(f"{url}: expected JSON, got {content[:80]!r} ({error})") from None

    def upload(self, url: str, path: Path, sha256: str) -> None:
        """PUT the file to exactly this address; repeating it is harmless.

        Raises FetchError, or WrongContent when the file itself is missing or not what its hash says.
        """
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != sha256:
                    raise WrongContent(f"{path}: expected sha256 {sha256}, the file has {found}")
                headers = {
                    "Content-Length": str(file.tell()),
                    "Content-Type": "application/octet-stream",
                    "Content-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:",  # RFC 9530
                }
                file.seek(0)
                chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
                with self._request("PUT", url, headers=headers, content=chunks) as response:
                    _expect(response, (200, 201, 204))
        except OSError as error:
            raise WrongContent(f"{path}: expected a file with sha256 {sha256}: {error}") from None

    @contextmanager
    def _request(self, method: str, url: str, **options: Any) -> Iterator[httpx.Response]:
        """A streamed response; every fault of the network becomes a FetchError."""
        import httpx  # late: only an update or a hand-over of samples needs it

        if self._client is None:
            o = self._options
            timeout = httpx.Timeout(o.read_s, connect=o.connect_s)
            # Proxies of the environment are not for a device that talks to its own trainer.
            self._client = httpx.Client(verify=self._context, timeout=timeout, trust_env=False)
        try:
            with self._client.stream(method, url, **options) as response:
                yield response
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise FetchError(f"{url}: {type(error).__name__}: {error}") from error


def _tls(options: FetchOptions) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(options.ca) if options.ca else None)
        if options.certificate is not None:
            context.load_cert_chain(options.certificate, options.key)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(
            f"TLS files ca={options.ca} certificate={options.certificate} key={options.key}: {error}; "
            "all three must exist, be readable PEM and belong together"
        ) from None
    return context


def _expect(response: httpx.Response, allowed: tuple[int, ...]) -> None:
    if response.status_code in allowed:
        return
    text = b""
    for chunk in response.iter_bytes(ERROR_TEXT_BYTES_MAX):
        text += chunk
        if len(text) >= ERROR_TEXT_BYTES_MAX:
            break
    said = text[:ERROR_TEXT_BYTES_MAX].decode("utf-8", "replace").strip()
    raise FetchError(
        f"{response.request.method} {response.url}: the server answered {response.status_code}"
        + (f": {said}" if said else ""),
        response.status_code,
    )


def _content_range(response: httpx.Response) -> tuple[int, int | None]:
    """(first byte of the body, size of the whole file or None when the server does not tell)."""
    if response.status_code == 206:
        found = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
        if found is None or found[1] is None:
            raise FetchError(f"{response.url}: 206 without a Content-Range that can be read", 206)
        return int(found[1]), int(found[2]) if found[2] != "*" else None
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None
