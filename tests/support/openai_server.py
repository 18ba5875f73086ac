"""A server that speaks OpenAI's protocol around llama.cpp, as a process of its own: a real model on real sockets.

python -m tests.support.openai_server --gguf model.gguf --name large --port-file port [--key KEY]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.support.device import until

ROOT = Path(__file__).parents[2]


class OpenAiServer:
    """`with OpenAiServer(folder, gguf) as server:` the process answers at `server.url`."""

    def __init__(
        self, folder: Path, gguf: Path, name: str = "large", key: str = "", *, ignore_schema: bool = False
    ) -> None:
        """`ignore_schema`: as servers that do not know `response_format` do."""
        self._folder, self._gguf, self.name, self._key = folder, gguf, name, key
        self._more = ["--ignore-schema"] if ignore_schema else []
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self, port: int = 0) -> None:
        """Listen; `port` 0: any that is free."""
        port_file = self._folder / "openai.port"
        port_file.unlink(missing_ok=True)
        command: list[Any] = [
            sys.executable, "-m", "tests.support.openai_server", "--gguf", self._gguf, "--name", self.name,
            "--port-file", port_file, "--port", str(port), "--key", self._key,
            *self._more,
        ]  # fmt: skip
        with (self._folder / "openai.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        found = until("the server listens", lambda: port_file.is_file() and port_file.read_text(), 60)
        self.url = f"http://127.0.0.1:{found}/v1"

    def stop(self) -> None:
        """End it as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def asked(self) -> int:
        """How many questions it has answered."""
        return (self._folder / "openai.log").read_text().count("asked /v1")

    def __enter__(self) -> OpenAiServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()


def _application(gguf: str, name: str, key: str, *, obedient: bool) -> Starlette:
    import llama_cpp

    model = llama_cpp.Llama(gguf, n_ctx=512, logits_all=True, verbose=False, n_threads=2)
    turn = threading.Lock()

    def make(path: str, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        if body.get("model") != name:
            return {"error": {"message": f"model {body.get('model')!r} does not exist", "code": "model_not_found"}}, 404
        common = {key: body[key] for key in ("max_tokens", "temperature", "stop") if key in body}
        asked = body.get("response_format", {}).get("json_schema")
        if asked is not None and obedient:
            common["grammar"] = llama_cpp.LlamaGrammar.from_json_schema(json.dumps(asked["schema"]), verbose=False)
        try:
            with turn:
                if path.endswith("/chat/completions"):
                    more = {"logprobs": body.get("logprobs", False), "top_logprobs": 1}
                    found = model.create_chat_completion(body["messages"], **common, **more)
                else:
                    found = model.create_completion(body["prompt"], **common, logprobs=body.get("logprobs"))
        except ValueError as error:  # the context is too short
            return {"error": {"message": str(error), "code": "context_length_exceeded"}}, 400
        # llama.cpp's log-probabilities are numpy's numbers, which JSON does not know.
        return json.loads(json.dumps({**found, "model": name}, default=float)), 200

    async def answer(request: Request) -> JSONResponse:
        if key and request.headers.get("authorization") != f"Bearer {key}":
            given = request.headers.get("authorization")
            return JSONResponse({"error": {"message": f"Incorrect API key: {given}"}}, 401)
        if request.method == "GET":
            return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"}]})
        body = await request.json()
        found, status = await run_in_threadpool(make, request.url.path, body)
        print(f"asked {request.url.path} -> {status}", flush=True)
        return JSONResponse(found, status)

    return Starlette(routes=[Route("/v1/{path:path}", answer, methods=["GET", "POST"])])


def main() -> None:
    parser = argparse.ArgumentParser()
    for option in ("--gguf", "--name", "--port-file", "--key"):
        parser.add_argument(option, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ignore-schema", action="store_true")
    wanted = parser.parse_args()
    application = _application(wanted.gguf, wanted.name, wanted.key, obedient=not wanted.ignore_schema)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", wanted.port))
        listening.listen()
        port_file = Path(wanted.port_file)
        beside = port_file.with_suffix(".new")
        beside.write_text(str(listening.getsockname()[1]))
        os.replace(beside, port_file)
        config = uvicorn.Config(application, log_level="error", lifespan="off")
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
