"""Blocks of files over HTTP(S), checked as they come. Here and in `engines.endpoint` alone the device imports httpx."""

from __future__ import annotations

import base64
import hashlib
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edged.part import Part
from edged.wire.blocks import runs, span

if TYPE_CHECKING:
    import httpx

CHUNK_BYTES = 64 << 10
ERROR_TEXT_BYTES_MAX = 300
ABSENT = 404  # the status of what is not there
_CONTENT_RANGE = re.compile(r"^bytes (?:(\d+)-\d+|\*)/(\d+|\*)$")

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
    """HTTP client of a device; safe to use from several threads, one at a time for each part."""

    def __init__(self, options: FetchOptions | None = None) -> None:
        self._options = options or FetchOptions()
        self._context = _tls(self._options)
        self._client: httpx.Client | None = None

    def close(self) -> None:
        """Close the connections that are kept open."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def blocks(self, url: str, part: Part, came: Callable[[int], None], cancelled: Cancelled) -> set[int]:
        """Fill what `part` misses from the file at `url`; the blocks that came with other bytes than were promised.

        `came` is told how many bytes have come, and may wait. Raises FetchError (try again), FetchCancelled, WrongContent
        (it is not the file at all) or OSError (it cannot be written).
        """
        wrong: set[int] = set()
        for first, end in runs(part.missing):
            wrong |= self._run(url, part, first, end, came, cancelled)
        return wrong

    def _run(
        self, url: str, part: Part, first: int, end: int, came: Callable[[int], None], cancelled: Cancelled
    ) -> set[int]:
        """The blocks from `first` to before `end`, with one request."""
        size = part.entry.bytes
        begin, stop = span(first, size)[0], span(end - 1, size)[1]
        wrong: set[int] = set()
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={begin}-{stop - 1}"}
        with self._request("GET", url, headers=headers) as response:
            _expect(response, (200, 206))
            start, total = _content_range(response)
            if total is not None and total != size:
                raise WrongContent(f"{url}: expected {size} bytes, the server has {total}")
            if start not in (0, begin):
                raise FetchError(f"{url}: asked for bytes from {begin}, got them from {start}", response.status_code)
            body = _Body(response.iter_raw(), came, cancelled, url)
            for _ in body.take(begin - start):  # of a server that knows no ranges
                pass
            for number in range(first, end):
                low, high = span(number, size)
                if not part.put(number, body.take(high - low)):
                    if body.ended:
                        raise FetchError(f"{url}: the connection ended after {body.taken} of {stop - start} bytes")
                    wrong.add(number)
        return wrong

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

    def upload(
        self, url: str, path: Path, sha256: str, came: Callable[[int], None] = lambda _bytes: None
    ) -> None:  # fmt: skip
        """PUT the file to exactly this address; repeating it is harmless. `came` is told how many bytes go, and may wait.

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
                with self._request("PUT", url, headers=headers, content=_told(file, came)) as response:
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


class _Body:
    """The bytes of a response, so many at a time."""

    def __init__(
        self, chunks: Iterator[bytes], came: Callable[[int], None], cancelled: Cancelled, url: str
    ) -> None:  # fmt: skip
        self._chunks, self._came, self._cancelled, self._url = chunks, came, cancelled, url
        self._left = b""
        self.ended = False  # before what was to be taken
        self.taken = 0

    def take(self, count: int) -> Iterator[bytes]:
        """The next `count` bytes in pieces; fewer when the body ends."""
        while count:
            if self._cancelled():
                raise FetchCancelled(f"{self._url}: cancelled")
            piece = self._left or next(self._chunks, b"")
            if not piece:
                self.ended = True
                return
            piece, self._left = piece[:count], piece[count:]
            count -= len(piece)
            self.taken += len(piece)
            self._came(len(piece))
            yield piece


def _told(file: BinaryIO, came: Callable[[int], None]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        came(len(chunk))
        yield chunk


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
