"""Which agents there are in this process. Names are unique; an agent that nobody holds any more is no longer there."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edged.agents.base import BaseAgent

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\Z")
AGENTS_MAX = 1000


class NameTaken(ValueError):
    """Another agent has this name."""


class AgentRegistry:
    """The agents by their names, held weakly: the registry keeps none of them alive."""

    _agents: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
    # Entered again where the collector runs inside: an agent that goes then gives its name back.
    _lock = threading.RLock()
    _counts: dict[str, int] = {}

    @classmethod
    def register(cls, agent: BaseAgent, name: str | None = None, prefix: str = "Agent") -> str:
        """Give `agent` its name, or a new one that begins with `prefix`. Raises NameTaken, ValueError."""
        if name is not None and not NAME.match(name):
            raise ValueError(f"agent name {name!r}: use 1 to 64 letters, digits, _ . -, no . or - first")
        with cls._lock:
            if len(cls._agents) >= AGENTS_MAX:
                raise ValueError(f"{AGENTS_MAX} agents are registered, no more fit; delete some")
            while name is None:
                cls._counts[prefix] = cls._counts.get(prefix, 0) + 1
                made = f"{prefix}-{cls._counts[prefix]}"
                name = None if made in cls._agents else made
            if cls._agents.get(name) not in (None, agent):
                gc.collect()  # nobody may hold it but a circle of references, as an exception leaves one
            if cls._agents.get(name) not in (None, agent):
                raise NameTaken(f"an agent {name!r} is registered already; choose another agent_name")
            cls._agents[name] = agent
        return name

    @classmethod
    def unregister(cls, name: str, agent: BaseAgent | None = None) -> None:
        """Forget a name; with `agent` only if it is that one's."""
        with cls._lock:
            if agent is None or cls._agents.get(name) is agent:
                cls._agents.pop(name, None)

    @classmethod
    def get(cls, name: str) -> BaseAgent | None:
        """The agent of this name, None when there is none."""
        return cls._agents.get(name)

    @classmethod
    def all(cls) -> dict[str, BaseAgent]:
        """Every agent by its name."""
        return dict(sorted(cls._agents.items()))
