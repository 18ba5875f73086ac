"""`dataset.jsonl`: the language requests that this device answered, as examples to learn from.

One JSON object a line: `goal` (what was asked), `context_summary` (what came before it in the conversation), `plan` (the
steps with their arguments), `execution` (what each step gave) and `summary` (the response to learn). An answer that a limit
or its requester cut off is no response to learn: only those that the model ended are written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from edged.files import sync
from edged.store import LanguageRequest
from edged.store.records import Json

TOOL = "generate"  # the one step of a language request
_RESULT = ("release", "adapter", "confidence", "finish_reason", "prompt_tokens", "answer_tokens", "latency_ms", "ts")


def example(request: LanguageRequest) -> Json | None:
    """The line for a request; None when it has no whole answer."""
    if request.finish_reason != "stop" or not request.answer.strip():
        return None
    goal, before = _conversation(request)
    if not goal.strip():
        return None
    arguments: Json = {"pipeline": request.pipeline, **request.options}
    if request.messages:
        arguments["messages"] = request.messages
    kept = asdict(request)
    result = {"tool": TOOL, "status": "success", "output": request.answer, "request": request.id}
    return {
        "goal": goal,
        "context_summary": before,
        "plan": [{"tool": TOOL, "arguments": arguments}],
        "execution": [result | {name: kept[name] for name in _RESULT}],
        "summary": request.answer,
    }


def _conversation(request: LanguageRequest) -> tuple[str, str]:
    """What the user asked for last, and the turns around it, a line each."""
    asked = [number for number, turn in enumerate(request.messages) if turn["role"] == "user"]
    if not asked:
        return request.prompt, "\n".join(f"{turn['role']}: {turn['content']}" for turn in request.messages)
    others = (turn for number, turn in enumerate(request.messages) if number != asked[-1])
    return request.messages[asked[-1]]["content"], "\n".join(f"{turn['role']}: {turn['content']}" for turn in others)


def lines(requests: Iterable[LanguageRequest]) -> list[str]:
    """The lines of the whole answers among `requests`, in their order, each with its end of line."""
    found = (example(request) for request in requests)
    # ASCII only: a line separator of Unicode in an answer would end the line for some readers.
    return [json.dumps(row) + "\n" for row in found if row is not None]


def write(path: Path, text: Iterable[str]) -> None:
    """Write beside `path`, then rename into place, durably: nobody ever reads half a file. Raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(text)
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)
