"""What devices reach over HTTP: releases by name, files by hash with Range, signed metadata, the way up for samples.

With certificates only clients that the authority knows get in. Bytes are checked as they arrive: what a device uploads
must be a sample that an open job claims, of the length allowed, with the hash that names it.
"""

from __future__ import annotations

import json
import logging
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from trainer.files import Incoming
from trainer.releases import MANIFEST, Registry, ReleaseError
from trainer.revoked import Revoked, list_of

log = logging.getLogger(__name__)

_SHA256 = re.compile(r"^[0-9a-f]{64}$")
START_S_MAX = 15.0
UPLOAD = ".upload-"  # how a file is called while it comes


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where to listen and with which files; `sample_bytes_max` bounds one upload."""

    host: str
    port: int  # 0: any free port
    sample_bytes_max: int
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    crl: Path | None = None  # revoked certificates; by default crl.pem beside `ca`, where there is one


class TooLarge(ValueError):
    """An upload is longer than allowed."""


class Server:
    """The HTTP server in a thread of its own. `claimed` says whether an open job waits for a sample's hash; `status`
    returns what /status shows; `arrived` is told of each sample whose pixels are safe here."""

    def __init__(
        self,
        options: ServerOptions,
        registry: Registry,
        samples: Path,
        *,
        claimed: Callable[[str], bool],
        status: Callable[[], dict[str, Any]],
        arrived: Callable[[str], None],
        metadata: Callable[[str], bytes | None] = lambda _name: None,
    ) -> None:
        """`metadata`: the bytes of a file of the releases' signed metadata; None when there is none of this name."""
        self.port = options.port
        self._options, self._registry, self._samples = options, registry, samples
        self._claimed, self._status, self._arrived, self._metadata = claimed, status, arrived, metadata
        samples.mkdir(parents=True, exist_ok=True)
        for left in samples.glob(f"{UPLOAD}*"):  # of an earlier process
            left.unlink()
        listed = list_of(options.ca, options.crl)
        self._revoked = None if listed is None or options.ca is None else Revoked(listed)
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._application(),
                host=options.host,
                port=options.port,
                log_config=None,
                access_log=False,
                lifespan="off",
                ssl_certfile=options.certificate,
                ssl_keyfile=options.key,
                ssl_ca_certs=str(options.ca) if options.ca else None,
                ssl_cert_reqs=ssl.CERT_REQUIRED if options.ca else ssl.CERT_NONE,
                http=self._revoked.protocol() if self._revoked else "auto",
                timeout_graceful_shutdown=3,
            )
        )
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._failure = ""

    def start(self) -> None:
        """Listen; raises OSError when the address cannot be bound, or a certificate not be read."""
        self._thread.start()
        deadline = time.monotonic() + START_S_MAX
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                what = self._failure or "see the log"
                raise OSError(f"http {self._options.host}:{self._options.port}: cannot listen: {what}")
            time.sleep(0.01)
        self.port = int(self._server.servers[0].sockets[0].getsockname()[1])

    def stop(self) -> None:
        """Stop listening; transfers in progress get a moment, devices resume what was cut off."""
        self._server.should_exit = True
        self._thread.join(timeout=10)

    @property
    def url(self) -> str:
        """The address on this machine."""
        return f"{'https' if self._options.ca else 'http'}://{self._options.host}:{self.port}"

    def _run(self) -> None:
        try:
            config = self._server.config
            config.load()
            if self._revoked is not None and config.ssl is not None:
                self._revoked.guard(config.ssl)
            self._server.run()
        except (SystemExit, OSError) as error:  # uvicorn exits when it cannot bind
            self._failure = str(error)

    def _application(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/healthz", self._healthz),
                Route("/status", self._get_status),
                Route("/releases/{release}/release.json", self._get_release),
                Route("/blobs/{sha256}", self._get_blob),
                Route("/metadata/{name}", self._get_metadata),
                Route("/samples/{sha256}", self._put_sample, methods=["PUT"]),
            ]
        )

    async def _healthz(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _get_status(self, _request: Request) -> Response:
        value = await run_in_threadpool(self._status)
        return Response(json.dumps(value, default=str), media_type="application/json")

    async def _get_release(self, request: Request) -> Response:
        try:
            stored = await run_in_threadpool(self._registry.get, request.path_params["release"])
        except ReleaseError as error:
            return _problem(404, str(error))
        etag = {"etag": f'"{stored.ref.sha256}"'}
        return FileResponse(stored.folder / MANIFEST, media_type="application/json", headers=etag)

    async def _get_blob(self, request: Request) -> Response:
        digest = request.path_params["sha256"]
        path = await run_in_threadpool(self._registry.blob, digest) if _SHA256.match(digest) else None
        if path is None:
            return _problem(404, f"no release holds a file with SHA-256 {digest!r}")
        return FileResponse(path, media_type="application/octet-stream", headers={"etag": f'"{digest}"'})

    async def _get_metadata(self, request: Request) -> Response:
        name = request.path_params["name"]
        data = await run_in_threadpool(self._metadata, name)
        if data is None:
            return _problem(404, f"no metadata {name!r}; where `trainer keys init` was not run there is none at all")
        return Response(data, media_type="application/json", headers={"cache-control": "no-store"})

    async def _put_sample(self, request: Request) -> Response:
        digest = request.path_params["sha256"]
        if not _SHA256.match(digest):
            return _problem(404, f"{digest!r} is no SHA-256; PUT /samples/<64 hexadecimal digits>")
        limit = self._options.sample_bytes_max
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            return _problem(413, f"sample {digest}: {announced} bytes, at most {limit} are taken")
        target = self._samples / digest
        try:
            if await run_in_threadpool(target.is_file):
                await _discard(request, limit)
                return JSONResponse({"sha256": digest, "stored": "before"})
            if not await run_in_threadpool(self._claimed, digest):
                await _discard(request, limit)
                return _problem(403, f"sample {digest}: no open job claims it; upload only what a claim names")
            found = await self._receive(request, target, limit)
        except TooLarge as error:
            return _problem(413, f"sample {digest}: {error}")
        except ClientDisconnect:
            return _problem(400, f"sample {digest}: the connection ended before the body")
        if found != digest:
            log.warning("upload of sample %s refused: its bytes have SHA-256 %s", digest, found)
            return _problem(
                422, f"expected SHA-256 {digest}, got {found}: the bytes are not that sample's; send them again"
            )
        self._arrived(digest)
        return JSONResponse({"sha256": digest, "stored": "now"}, status_code=201)

    async def _receive(self, request: Request, target: Path, limit: int) -> str:
        """The SHA-256 of the body; it lies at `target` when that is the target's name, and nowhere else."""
        size, incoming = 0, await run_in_threadpool(Incoming, self._samples, UPLOAD)
        try:
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise TooLarge(f"more than {limit} bytes")
                await run_in_threadpool(incoming.write, chunk)
            found = incoming.digest.hexdigest()
            if found == target.name:
                await run_in_threadpool(incoming.keep, target)
        finally:
            incoming.close()
        return found


async def _discard(request: Request, limit: int) -> None:
    """Read what nobody needs: an answer in the middle of a body looks like a broken connection to many clients."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise TooLarge(f"more than {limit} bytes")


def _problem(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status_code=status)
