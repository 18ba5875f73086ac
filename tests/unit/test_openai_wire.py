"""What a server that speaks OpenAI's protocol is asked, and what its answers mean, row by row."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edged.engines.base import ChatMessage, GenerateRequest
from edged.engines.openai_wire import (
    TEXT_BYTES_MAX,
    BadAnswer,
    Declined,
    answer,
    meaning,
    mended,
    models,
    question,
    too_long,
)
from tests.support.bad_server import chat

COMMON: dict[str, Any] = {
    "chat": True, "instructions": "", "tokens_max": 9, "tokens_field": "max_tokens", "logprobs": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "options", "wanted"),
    [
        (
            GenerateRequest("hi"),
            {},
            {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "logprobs": True},
        ),
        (
            GenerateRequest("hi", tokens_max=3, stop=("x",)),
            {"instructions": "short", "logprobs": False, "tokens_field": "max_completion_tokens"},
            {
                "max_completion_tokens": 3,
                "stop": ["x"],
                "messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}],
            },
        ),
        (
            GenerateRequest(messages=(ChatMessage("system", "s"), ChatMessage("user", "u")), temperature=0.5, seed=4),
            {},
            {
                "max_tokens": 9, "temperature": 0.5, "seed": 4, "logprobs": True,
                "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            },
        ),
        (
            GenerateRequest("hi", schema={"type": "null"}),
            {"logprobs": False},
            {
                "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}],
                "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "null"}}},
            },
        ),
        (
            GenerateRequest("hi", schema={"type": "null"}),
            {"logprobs": False, "schema_form": "json_object"},
            {
                "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}],
                "response_format": {"type": "json_object", "schema": {"type": "null"}},
            },
        ),
        (GenerateRequest("go on"), {"chat": False}, {"max_tokens": 9, "prompt": "go on", "logprobs": 0}),
    ],
)  # fmt: skip
def test_a_question(request_: GenerateRequest, options: dict[str, Any], wanted: dict[str, Any]) -> None:
    body = question(request_, "large", **(COMMON | options))
    assert body == {"model": "large", "temperature": 0.0, "stream": False} | wanted


def choice(**fields: Any) -> dict[str, Any]:
    return chat(choices=[{**chat()["choices"][0], **fields}])


def logprobs(*values: Any) -> dict[str, Any]:
    return choice(logprobs={"content": [{"token": "x", "logprob": value} for value in values]})


@pytest.mark.parametrize(
    ("body", "mean"),
    [
        (chat(), None),
        (logprobs(-1.0, -3.0), -2.0),
        (logprobs(-1.0, 0.0001), -0.5),
        (logprobs(-1.0, 0.7), None),
        (logprobs(-1.0, None), None),
        (logprobs(-1.0, "0"), None),
        (logprobs(-1.0, True), None),
        (logprobs(), None),
        (choice(logprobs=None), None),
        (choice(logprobs=[1]), None),
        (choice(logprobs={"content": 7}), None),
    ],
)
def test_how_sure_it_is_comes_from_its_tokens_or_is_not_known(body: dict[str, Any], mean: float | None) -> None:
    found = answer(json.dumps(body).encode(), "large", chat=True)
    assert (found.text, found.reason, found.prompt_tokens, found.answer_tokens) == ("yes", "stop", 3, 1)
    assert found.mean_logprob == (None if mean is None else pytest.approx(mean))


def test_a_completion_has_its_text_and_numbers_elsewhere() -> None:
    row = {"text": " yes", "finish_reason": "length", "logprobs": {"token_logprobs": [-0.5, -1.5]}}
    found = answer(json.dumps({"choices": [row]}).encode(), "large", chat=False)
    assert (found.text, found.reason, found.model, found.mean_logprob) == (" yes", "length", "large", -1.0)
    assert (found.prompt_tokens, found.answer_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("said", "same"),
    [
        ("large", True), ("large-2026-11-21", True), ("large:latest", True), ("large@sha", True),
        ("larger", False), ("small", False), ("", False), ("large-" + "x" * 300, False), ("large-\n", False), (7, False),
    ],
)  # fmt: skip
def test_the_model_that_answers_is_the_one_that_was_asked(said: Any, same: bool) -> None:
    body = json.dumps(chat(model=said)).encode()
    if same:
        assert answer(body, "large", chat=True).model == said
    else:
        with pytest.raises(BadAnswer, match="asked was 'large'"):
            answer(body, "large", chat=True)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "no JSON"),
        (b"<html>502</html>", "no JSON.*<html>"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "it is a list"),
        (b'{"choices": [{"finish_reason": NaN}]}', "NaN is no number"),
        (b"{}", "no list `choices`"),
        (b'{"choices": []}', "no list `choices`"),
        (b'{"choices": ["yes"]}', "no list `choices`"),
        (b'{"choices": [{"finish_reason": "stop"}]}', "no object `message`"),
        (json.dumps(choice(message={"content": None})).encode(), "its text is NoneType"),
        (json.dumps(choice(message={"content": ["yes"]})).encode(), "its text is list"),
        (json.dumps(choice(finish_reason="tool_calls")).encode(), "ended as 'tool_calls'"),
        (json.dumps(choice(finish_reason=None)).encode(), "ended as 'None'"),
    ],
)
def test_what_is_no_answer(body: bytes, reason: str) -> None:
    with pytest.raises(BadAnswer, match=reason):
        answer(body, "large", chat=True)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (choice(finish_reason="content_filter", message={"content": None}), "filter"),
        (choice(message={"content": None, "refusal": "I will not"}), "refuses: 'I will not'"),
        (choice(message={"content": "x" * (TEXT_BYTES_MAX + 1)}), "no label may have"),
    ],
)
def test_what_is_declined(body: dict[str, Any], reason: str) -> None:
    with pytest.raises(Declined, match=reason):
        answer(json.dumps(body).encode(), "large", chat=True)


def test_half_a_character_is_no_text() -> None:
    found = answer(json.dumps(choice(message={"content": "a\ud800b"})).encode(), "large", chat=True)
    assert found.text == "a\ufffdb"


def test_numbers_that_are_none_are_not_counted() -> None:
    found = answer(
        json.dumps(chat(usage={"prompt_tokens": -1, "completion_tokens": 1e300})).encode(), "large", chat=True
    )
    assert (found.prompt_tokens, found.answer_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("status", "means"),
    [
        (200, "answer"), (201, "refused"), (301, "refused"), (400, "unsuitable"), (401, "refused"), (403, "refused"),
        (404, "refused"), (408, "passing"), (413, "unsuitable"), (422, "unsuitable"), (429, "passing"), (500, "passing"),
        (503, "passing"),
    ],
)  # fmt: skip
def test_what_a_status_means(status: int, means: str) -> None:
    assert meaning(status) == means


def test_the_list_of_models() -> None:
    assert models(b'{"data": [{"id": "a"}, {"id": 3}, "b", {}]}') == ["a"]
    with pytest.raises(BadAnswer, match="no list `data`"):
        models(b"{}")


@pytest.mark.parametrize(
    ("body", "long"),
    [
        (b'{"error": {"code": "context_length_exceeded", "message": "512 tokens"}}', True),
        (b'{"error": {"code": "model_not_found"}}', False),
        (b'{"error": "context_length_exceeded"}', False),
        (b"[]", False),
        (b"context_length_exceeded", False),
    ],
)
def test_a_question_that_is_too_long_is_known_by_its_code(body: bytes, long: bool) -> None:
    assert too_long(body) is long


@pytest.mark.parametrize(
    ("text", "is_now"),
    [
        ('{"a": "one\ntwo\t\x00", "b":1}', '{"a": "one\\ntwo\\t\\u0000", "b": 1}'),
        ('{"a":  "ä"}', '{"a":  "ä"}'),
        ('{"a": "cut\noff', '{"a": "cut\noff'),
        ("no JSON", "no JSON"),
        ('{"a": "cut\noff \\ud800"}', '{"a": "cut\\noff \ufffd"}'),
        ("[" * 5000, "[" * 5000),
    ],
)
def test_control_characters_in_strings_are_escaped(text: str, is_now: str) -> None:
    assert mended(text) == is_now
