"""One request to an HTTP server that nobody here runs: every wait ends, every body has a limit, no secret is shown.

What holds for a server that answers questions (`engines.openai`) holds for one that is told of releases (the trainer's
`registration`): it may be away, slow, wrong or hostile. Proxies of the environment are not used, redirects are not
followed: the key is for this address alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import stat
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edged.core.address import BadEndpoint

if TYPE_CHECKING:
    import httpx

POLL_S = 0.05  # how soon `halt` is noticed
SECRET_BYTES_MAX = 8192
SAID_CHARS_MAX = 300  # of what a server says, in an error
HIDDEN = "***"
T = TypeVar("T")


class EndpointError(Exception):
    """The server gave no answer; the message names the address and why."""


class Halted(EndpointError):
    """Whoever asked does not want the answer any more; the message is the reason that `halt` gave."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered; the names of `headers` in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def said(self, secret: str = "") -> str:
        """The beginning of the body for an error message, on one line and without the key."""
        text = " ".join(self.body[: 4 * SAID_CHARS_MAX].decode("utf-8", "replace").split())
        text = text.replace(secret, HIDDEN) if secret else text
        return "".join(letter if letter.isprintable() else "?" for letter in text)[:SAID_CHARS_MAX]


@dataclass(frozen=True, slots=True)
class Limits:
    """`within_s`: from the request to the last byte of the answer, whatever the server does; `bytes_max`: of its body."""

    within_s: float
    bytes_max: int
    halt: Callable[[], str] = field(default=lambda: "", compare=False, repr=False)


def read_secret(path: Path) -> str:
    """The key in a file that only its owner may read; raises BadEndpoint, whose message does not hold the key."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(SECRET_BYTES_MAX + 1)
    except OSError as error:
        raise BadEndpoint(
            f"{path}: {error.strerror}; the file must hold the key and be readable by this user"
        ) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise BadEndpoint(f"{path}: others may read it (mode {stat.S_IMODE(mode):o}); chmod 600 {path}")
    try:
        text = data.decode("ascii").strip()
    except UnicodeDecodeError:
        text = ""
    if not text or len(data) > SECRET_BYTES_MAX or not text.isprintable():
        raise BadEndpoint(f"{path}: expected one line of printable ASCII, at most {SECRET_BYTES_MAX} bytes")
    return text


def tls(ca: Path | None = None, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """How to trust servers: those that `ca` signed, without it those that this machine trusts; ours with a certificate.
    Raises BadEndpoint."""
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise BadEndpoint(
            f"TLS files ca={ca} certificate={certificate} key={key}: {error}; they must be readable PEM and belong together"
        ) from None
    return context


def send(
    method: str, url: str, headers: Mapping[str, str], body: bytes, context: ssl.SSLContext, limits: Limits
) -> Reply:
    """The server's answer, whatever its status. Blocks the calling thread; raises EndpointError, Halted."""
    return _run(_watched(_exchange(method, url, headers, body, context, limits), url, limits))


def _run(work: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, but a name that is being looked up is not waited for: that has no limit of ours."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _watched(exchange: Coroutine[Any, Any, Reply], url: str, limits: Limits) -> Reply:
    """Let it happen until it is late or unwanted. Limits of single reads would not do: a server can send a byte now and
    then for ever."""
    loop = asyncio.get_running_loop()
    late_at = loop.time() + limits.within_s
    task = loop.create_task(exchange)
    try:
        while True:
            reason = limits.halt()
            left = late_at - loop.time()
            if reason:
                raise Halted(reason)
            if left <= 0:
                raise EndpointError(f"{url}: no whole answer within {limits.within_s:g} s")
            done, _ = await asyncio.wait({task}, timeout=min(POLL_S, left))
            if done:
                return task.result()
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _exchange(
    method: str, url: str, headers: Mapping[str, str], body: bytes, context: ssl.SSLContext, limits: Limits
) -> Reply:
    import httpx  # late: only who has such a server needs it

    # What is unpacked here could be a thousand times of what came.
    sent = {**headers, "Accept-Encoding": "identity"}
    try:
        client = httpx.AsyncClient(verify=context, timeout=None, trust_env=False)
        async with client, client.stream(method, url, headers=sent, content=body) as response:
            return Reply(response.status_code, dict(response.headers), await _body(response, url, limits.bytes_max))
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError) as error:
        raise EndpointError(f"{url}: {_cause(error)}") from None


async def _body(response: httpx.Response, url: str, bytes_max: int) -> bytes:
    if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise EndpointError(f"{url}: it answers compressed, which was not asked for")
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > bytes_max:
            raise EndpointError(f"{url}: its answer is longer than {bytes_max} bytes")
    return bytes(content)


def _cause(error: BaseException) -> str:
    """What went wrong at the bottom: httpx calls a certificate that is not trusted a failure to connect."""
    seen = error
    while (inner := seen.__cause__ or seen.__context__) is not None and len(str(inner)) > 0:
        seen = inner
    text = str(seen) or str(error)
    return f"{type(error).__name__}: {text}"[:SAID_CHARS_MAX]
