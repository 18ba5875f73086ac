"""Agents of the running daemon for people on this machine: a Unix socket in the state folder, its line of JSON and its
answer, one connection a request. Whoever closes the connection of a run cancels it.

`{"op": "list"}`, `{"op": "run", "agent", "request", "max_steps"?}`, `{"op": "feedback", "run", "feedback": {...}}`,
`{"op": "adapt", "agent"}`; the answer is `{"ok": true, ...}` or `{"ok": false, "error", "kind"}`, in one line.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edged.agent_client import SOCKET
from edged.agents.feedback import BadFeedback, Feedback, Preference, UnknownExecution
from edged.agents.hosted import Busy, Hosted, NoAgent
from edged.agents.messages import Message
from edged.store import StoreError

log = logging.getLogger(__name__)

LINE_BYTES_MAX = 1 << 20
ASK_S_MAX = 10.0  # for the line of a client, and for one to take its answer
CONNECTIONS_MAX = 64

Json = dict[str, Any]


class AgentSocket:
    """Serves the socket on the agents' loop."""

    def __init__(self, state: Path, hosted: Hosted) -> None:
        self._state, self._hosted = state, hosted
        self._server: asyncio.Server | None = None
        self._open = 0

    def start(self) -> None:
        """Listen. Raises OSError."""
        self._hosted.spawn(self._listen()).result(ASK_S_MAX)

    async def _listen(self) -> None:
        (self._state / SOCKET).unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        folder = os.open(self._state, os.O_RDONLY | os.O_DIRECTORY)
        try:
            listening.bind(f"/proc/self/fd/{folder}/{SOCKET}")  # fits a socket's 107 bytes however deep the folder lies
        finally:
            os.close(folder)
        os.chmod(self._state / SOCKET, 0o660)
        self._server = await asyncio.start_unix_server(self._serve, sock=listening, limit=LINE_BYTES_MAX)

    def stop(self) -> None:
        """Take it away; open connections end with the agents' loop."""
        (self._state / SOCKET).unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            answer = await self._answer(reader)
            if answer is not None:
                writer.write(json.dumps(answer).encode() + b"\n")
                await asyncio.wait_for(writer.drain(), ASK_S_MAX)
        except (OSError, TimeoutError) as error:
            log.debug("agents' socket: %s", error)
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> Json | None:
        """The answer to the line that comes; None when nobody waits for it any more."""
        if self._open > CONNECTIONS_MAX:
            return _no("busy", f"{CONNECTIONS_MAX} clients are connected already; try again later")
        try:
            line = await asyncio.wait_for(reader.readline(), ASK_S_MAX)
            asked = json.loads(line)
            operation = asked["op"]
        except (ValueError, KeyError, TypeError, TimeoutError, RecursionError):
            return _no("usage", f"send one line of JSON of at most {LINE_BYTES_MAX} bytes with an `op`")
        try:
            if operation == "list":
                return {"ok": True, "agents": self._hosted.status()}
            if operation == "run":
                return await self._run(asked, reader)
            if operation == "feedback":
                said = feedback_of(asked["feedback"])
                await asyncio.to_thread(self._hosted.feedback, str(asked["run"]), said)
                return {"ok": True}
            if operation == "adapt":
                return {"ok": True, "text": await asyncio.to_thread(self._hosted.adapt, str(asked["agent"]))}
        except (NoAgent, UnknownExecution) as error:
            return _no("unknown", str(error))
        except Busy as error:
            return _no("busy", str(error))
        except StoreError as error:
            return _no("store", str(error))
        except (BadFeedback, KeyError, TypeError, ValueError) as error:
            return _no("usage", str(error))
        except Exception as error:  # whoever asks gets an answer, whatever it is that nobody has thought of
            log.exception("agents' socket: %s", operation)
            return _no("agent", f"{type(error).__name__}: {error}")
        return _no("usage", f"op {operation!r}: use list, run, feedback or adapt")

    async def _run(self, asked: Json, reader: asyncio.StreamReader) -> Json | None:
        running = self._hosted.submit(str(asked["agent"]), asked["request"], max_steps=asked.get("max_steps"))
        answer = asyncio.wrap_future(running.future)
        left = asyncio.create_task(_left(reader))
        either: list[asyncio.Future[Any]] = [answer, left]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
        if not answer.done():
            running.cancel()
            return None
        if answer.cancelled():
            return _no("cancelled", "the run was cancelled: the daemon is ending")
        message, run = answer.result()
        return {"ok": message.role != "error", "run": run, **_told(message)}


async def _left(reader: asyncio.StreamReader) -> None:
    """Ends when the client has closed its end; what it still says is nothing."""
    while await reader.read(4096):
        pass


def _told(message: Message) -> Json:
    if message.role == "error":
        return {"error": message.text, "kind": "agent"}
    return {"response": message.content}


def _no(kind: str, why: str) -> Json:
    return {"ok": False, "kind": kind, "error": why}


def feedback_of(said: Mapping[str, Any]) -> Feedback:
    """Feedback as it comes over the socket. Raises BadFeedback, KeyError, TypeError."""
    fields = dict(said)
    preference = fields.pop("preference", None)
    made = None if preference is None else Preference(preference["chosen"], preference["rejected"])
    return Feedback(preference=made, **fields)


def feedback_json(feedback: Feedback) -> Json:
    """The other way round."""
    return {name: value for name, value in asdict(feedback).items() if value is not None}
