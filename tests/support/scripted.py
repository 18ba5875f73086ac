"""A model that says what a test wrote down, for what an agent does with it; it keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from edged.agents.models import Said
from edged.engines.base import EngineError, Finished, GenerateRequest

Line = str | dict[str, Any] | Exception | Callable[[GenerateRequest], str]


def final(response: Any) -> dict[str, Any]:
    """The step that answers."""
    return {"thought": "", "next_action": "final_response", "action_input": {"response": response}}


def call(tool: str, **arguments: Any) -> dict[str, Any]:
    """The step that calls a tool."""
    return {"thought": "", "next_action": "call_tool", "action_input": {"tool_name": tool, "arguments": arguments}}


def ask(agent: str, request: Any) -> dict[str, Any]:
    """The step that asks another agent."""
    return {"thought": "", "next_action": "invoke_agent", "action_input": {"agent_name": agent, "request": request}}


class Scripted:
    """Says one line after the other, then fails."""

    def __init__(self, *lines: Line, tokens: int = 10) -> None:
        self._lines, self._tokens = list(lines), tokens
        self.asked: list[GenerateRequest] = []
        self._lock = threading.Lock()

    def say(self, request: GenerateRequest, hear: Callable[[str], None] | None = None) -> Said:
        with self._lock:
            self.asked.append(request)
            if not self._lines:
                raise EngineError("the script is over")
            line = self._lines.pop(0)
        if isinstance(line, Exception):
            raise line
        if callable(line):
            line = line(request)
        if isinstance(line, Said):
            return line
        text = line if isinstance(line, str) else json.dumps(line)
        if hear is not None:
            hear(text)
        return Said(text, Finished(request.halt() or "stop", 1, self._tokens, -0.1), "scripted@1.0")
