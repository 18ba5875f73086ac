"""Several agents on one task: `Orchestra.run(task, topology)` lets them work in sequence, side by side, and together.

Law of this file: the topology is checked whole before the first agent works; a node whose answer is an error stops those
that wait for it and nobody else; and all that happened stands in the trace, whatever the end was.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from edged.agents.base import BaseAgent
from edged.agents.messages import Message, RequestContext
from edged.agents.registry import AgentRegistry
from edged.core.topology import BadTopology, Node, ends, read_topology

State = Literal["waiting", "running", "done", "failed", "left out", "stopped"]
SHOWN_CHARS_MAX = 300  # of a request or an answer in the readable trace


@dataclass(frozen=True, slots=True)
class OrchestraLimits:
    """What one run of a topology may take: seconds for all of it, and agents that work at the same time."""

    seconds_max: float = 900.0
    at_once_max: int = 8

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)!r} of an orchestra's limits: use a number above 0")


@dataclass(slots=True)
class NodeRun:
    """What became of one node. `why`: of a node that failed, was left out or was stopped; `seconds`: that its agent
    worked."""

    node: str
    agent: str
    after: tuple[str, ...]
    state: State = "waiting"
    request: Any = None
    answer: Any = None
    why: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        name = self.node if self.node == self.agent else f"{self.node} (agent {self.agent})"
        after = f" after {', '.join(self.after)}" if self.after else ""
        if self.state == "done":
            return f"{name}{after}: done in {self.seconds:.1f} s: {_short(self.answer)}"
        return f"{name}{after}: {self.state}{': ' if self.why else ''}{self.why}"


@dataclass(slots=True)
class Concert:
    """A whole run. `content`: the answer of the last node, or where several are last `{node: answer}`; None when one of
    them has none. `trace`: every node in the order of the work. As text it is the answer, or what went wrong."""

    task: Any
    trace: list[NodeRun]
    content: Any = None
    context: RequestContext = field(default_factory=RequestContext)

    @property
    def ok(self) -> bool:
        """Whether every node has answered."""
        return all(run.state == "done" for run in self.trace)

    @property
    def failures(self) -> dict[str, str]:
        """Every node that has no answer, with the reason."""
        return {run.node: f"{run.state}: {run.why}" for run in self.trace if run.state != "done"}

    @property
    def trace_text(self) -> str:
        """The trace, a line for each node."""
        lines = [f"task: {_short(self.task)}", *(f"{number}. {run}" for number, run in enumerate(self.trace, 1))]
        return "\n".join(lines)

    def __str__(self) -> str:
        if self.content is None:
            return "; ".join(f"node {name} {why}" for name, why in self.failures.items())
        return self.content if isinstance(self.content, str) else json.dumps(self.content, ensure_ascii=False)


class Orchestra:
    """Runs topologies of the agents that are registered here."""

    @classmethod
    async def run(
        cls, task: Any, topology: Mapping[str, Any], *, request_context: RequestContext | None = None,
        limits: OrchestraLimits | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> Concert:  # fmt: skip
        """Let the agents of `topology` (`core.topology`) work on `task`.

        The first nodes get the task. A node that waits for others gets `{"task", "results": {node: answer}}`; one whose
        agent has an input_schema gets the answer of the node before as it is, of several nodes `{node: answer}`.
        What goes wrong in a node stands in the result. Raises BadTopology, also for an agent that is not registered.
        """
        nodes = read_topology(topology)
        agents = _agents(nodes)
        limits, context = limits or OrchestraLimits(), request_context or RequestContext()
        until = clock() + limits.seconds_max
        if context.deadline is None or context.deadline > until:
            context = replace(context, deadline=until)
        work = _Work(task, nodes, agents, context, limits, clock)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, (context.deadline or until) - clock())):
                await work.play()
        work.stop(f"the time of the task is over ({limits.seconds_max:g} s at most)")
        return Concert(task, list(work.runs.values()), work.content(), context)


class _Work:
    """A run on its way."""

    def __init__(
        self, task: Any, nodes: tuple[Node, ...], agents: Mapping[str, BaseAgent], context: RequestContext,
        limits: OrchestraLimits, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._task, self._nodes, self._agents, self._context, self._clock = task, nodes, agents, context, clock
        self._places = asyncio.Semaphore(limits.at_once_max)
        self.runs = {node.name: NodeRun(node.name, node.agent, node.after) for node in nodes}

    async def play(self) -> None:
        """Every node, each as soon as those before it have answered; ends those that work when it is cancelled."""
        tasks: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            for node in self._nodes:  # those before it are in `tasks` already
                before = [tasks[name] for name in node.after]
                tasks[node.name] = group.create_task(self._node(node, before), name=f"node {node.name}")

    async def _node(self, node: Node, before: list[asyncio.Task[None]]) -> None:
        if before:
            await asyncio.wait(before)
        run = self.runs[node.name]
        if self._over():
            return
        missing = [name for name in node.after if self.runs[name].state != "done"]
        if missing:
            run.state, run.why = "left out", f"no answer of {', '.join(missing)}"
            return
        async with self._places:
            run.state, run.request = "running", self._request(node)
            began = self._clock()
            answer = await self._ask(self._agents[node.agent], run.request)
            run.seconds = self._clock() - began
        if answer.role == "error" and self._over():
            return  # its agent has the task's deadline too
        if answer.role == "error":
            run.state, run.why = "failed", answer.text
        else:
            run.state, run.answer = "done", answer.content

    def _over(self) -> bool:
        """Whether nobody works any more; `stop` says so of those that have not ended."""
        return self._context.deadline is not None and self._clock() >= self._context.deadline

    async def _ask(self, agent: BaseAgent, request: Any) -> Message:
        try:
            return await agent.invoke(request, self._context)
        except Exception as error:  # an agent's own code; its failure is this node's and nobody else's
            agent.logger.exception("agent %s failed", agent.name)
            return agent.error(f"agent {agent.name} failed: {type(error).__name__}: {error}")

    def _request(self, node: Node) -> Any:
        if not node.after:
            return self._task
        answers = {name: self.runs[name].answer for name in node.after}
        if self._agents[node.agent].input_schema is None:
            return {"task": self._task, "results": answers}
        return answers[node.after[0]] if len(answers) == 1 else answers

    def stop(self, why: str) -> None:
        """Note that nobody works any more."""
        for run in self.runs.values():
            if run.state in ("waiting", "running"):
                run.state, run.why = "stopped", why

    def content(self) -> Any:
        last = [self.runs[name] for name in ends(self._nodes)]
        if any(run.state != "done" for run in last):
            return None
        return last[0].answer if len(last) == 1 else {run.node: run.answer for run in last}


def _agents(nodes: tuple[Node, ...]) -> dict[str, BaseAgent]:
    """The agents of a topology by their names; held, so that none is gone before its turn."""
    found: dict[str, BaseAgent] = {}
    for node in nodes:
        agent = AgentRegistry.get(node.agent)
        if agent is None:
            known = ", ".join(AgentRegistry.all()) or "none"
            raise BadTopology(f"node {node.name!r}: no agent {node.agent!r} is registered; there are: {known}")
        found[node.agent] = agent
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARS_MAX else f"{text[:SHOWN_CHARS_MAX]}..."
