"""Agents by specification: a builder says what an agent is, a guild makes it and brings it the messages of its type.

A guild is one process's: between devices the same messages go over MQTT (docs/language.md), with the broker's roles.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from edged.agents.messages import Message, RequestContext
from edged.agents.phi import GenerationPromptRequest, GenerationPromptResponse, PhiAgent, PhiAgentProps

TOPIC = "default_topic"
ANSWERS_MAX = 1000  # kept for whoever has not taken them yet; then the oldest goes
AT_WORK_MAX = 64  # messages of a guild that are being answered
A = TypeVar("A", bound=PhiAgent)


class BadSpec(ValueError):
    """A specification that no agent can be made of; the message names what is missing or wrong."""


@dataclass(frozen=True, slots=True)
class AgentSpec(Generic[A]):
    """What an agent is to be. `id` is its name among agents, `name` is for people; `topics`: those it hears."""

    id: str
    name: str
    description: str
    agent_class: type[A]
    properties: PhiAgentProps
    topics: tuple[str, ...] = (TOPIC,)

    def make(self) -> A:
        """The agent. Raises ValueError (NameTaken), and EngineError when its model is not there."""
        return self.agent_class(props=self.properties, description=self.description, agent_name=self.id)


class AgentBuilder(Generic[A]):
    """Puts an AgentSpec together, one call a property."""

    def __init__(self, agent_class: type[A]) -> None:
        """Raises BadSpec for a class that answers no messages."""
        if not (isinstance(agent_class, type) and issubclass(agent_class, PhiAgent)):
            raise BadSpec(f"{agent_class!r} answers no messages of a guild; give a class of PhiAgent")
        self._class, self._id, self._name, self._description = agent_class, "", "", ""
        self._properties = PhiAgentProps()
        self._topics: tuple[str, ...] = (TOPIC,)

    def set_id(self, agent_id: str) -> AgentBuilder[A]:
        """Its name among agents; without one it is made of the name."""
        self._id = agent_id
        return self

    def set_name(self, name: str) -> AgentBuilder[A]:
        """What people call it."""
        self._name = name
        return self

    def set_description(self, description: str) -> AgentBuilder[A]:
        """What it is for."""
        self._description = description
        return self

    def set_properties(self, properties: PhiAgentProps) -> AgentBuilder[A]:
        """Which model, and where it runs. Raises BadSpec for properties of another kind."""
        if not isinstance(properties, PhiAgentProps):
            raise BadSpec(f"properties {properties!r}: give PhiAgentProps")
        self._properties = properties
        return self

    def set_topics(self, *topics: str) -> AgentBuilder[A]:
        """Which topics it hears; `default_topic` unless said."""
        self._topics = topics
        return self

    def build_spec(self) -> AgentSpec[A]:
        """The specification. Raises BadSpec for what is missing."""
        name = self._name or self._id
        if not name or not self._topics:
            raise BadSpec("the agent has no name or no topic; call set_name(...) or set_id(...), set_topics(...)")
        made = self._id or re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip(".-")
        return AgentSpec(made, name, self._description, self._class, self._properties, tuple(self._topics))


class GuildBuilder:
    """Collects the specifications of a guild."""

    def __init__(self) -> None:
        self._specs: list[AgentSpec[Any]] = []

    def add_agent_spec(self, spec: AgentSpec[Any]) -> GuildBuilder:
        """Take one more agent. Raises BadSpec for an id that is there already."""
        if any(each.id == spec.id for each in self._specs):
            raise BadSpec(f"agent id {spec.id!r} is there already; give each its own")
        self._specs.append(spec)
        return self

    def launch(self) -> Guild:
        """Make all agents. Raises what `AgentSpec.make` raises; then none is left."""
        return Guild([(spec, spec.make()) for spec in self._specs])


class Guild:
    """Agents that hear messages by topic and type. For one event loop: `async with builder.launch() as guild:`."""

    def __init__(self, agents: list[tuple[AgentSpec[Any], PhiAgent]]) -> None:
        self._agents = agents
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: dict[str, deque[BaseModel | Message]] = {}
        self._changed = asyncio.Condition()

    def publish(self, topic: str, message: BaseModel) -> int:
        """Bring a message to every agent that hears the topic and takes its type; answers how many those are.

        Must be called in the guild's event loop. Raises RuntimeError with too many messages on their way.
        """
        heard = [agent for spec, agent in self._agents if topic in spec.topics and isinstance(message, agent.accepts)]
        if len(self._tasks) + len(heard) > AT_WORK_MAX:
            raise RuntimeError(f"{len(self._tasks)} messages are being answered, at most {AT_WORK_MAX}; wait for them")
        for agent in heard:
            task = asyncio.get_running_loop().create_task(self._answer(topic, agent, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return len(heard)

    async def receive(self, topic: str = TOPIC, seconds_max: float = 300.0) -> BaseModel | Message:
        """The next answer on a topic: a response, or a message of role `error`. Raises TimeoutError."""
        async with asyncio.timeout(seconds_max), self._changed:
            await self._changed.wait_for(lambda: self._answers.get(topic))
            return self._answers[topic].popleft()

    async def _answer(self, topic: str, agent: PhiAgent, message: BaseModel) -> None:
        said = await agent.invoke(message.model_dump(), RequestContext())
        answer = said if said.role == "error" else GenerationPromptResponse.model_validate(said.content)
        async with self._changed:
            self._answers.setdefault(topic, deque(maxlen=ANSWERS_MAX)).append(answer)
            self._changed.notify_all()

    async def close(self) -> None:
        """End what is being answered, and let the agents go."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._agents.clear()

    async def __aenter__(self) -> Guild:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.close()


__all__ = [
    "AgentBuilder", "AgentSpec", "BadSpec", "GenerationPromptRequest", "GenerationPromptResponse", "Guild", "GuildBuilder",
]  # fmt: skip
