"""What the daemon and an engine in a process of its own say to each other: JSON objects, each behind its length.

    daemon -> engine   load, generate, attach, halt, ping
    engine -> daemon   loaded, accepted, token, finished, error, pong

The length is 4 bytes, big-endian. There is no pickle: a process that a bad model file has taken over can send nothing but
these few shapes, and whatever else it sends is a BadFrame.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from edged.engines import base
from edged.engines.base import ChatMessage, EngineError, Finished, GenerateRequest, Token

FRAME_BYTES_MAX = 16 << 20  # a prompt of any context that there is, and far below what would hurt a small device
ANSWER_BYTES_MAX = 1 << 16  # of what an engine says at once: a token, or an error
ERROR_CHARS_MAX = 4000
START = 0  # the id of what the daemon asks on its own while it starts the engine
_LENGTH = struct.Struct(">I")

Frame = dict[str, Any]

# An error keeps its class on its way: every class of engine error that all engines share, by its name.
_ERRORS: dict[str, type[EngineError]] = {
    name: value for name, value in vars(base).items() if isinstance(value, type) and issubclass(value, EngineError)
}

_FINISHED: dict[str, type] = get_type_hints(Finished)


class BadFrame(Exception):
    """What came is not of this protocol; after it nothing that comes can be understood."""


class FrameTooLarge(Exception):
    """The frame is over FRAME_BYTES_MAX and was not sent; the message names both sizes."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The engine has taken the request, or the adapter."""


Answer = Token | Finished | Accepted | EngineError


def pack(frame: Frame) -> bytes:
    """The bytes of a frame; raises FrameTooLarge."""
    data = json.dumps(frame).encode()
    if len(data) > FRAME_BYTES_MAX:
        raise FrameTooLarge(f"{len(data)} bytes are more than the {FRAME_BYTES_MAX} that go to an engine at once")
    return _LENGTH.pack(len(data)) + data


class Unpacker:
    """Finds the frames, of at most `bytes_max` bytes, in a stream of bytes."""

    def __init__(self, bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._held, self._bytes_max = bytearray(), bytes_max

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes; raises BadFrame."""
        self._held += data
        frames = []
        while len(self._held) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._held)
            if size > self._bytes_max:
                raise BadFrame(f"a frame of {size} bytes, the limit is {self._bytes_max}")
            end = _LENGTH.size + size
            if len(self._held) < end:
                break
            frames.append(_parse(bytes(self._held[_LENGTH.size : end])))
            del self._held[:end]
        return frames


def _parse(data: bytes) -> Frame:
    try:
        frame = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"a frame that is no JSON: {error}") from None
    if not isinstance(frame, dict):
        raise BadFrame(f"a frame that is no object: {data[:80]!r}")
    return frame


def request_fields(request: GenerateRequest) -> Frame:
    """A request without its `halt`, which stays with whoever asks."""
    return {
        "prompt": request.prompt,
        "messages": [[message.role, message.content] for message in request.messages],
        "tokens_max": request.tokens_max,
        "temperature": request.temperature,
        "seed": request.seed,
        "stop": list(request.stop),
        "literal": request.literal,
        "schema": request.schema,
    }


def request_of(fields: Frame, halt: Callable[[], str]) -> GenerateRequest:
    """The request of `request_fields`, with a `halt` of this side."""
    messages = tuple(ChatMessage(role, content) for role, content in fields["messages"])
    changed = {"messages": messages, "stop": tuple(fields["stop"]), "halt": halt}
    return GenerateRequest(**(fields | changed))


def answer_frame(number: int, answer: Token | Finished) -> Frame:
    """A piece of the answer to request `number`."""
    if isinstance(answer, Token):
        return {"say": "token", "id": number, "text": answer.text, "logprob": float(answer.logprob)}
    return {"say": "finished", "id": number, **asdict(answer), "mean_logprob": float(answer.mean_logprob)}


def error_frame(number: int, error: Exception) -> Frame:
    """Why request `number` failed; what is no EngineError becomes one that names its class."""
    known = next((kind.__name__ for kind in type(error).__mro__ if _ERRORS.get(kind.__name__) is kind), "")
    text = str(error) if known else f"{type(error).__name__}: {error}"
    return {"say": "error", "id": number, "kind": known or "EngineError", "text": text[:ERROR_CHARS_MAX]}


def answer_of(frame: Frame) -> tuple[int, Answer]:
    """The number of the request that a frame of the engine's side belongs to, and what it says; raises BadFrame."""
    fields = dict(frame)
    try:
        say, number = fields.pop("say"), int(fields.pop("id"))
        if say == "accepted":
            return number, Accepted()
        if say == "token":
            return number, Token(str(fields["text"]), float(fields["logprob"]))
        if say == "finished":
            return number, Finished(**{name: kind(fields[name]) for name, kind in _FINISHED.items()})
        if say == "error":
            return number, _ERRORS.get(str(fields["kind"]), EngineError)(str(fields["text"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadFrame(f"{type(error).__name__}: {error} in {str(frame)[:200]}") from None
    raise BadFrame(f"an engine does not say {say!r}")
