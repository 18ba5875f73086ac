"""What every agent has: a name, a model, tools, peers, schemas, and the rules of calling another agent."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from edged.agents.feedback import Execution, Recorder, offered_recorder
from edged.agents.messages import LogLevel, Message, RequestContext
from edged.agents.models import Model, ModelConfig, open_model, spoken_by
from edged.agents.registry import AgentRegistry
from edged.agents.schemas import Form, compile_schema, faults
from edged.agents.tools import Tool, tools_of
from edged.engines.base import Generator

log = logging.getLogger(__name__)

Tools = Mapping[str, Callable[..., Any]] | Sequence[Callable[..., Any]] | None


@dataclass(frozen=True, slots=True)
class RunLimits:
    """What one run of an agent may take, its waiting included; a task's deadline holds for all agents that it reaches."""

    seconds_max: float = 300.0
    tokens_max: int = 16_384  # generated in a run, all steps together
    depth_max: int = 8  # agents that wait for one another
    interactions_max: int = 32  # calls between agents in a task, of all of them together
    steps_max: int = 50

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)!r} of an agent's limits: use a number above 0")


class BaseAgent(ABC):
    """An agent that can be found by its name and invoked by those who may.

    `model` (or `model_config`): which model, as a ModelConfig, an object with `say`, or a Generator. `tools`: functions by
    the names that the model knows them by. `allowed_peers`: whom it may invoke. Schemas in the three forms of
    `agents.schemas`.
    """

    recorded_by_invoke: ClassVar[bool] = True  # False: of a class that hands its runs to the recorder itself

    def __init__(
        self, model: ModelConfig | Model | Generator | None = None, description: str = "", tools: Tools = None,
        agent_name: str | None = None, allowed_peers: Iterable[str] | None = None, *,
        model_config: ModelConfig | None = None, input_schema: Form = None, output_schema: Form = None,
        max_tokens: int | None = None, limits: RunLimits | None = None,
    ) -> None:  # fmt: skip
        """Raises ValueError (BadSchema, NameTaken) and EngineError; then no name is taken."""
        given = model if model is not None else model_config
        if given is None or (model is not None and model_config is not None):
            raise ValueError("an agent needs a model: give model=ModelConfig(...)")
        config = given if isinstance(given, ModelConfig) else None
        self.model: Model = open_model(config) if config else spoken_by(given)
        self.model_config = config or ModelConfig(type="local", name=_name(given))
        self.description, self.limits = description, limits or RunLimits()
        self.max_tokens = max_tokens or self.model_config.max_tokens
        self.tools = tools_of(tools)
        self.allowed_peers = set(allowed_peers or ())
        self.input_schema = compile_schema(input_schema, "input_schema")
        self.output_schema = compile_schema(output_schema, "output_schema")
        self.name = AgentRegistry.register(self, agent_name, type(self).__name__)
        self.logger = logging.getLogger(f"{__name__}.{self.name}")

    def __del__(self) -> None:
        name = getattr(self, "name", None)
        if name is not None:
            AgentRegistry.unregister(name, self)

    @property
    def model_instance(self) -> Model:
        """The model."""
        return self.model

    @property
    def tools_schema(self) -> list[dict[str, Any]]:
        """The tools as OpenAI's protocol describes them."""
        return [tool.schema for tool in self.tools.values()]

    @abstractmethod
    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        """Answer a request that has passed the schema; an error is a message of role `error`."""

    async def invoke(self, request: Any, request_context: RequestContext) -> Message:
        """Answer a request, checked and within the limits: at the deadline what `handle` waits for is cancelled, and the
        answer is an error, as is one that does not fit the output schema. Never raises for what a request or a model does
        wrong."""
        if why := faults(request, self.input_schema):
            return self.error(f"Request validation failed: agent {self.name} was not run: {why}")
        over = beyond(request_context, self.limits)
        if over:
            return self.error(f"agent {self.name} was not run: {over}")
        context = within(request_context, self.limits)
        return await (self._recorded if self.recorded_by_invoke else self._limited)(request, context)

    async def _limited(self, request: Any, context: RequestContext) -> Message:
        limit = time_limit(context)
        try:
            async with limit:
                answer = _checked(self, await self.handle(request, context))
        except TimeoutError:
            if not limit.expired():
                raise  # the agent's own
            return self.error(f"agent {self.name} stopped: {self._late()}")
        if answer.role != "error" and (why := faults(answer.content, self.output_schema)):
            return self.error(f"Response validation failed: the answer of agent {self.name} is wrong: {why}")
        return answer

    async def _recorded(self, request: Any, context: RequestContext) -> Message:
        """The answer; whatever becomes of it is on record. There is nothing to learn in it: no model's answer is known."""
        began, answer = time.monotonic(), self.error(f"agent {self.name} stopped: it was cancelled")
        try:
            answer = await self._limited(request, context)
        except Exception as error:
            answer = self.error(f"agent {self.name} failed: {type(error).__name__}: {error}")
            raise
        finally:
            await self._keep(lambda: _execution(self, request, answer, context, time.monotonic() - began))
        return answer

    async def _keep(self, execution: Callable[[], Execution], recorder: Recorder | None = None) -> str | None:
        """Hand a run to the recorder, else to the daemon's, if there is one; answers by which id feedback names it. What
        cannot be kept costs the record, never the answer."""
        recorder = recorder or offered_recorder()
        if recorder is None:
            return None
        try:
            return await asyncio.to_thread(recorder.record, execution())
        except Exception as error:  # a store, and an answer that is no JSON, have many ways to fail
            self.logger.error("the run was not recorded: %s", error)
            return None

    async def invoke_agent(
        self, target_agent_name: str, request: Any, request_context: RequestContext | None = None
    ) -> Message:
        """Let another agent answer a request. What is not allowed, does not fit or goes wrong is an error message."""
        context = (request_context or RequestContext()).called_by(self.name)
        if target_agent_name not in self.allowed_peers:
            peers = ", ".join(sorted(self.allowed_peers)) or "none"
            return self.error(f"agent {self.name} may not invoke {target_agent_name!r}; its allowed_peers: {peers}")
        target = AgentRegistry.get(target_agent_name)
        if target is None:
            known = ", ".join(AgentRegistry.all())
            return self.error(f"no agent {target_agent_name!r} is registered; there are: {known}")
        try:
            return await target.invoke(request, context)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # another agent's code; its failure is an answer to this one
            log.exception("agent %s failed", target_agent_name)
            return self.error(f"agent {target_agent_name} failed: {type(error).__name__}: {error}")

    def _late(self) -> str:
        return f"its time is over ({self.limits.seconds_max:g} s at most)"

    def error(self, text: str) -> Message:
        """A message that says what went wrong."""
        return Message("error", text, name=getattr(self, "name", None))

    async def _log_progress(self, request_context: RequestContext, level: LogLevel, text: str, **facts: Any) -> None:
        said = " ".join([text, *(f"{key}={value!r}" for key, value in facts.items())])
        self.logger.log(
            int(level), "%s [request %s, depth %d]", said, request_context.request_id, request_context.depth
        )


