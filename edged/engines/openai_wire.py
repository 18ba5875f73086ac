"""OpenAI's protocol for questions to a language model: the body of a question, and what an answer says. No I/O.

Source: the reference of POST /v1/chat/completions and /v1/completions (platform.openai.com/docs/api-reference), as
llama.cpp, vLLM, Ollama and others serve it. An answer is a stranger's: every field is looked at before it is used.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from edged.engines.base import ChatMessage, GenerateRequest

TEXT_BYTES_MAX = 128 << 10  # of an answer: a label must fit a message
MODEL_CHARS_MAX = 200
SCHEMA_NAME = "answer"  # the protocol wants one
Meaning = Literal["answer", "passing", "unsuitable", "refused"]


class BadAnswer(ValueError):
    """What the server sent is no answer; the message says what is wrong with it."""


class Declined(ValueError):
    """The server understood and will not answer this question; the message is its reason."""


@dataclass(frozen=True, slots=True)
class Said:
    """One answer. `reason`: `stop`, or `length` where the limit of tokens cut it off; `mean_logprob`: of its tokens, None
    where the server gives none; `model`: as the server names it."""

    text: str
    reason: Literal["stop", "length"]
    model: str
    mean_logprob: float | None
    prompt_tokens: int
    answer_tokens: int


def meaning(status: int) -> Meaning:
    """What a status says: an answer, that it may work later, that this question is not for it, or that none is (a wrong
    key, model or address)."""
    if status == 200:
        return "answer"
    if status in (408, 409, 425, 429) or status >= 500:
        return "passing"
    return "unsuitable" if status in (400, 413, 422) else "refused"


def question(
    request: GenerateRequest, model: str, *, chat: bool, instructions: str, tokens_max: int, tokens_field: str,
    logprobs: bool, schema_form: Literal["json_schema", "json_object"] = "json_schema",
) -> dict[str, Any]:  # fmt: skip
    """The body that asks for `request`; `chat`: as a conversation. A request with messages is always one. `schema_form`:
    how a schema is told: as OpenAI's protocol does, or as llama-cpp-python's server wants it."""
    body: dict[str, Any] = {
        "model": model,
        "temperature": request.temperature,
        tokens_field: request.tokens_max or tokens_max,
        "stream": False,
    }
    if request.temperature > 0:
        body["seed"] = request.seed
    if request.stop:
        body["stop"] = list(request.stop)
    if request.schema is not None:
        # Not `strict`: some servers then refuse schemas that name no additionalProperties. What comes is looked at here.
        schema = {"name": SCHEMA_NAME, "schema": request.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if schema_form == "json_object":
            body["response_format"] = {"type": "json_object", "schema": request.schema}
    if not chat:
        return body | {"prompt": request.prompt} | ({"logprobs": 0} if logprobs else {})
    turns = list(request.messages) or [ChatMessage("user", request.prompt)]
    if instructions:
        turns.insert(0, ChatMessage("system", instructions))
    body["messages"] = [{"role": turn.role, "content": turn.content} for turn in turns]
    return body | ({"logprobs": True} if logprobs else {})


def answer(data: bytes, model: str, *, chat: bool) -> Said:
    """What the body of a server's answer says; raises BadAnswer, Declined."""
    found = _json(data)
    said_model = found.get("model", model)
    if not isinstance(said_model, str) or not _same(model, said_model):
        raise BadAnswer(
            f"it answers as model {str(said_model)[:MODEL_CHARS_MAX]!r}, asked was {model!r}: put the model's name there"
        )
    choices = found.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BadAnswer("it has no list `choices` with an object in it")
    choice = choices[0]
    reason = choice.get("finish_reason")
    if reason == "content_filter":
        raise Declined("its filter refused the question or the answer")
    text = _text(choice, chat=chat)
    if reason not in ("stop", "length"):
        raise BadAnswer(f"its answer ended as {str(reason)[:40]!r}, expected stop or length")
    if len(text.encode("utf-8", "replace")) > TEXT_BYTES_MAX:
        raise Declined(f"its answer has more than {TEXT_BYTES_MAX} bytes, which no label may have")
    usage = found.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Said(
        _unicode(text), reason, said_model,
        _mean(_logprobs(choice, chat=chat)), _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")),
    )  # fmt: skip


def mended(text: str) -> str:
    """A JSON text without the fence that some models put around it, and with the control characters escaped that some
    servers' grammars let through in strings; any other text as it is."""
    bare = unfenced(text)
    for found in (text, bare):
        try:
            json.loads(found)
            return found
        except (ValueError, RecursionError):
            pass
    try:
        return _unicode(json.dumps(json.loads(bare, strict=False), ensure_ascii=False))
    except (ValueError, RecursionError):
        return text


def unfenced(text: str) -> str:
    """What stands between the lines of a Markdown fence; a text without one as it is."""
    stripped = text.strip()
    if stripped.startswith("```") and stripped.endswith("```") and "\n" in stripped:
        return stripped[stripped.index("\n") : -3].strip()
    return text


def _unicode(text: str) -> str:
    """Halves of surrogate pairs are JSON, and no text."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def too_long(data: bytes) -> bool:
    """Whether a server's refusal says that the question is longer than its model's context."""
    try:
        error = json.loads(data).get("error")
    except (ValueError, RecursionError, AttributeError):
        return False
    return isinstance(error, dict) and error.get("code") == "context_length_exceeded"


def models(data: bytes) -> list[str]:
    """The models that an answer to GET /models names; raises BadAnswer."""
    rows = _json(data).get("data")
    if not isinstance(rows, list):
        raise BadAnswer("it has no list `data`")
    return [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]


def _json(data: bytes) -> dict[str, Any]:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    try:
        found = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        begins = data[:60].decode("utf-8", "replace")
        raise BadAnswer(f"it is no JSON ({str(error)[:100]}), it begins with {begins!r}") from None
    if not isinstance(found, dict):
        raise BadAnswer(f"it is a {type(found).__name__}, expected an object")
    return found


def _same(asked: str, said: str) -> bool:
    """Whether a server that was asked for one model has answered with it: some name the exact version or tag behind."""
    return said == asked or (
        len(said) <= MODEL_CHARS_MAX and said.isprintable() and said.startswith((f"{asked}-", f"{asked}:", f"{asked}@"))
    )


def _text(choice: dict[str, Any], *, chat: bool) -> str:
    holder = choice.get("message") if chat else choice
    if not isinstance(holder, dict):
        raise BadAnswer("its choice has no object `message`")
    if isinstance(refusal := holder.get("refusal"), str) and refusal:
        raise Declined(f"it refuses: {refusal[:200]!r}")
    text = holder.get("content" if chat else "text")
    if not isinstance(text, str):
        raise BadAnswer(f"its text is {type(text).__name__}, expected a string")
    return text


def _logprobs(choice: dict[str, Any], *, chat: bool) -> list[Any]:
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        return []
    rows = found.get("content" if chat else "token_logprobs")
    if not isinstance(rows, list):
        return []
    return [row.get("logprob") if isinstance(row, dict) else None for row in rows] if chat else rows


def _mean(logprobs: list[Any]) -> float | None:
    """None unless every one is a number that a logarithm of a probability can be (rounding aside)."""
    values = [float(value) for value in logprobs if isinstance(value, int | float) and not isinstance(value, bool)]
    if not values or len(values) != len(logprobs) or not all(math.isfinite(v) and v <= 1e-3 for v in values):
        return None
    return sum(min(value, 0.0) for value in values) / len(values)


def _count(value: Any) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < 1 << 31 else 0
