"""Frames between the daemon and an engine's process: what goes in comes out, and nothing else comes through."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.engines.base import ChatMessage, EngineError, Finished, GenerateRequest, PromptTooLong, Token
from edged.engines.frames import (
    ANSWER_BYTES_MAX,
    ERROR_CHARS_MAX,
    FRAME_BYTES_MAX,
    Accepted,
    BadFrame,
    FrameTooLarge,
    Unpacker,
    answer_frame,
    answer_of,
    error_frame,
    pack,
    request_fields,
    request_of,
)

ANY_TEXT = st.text(st.characters())  # half surrogates too: JSON of a client may hold them
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | ANY_TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner),
    max_leaves=8,
)
REQUESTS = st.builds(
    GenerateRequest,
    prompt=ANY_TEXT,
    messages=st.lists(st.builds(ChatMessage, ANY_TEXT, ANY_TEXT)).map(tuple),
    tokens_max=st.integers(),
    temperature=st.floats(allow_nan=False),
    seed=st.integers(0, 2**63),
    stop=st.lists(ANY_TEXT).map(tuple),
    literal=st.booleans(),
    schema=st.none() | st.dictionaries(ANY_TEXT, JSON),
)


@given(st.lists(st.dictionaries(ANY_TEXT, JSON), max_size=5), st.integers(1, 40))
def test_frames_come_out_as_they_went_in_however_the_bytes_are_cut(frames: list[Any], step: int) -> None:
    data, unpacker = b"".join(pack(frame) for frame in frames), Unpacker()
    assert [f for at in range(0, len(data), step) for f in unpacker.feed(data[at : at + step])] == frames


@given(REQUESTS)
def test_a_request_keeps_all_but_its_halt(request: GenerateRequest) -> None:
    (fields,) = Unpacker().feed(pack(request_fields(request)))
    again = request_of(fields, halt=lambda: "cancelled")
    assert again == request
    assert again.halt() == "cancelled"


@pytest.mark.parametrize("answer", [Token("größer \ud800", -0.1), Finished("length", 3, 4, -0.30000000000000004, 2)])
def test_an_answer_stays_what_it_is(answer: Token | Finished) -> None:
    (frame,) = Unpacker().feed(pack(answer_frame(7, answer)))
    assert answer_of(frame) == (7, answer)


class _Strange(PromptTooLong):
    """Of a module that the daemon does not know."""


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (EngineError("bad"), EngineError, "bad"),
        (PromptTooLong("300 > 256"), PromptTooLong, "300 > 256"),
        (_Strange("301 > 256"), PromptTooLong, "301 > 256"),
        (ZeroDivisionError("by zero"), EngineError, "ZeroDivisionError: by zero"),
        (EngineError("\ud800" * ANSWER_BYTES_MAX), EngineError, "\ud800" * ERROR_CHARS_MAX),
    ],
)
def test_an_error_keeps_its_class(error: Exception, kind: type[EngineError], text: str) -> None:
    (frame,) = Unpacker(ANSWER_BYTES_MAX).feed(pack(error_frame(7, error)))
    number, answer = answer_of(frame)
    assert (number, type(answer), str(answer)) == (7, kind, text)


def test_a_request_is_accepted() -> None:
    assert answer_of({"say": "accepted", "id": 2}) == (2, Accepted())


def framed(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (struct.pack(">I", FRAME_BYTES_MAX + 1), "a frame of 16777217 bytes, the limit is 16777216"),
        (framed(b"\xff"), "no JSON"),
        (framed(b"[" * 100_000), "no JSON"),
        (framed(b"[1]"), "no object"),
    ],
)
def test_what_is_no_frame_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadFrame, match=reason):
        Unpacker().feed(data)


FIELDS = ["text", "logprob", "kind", "reason", "prompt_tokens", "answer_tokens", "mean_logprob", "reused_tokens"]


@given(st.sampled_from(["accepted", "token", "finished", "error", "x"]), st.integers(), st.data())
def test_an_answer_is_understood_or_refused(say: str, number: int, data: st.DataObject) -> None:
    fields = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, JSON)))
    with suppress(BadFrame):
        assert answer_of({"say": say, "id": number, **fields})[0] == number


@given(st.binary(max_size=60))
def test_any_bytes_are_frames_or_refused(data: bytes) -> None:
    with suppress(BadFrame):
        assert all(isinstance(frame, dict) for frame in Unpacker().feed(data))


@pytest.mark.parametrize(
    "frame", [{}, {"say": "sing", "id": 1}, {"say": "token", "id": 1}, {"say": "finished", "id": 1, "reason": "stop"},
              {"say": "token", "id": 1, "text": "a", "logprob": "sure"}, {"say": "token", "id": float("inf")}]
)  # fmt: skip
def test_a_wrong_answer_is_refused(frame: dict[str, Any]) -> None:
    with pytest.raises(BadFrame):
        answer_of(frame)


def test_what_is_too_large_is_not_sent() -> None:
    with pytest.raises(FrameTooLarge, match="more than the 16777216"):
        pack({"prompt": "x" * FRAME_BYTES_MAX})
