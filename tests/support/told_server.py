"""A server that is told of releases, as LlamaFarm would be: real sockets, its own idea of what it has been told."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.support.ports import free_port


class Told:
    """Keeps every request; `answers`: the statuses of the next ones, then it does its work: 201, and 409 for a key of
    idempotency that it knows; to a DELETE of `/.../NAME` 200, and 404 for a model that it has not. A status with text is
    `(status, body, headers)`."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.models: dict[str, dict[str, Any]] = {}  # by key of idempotency: what it has registered
        self.answers: deque[int | tuple[int, str, dict[str, str]]] = deque()
        self.hold = threading.Event()  # while it is not set, answers wait after their work is done
        self.hold.set()
        self.port = port or free_port()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/models"

    def start(self) -> None:
        """Listen, again after a `stop` too."""
        routes = [Route("/{path:path}", self._answer, methods=["POST", "PUT", "GET", "DELETE"])]
        config = uvicorn.Config(
            Starlette(routes=routes), host="127.0.0.1", port=self.port, log_level="error", lifespan="off",
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop listening: who connects is refused."""
        if self._server is not None and self._thread is not None:
            self.hold.set()
            self._server.should_exit = True
            self._thread.join(10)
            self._server = None

    def __enter__(self) -> Told:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _answer(self, request: Request) -> Response:
        import asyncio

        body = await request.body()
        said = {
            "method": request.method, "path": request.url.path, "headers": dict(request.headers),
            "body": json.loads(body) if body else None,
        }  # fmt: skip
        self.requests.append(said)
        if self.answers:
            planned = self.answers.popleft()
            status, text, headers = planned if isinstance(planned, tuple) else (planned, "not now", {})
            return Response(text, status, headers)
        if request.method == "DELETE":
            name = request.url.path.rpartition("/")[2]
            known_as = [key for key, model in self.models.items() if model["model"] == name]
            for key in known_as:
                del self.models[key]
            return JSONResponse({}, 200 if known_as else 404)
        key = request.headers.get("idempotency-key", "")
        known = key in self.models
        self.models.setdefault(key, said["body"])
        while not self.hold.is_set():
            await asyncio.sleep(0.02)
        return JSONResponse({"error": "known"} if known else {"ok": True}, 409 if known else 201)
