"""What agents say to each other and to their models, and the context that a request carries along."""

from __future__ import annotations

import json
import threading
import uuid
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from typing import Any, Literal, get_args

from edged.agents.shown import whole

Role = Literal["system", "user", "assistant", "tool", "agent_call", "agent_response", "error"]
ROLES = frozenset(get_args(Role))


class LogLevel(IntEnum):
    """How important a line of progress is; the numbers are those of `logging`."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


def new_id() -> str:
    """A new id of a message, request or interaction."""
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Message:
    """One thing that was said. `content` is JSON-able, and has no half of a surrogate pair (`shown.whole`); a message is an
    error when its role is `error`.

    `tool_calls`: what the model asked to have called; `tool_call_id`, `name`: on the answer to such a call, or who says it.
    """

    role: Role
    content: Any
    message_id: str = field(default_factory=new_id)
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} of a message: use one of {', '.join(sorted(ROLES))}")
        for name in ("content", "tool_calls"):
            object.__setattr__(self, name, whole(getattr(self, name)))

    def __str__(self) -> str:
        return self.text

    @property
    def text(self) -> str:
        """The content as text: JSON where it is none."""
        return self.content if isinstance(self.content, str) else json.dumps(self.content, ensure_ascii=False)

    def to_dict(self) -> dict[str, Any]:
        """The message as JSON-able values, without what is not set."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def to_llm_dict(self) -> dict[str, Any]:
        """The message as chat models take it: role and text, and what belongs to a tool call."""
        said: dict[str, Any] = {"role": _LLM_ROLES[self.role], "content": self.text}
        for key in ("tool_calls", "tool_call_id", "name"):
            if (value := getattr(self, key)) is not None:
                said[key] = value
        return said

    @classmethod
    def from_response_dict(cls, response: dict[str, Any], name: str | None = None) -> Message:
        """The message of a model's answer `{"role", "content", "tool_calls"}`; raises ValueError for another shape."""
        role = response.get("role", "assistant")
        if role not in ROLES or "content" not in response:
            raise ValueError(f"{json.dumps(response)[:200]}: expected an answer with role and content")
        return cls(role, response["content"], tool_calls=response.get("tool_calls"), name=name)


# To a model everything that is not its own words comes from outside.
_LLM_ROLES: dict[str, str] = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "user", "agent_call": "user",
    "agent_response": "user", "error": "user",
}  # fmt: skip


class Calls:
    """How many calls between agents a task has made: one count for all its contexts in this process. For any thread."""

    def __init__(self) -> None:
        self._made, self._lock = 0, threading.Lock()

    @property
    def made(self) -> int:
        """So far."""
        return self._made

    def count(self) -> int:
        """One more is made; which one it is, the first is 1."""
        with self._lock:
            self._made += 1
            return self._made

    def at_least(self, made: int) -> None:
        """So many were made, as somebody knows who has seen more of the task."""
        with self._lock:
            self._made = max(self._made, made)


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Whose work a call is, and how deep: what stops agents that call each other without end.

    `request_id`: of the whole task; `interaction_id`: of this call; `interaction_count`: which of the task's calls between
    agents it is, whoever made them; `depth`: how many agents wait for this one; `path`: their names, the first caller
    first; `deadline`: of the whole task, seconds on the monotonic clock, None for none; `calls`: counts them.
    """

    request_id: str = field(default_factory=new_id)
    interaction_id: str = field(default_factory=new_id)
    interaction_count: int = 0
    depth: int = 0
    caller_agent_name: str | None = None
    path: tuple[str, ...] = ()
    deadline: float | None = None
    calls: Calls = field(default_factory=Calls, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.calls.at_least(self.interaction_count)

    def called_by(self, name: str) -> RequestContext:
        """The context of a call that agent `name` makes in this one."""
        return replace(
            self, interaction_id=new_id(), interaction_count=self.calls.count(), depth=self.depth + 1,
            caller_agent_name=name, path=(*self.path, name),
        )  # fmt: skip