def _name(model: Any) -> str:
    return getattr(model, "name", "") or type(model).__name__


def _execution(agent: BaseAgent, request: Any, answer: Message, context: RequestContext, seconds: float) -> Execution:
    """The record of a run whose steps nobody saw."""
    failed = answer.role == "error"
    return Execution(
        agent.name, Message("user", request).text, "", [], [], "" if failed else answer.text,
        answer.text if failed else "", agent.model_config.name, context.request_id, agent.output_schema, seconds=seconds,
    )  # fmt: skip


def within(context: RequestContext, limits: RunLimits) -> RequestContext:
    """The context of a run that begins now: its deadline is the task's, or that of the agent's limits where it is sooner."""
    until = time.monotonic() + limits.seconds_max
    return context if context.deadline is not None and context.deadline <= until else replace(context, deadline=until)


def time_limit(context: RequestContext) -> asyncio.Timeout:
    """Cancels at the context's deadline what is awaited inside, and raises TimeoutError for it."""
    return asyncio.timeout(None if context.deadline is None else max(0.0, context.deadline - time.monotonic()))


def beyond(context: RequestContext, limits: RunLimits) -> str:
    """Which limit a call in this context would break; "" when none. Calls that go round in a circle break one at last."""
    if context.depth > limits.depth_max:
        return (
            f"{context.depth} agents wait for one another, at most {limits.depth_max} may ({' > '.join(context.path)})"
        )
    if context.interaction_count > limits.interactions_max:
        return (
            f"{context.interaction_count} calls between agents, at most {limits.interactions_max} are made for a task"
        )
    if context.deadline is not None and time.monotonic() >= context.deadline:
        return "the task's time is over"
    return ""


def _checked(agent: BaseAgent, answer: Any) -> Message:
    """What an agent's own code answered, or an error where it is no message or its content no JSON: nobody could be told."""
    if not isinstance(answer, Message):
        return agent.error(f"agent {agent.name} answered with {type(answer).__name__}; a Message is expected")
    try:
        json.dumps(answer.content, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return agent.error(f"the answer of agent {agent.name} is no JSON: {error}")
    return answer


def peer_schemas(names: Iterable[str]) -> dict[str, dict[str, Any] | None]:
    """The input schemas of those of the named agents that are there."""
    found = {name: AgentRegistry.get(name) for name in sorted(names)}
    return {name: agent.input_schema for name, agent in found.items() if agent is not None}


__all__ = ["BaseAgent", "RunLimits", "Tool", "Tools", "beyond", "peer_schemas", "time_limit", "within"]
