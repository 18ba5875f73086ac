"""The agents of a running daemon: made at the start, run one after the other on the device's own slots, cancelled, ended.

Their event loop has a thread of its own, so that neither a camera nor the control loop ever waits for an agent. Law: a run
that was taken on ends with exactly one answer to whoever asked, also when it is cancelled or the daemon stops; then every
agent that holds something (a browser, say) gives it back.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edged.agents.agent import Agent
from edged.agents.apart import Apart
from edged.agents.base import BaseAgent, beyond
from edged.agents.building import BadAgent, build, let_find
from edged.agents.feedback import Execution, Feedback, Recorder, offer_recorder
from edged.agents.learnable import LearnableAgent
from edged.agents.memory import Kept, MemoryManager
from edged.agents.messages import Message, RequestContext
from edged.agents.models import offer_slot
from edged.agents.registry import AgentRegistry
from edged.clock import Clock
from edged.config_agents import Agent as AgentConfig
from edged.config_agents import Peer
from edged.core.health import Problem
from edged.engines.base import EngineError, Generator, Unanswered, Unsuitable
from edged.engines.host import EngineEnded
from edged.pace import Pace
from edged.slot import Slot, SlotStopped
from edged.store import Store, StoreError
from edged.turns import Halt, never

if TYPE_CHECKING:
    from edged.agents.peers import Courier

log = logging.getLogger(__name__)

RUNS_MAX = 32  # runs that are on their way or wait, of all agents
MODEL_WAIT_S = 10.0  # for a model on its way into the slot
STOP_S_MAX = 6.0
WIND_UP_S_MAX = 2.0  # of it, for answers to those who wait
CLOSE_S_MAX = 3.0  # and for what agents hold
THREAD = "agents"
REMEMBERED_MAX = 256  # runs whose ids are still asked for


class Busy(RuntimeError):
    """So many runs wait already that another one is not taken on."""


class NoAgent(LookupError):
    """No agent of this name runs here; the message names those that do."""


class LentSlot:
    """A slot as agents borrow its model: for one request, whatever is live then."""

    def __init__(self, slot: Slot, pace: Pace, failed: Callable[..., None], stopping: threading.Event) -> None:
        """`failed`: told the slot's name, and whether the engine's process `ended`."""
        self._slot, self._pace, self._failed, self._stopping = slot, pace, failed, stopping

    @contextmanager
    def lent(self, halt: Halt = never) -> Iterator[tuple[Generator, str, str]]:
        """As Lessor. Raises EngineError."""
        pace, slot = self._pace, self._slot
        pace.begin()
        try:
            with (
                pace.admitted(slot.lease(MODEL_WAIT_S, halt)) as loaded,
                pace.admitted(loaded.use.turn(halt)),
            ):
                yield loaded.generator, loaded.ref.release, loaded.adapter.release if loaded.adapter else ""
        except SlotStopped:
            raise EngineError(f"slot {slot.name}: the daemon is ending") from None
        except (Unsuitable, Unanswered):
            raise  # the request's fault, or nobody's: not the engine's
        except EngineError as error:
            if slot.live is not None:
                self._failed(slot.name, ended=isinstance(error, EngineEnded))
            raise
        finally:
            pace.rest(self._stopping, lambda: None)

    def running(self) -> tuple[str, str]:
        """The release and the adapter that would answer now, without waiting for who is at work. Raises EngineError."""
        live = self._slot.live
        if live is None:
            raise EngineError(f"slot {self._slot.name}: no model is loaded yet")
        return live.ref.release, live.adapter.release if live.adapter else ""


@dataclass(slots=True)
class Running:
    """A run that was taken on. `future` ends with the answer and the id by which feedback names the run, "" for none."""

    agent: str
    context: RequestContext
    future: Future[tuple[Message, str]] = field(default_factory=Future)

    def cancel(self) -> None:
        """End it, at the next token or step."""
        self.future.cancel()


class _Noting:
    """The recorder, noting which run became which record."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._ids: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def record(self, execution: Execution) -> str:
        run_id = self._recorder.record(execution)
        with self._lock:
            self._ids[execution.agent, execution.request_id] = run_id
            while len(self._ids) > REMEMBERED_MAX:
                del self._ids[next(iter(self._ids))]
        return run_id

    def feedback(self, sample_id: str, feedback: Feedback) -> None:
        self._recorder.feedback(sample_id, feedback)

    def taken(self, agent: str, request_id: str) -> str:
        """The id of the record of this run, "" when none was made."""
        with self._lock:
            return self._ids.pop((agent, request_id), "")


class Hosted:
    """All agents of the daemon. `submit`, `cancel` and `feedback` may be called on any thread."""

    def __init__(
        self, configs: Mapping[str, AgentConfig], slots: Mapping[str, Slot], store: Store, recorder: Recorder,
        clock: Clock, pace: Pace, failed: Callable[..., None], say: Callable[..., None],
    ) -> None:  # fmt: skip
        """`failed`: as LentSlot; `say`: an event for people (kind, text)."""
        self._configs, self._slots, self._store, self._say = configs, slots, store, say
        self._clock = clock
        self.recorder = _Noting(recorder)
        self._stopping = threading.Event()
        self._lessors = {name: LentSlot(slots[name], pace, failed, self._stopping) for name in self._used()}
        self._peers: Mapping[str, Peer] = {}
        self._courier: Courier | None = None
        self._agents: dict[str, BaseAgent] = {}
        self._wrong: dict[str, str] = {}  # agent -> why it was not made
        self._running: dict[int, Running] = {}
        self._lock = threading.Lock()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=THREAD, daemon=True)

    def _used(self) -> list[str]:
        return sorted({config.slot for config in self._configs.values()})

    def with_peers(self, peers: Mapping[str, Peer], courier: Courier) -> None:
        """Agents of other devices that these may ask; before `start`."""
        self._peers, self._courier = peers, courier

    def start(self, config: Path | None = None) -> None:
        """Make the agents; `config`: beside this file their modules may lie. One that cannot be made is said, the others
        run."""
        let_find(config)
        for name, lessor in self._lessors.items():
            offer_slot(name, lessor)
        offer_recorder(self.recorder)
        for name, each in self._configs.items():
            try:
                memory = MemoryManager(Kept(self._store.conversations, name) if each.remember else None)
                self._agents[name] = build(name, each, memory, self.recorder)
            except BadAgent as error:
                self._not_made(name, str(error))
            except (StoreError, LookupError, ValueError, TypeError) as error:
                self._not_made(
                    name, f"agents.{name}: its conversation cannot be read ({error}); `remember = false` leaves it"
                )
        for name, peer in self._peers.items():
            self._make_peer(name, peer)
        self._thread.start()
        log.info("agents: %s", ", ".join(self._agents) or "none")

    def _not_made(self, name: str, why: str) -> None:
        self._wrong[name] = why
        log.error("agent %s was not made: %s", name, why)
        self._store.count("agents_not_made")
        self._say("agent_not_made", why, agent=name)

    def _make_peer(self, name: str, peer: Peer) -> None:
        from edged.agents.peers import RemoteAgent

        assert self._courier is not None
        try:
            self._agents[name] = RemoteAgent(name, peer, self._courier)
        except ValueError as error:
            self._wrong[name] = f"peers.{name}: {error}"
            self._say("agent_not_made", self._wrong[name], agent=name)

    def stop(self, timeout_s: float = STOP_S_MAX) -> bool:
        """Cancel what runs, answer whoever waits, end the loop; false when it did not end in time."""
        self._stopping.set()
        with self._lock:
            running = list(self._running.values())
        for each in running:
            each.cancel()
        if self._thread.is_alive():
            self.spawn(self._wind_up())
            self._thread.join(timeout_s)
        for name in self._lessors:
            offer_slot(name, None)
        offer_recorder(None)
        for name, agent in self._agents.items():  # whoever still holds one does not keep its name
            AgentRegistry.unregister(name, agent)
        self._agents.clear()
        return not self._thread.is_alive()

    async def _wind_up(self) -> None:
        """Whoever waits for a run is told that it was cancelled, agents are closed, then the loop ends."""
        others = asyncio.all_tasks(self.loop) - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=WIND_UP_S_MAX)
        closing = [asyncio.create_task(_close(agent)) for agent in self._agents.values()]
        if closing:
            _, open_still = await asyncio.wait(closing, timeout=CLOSE_S_MAX)
            if open_still:
                log.error("%d agents did not close within %.0f s", len(open_still), CLOSE_S_MAX)
        self.loop.stop()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            with suppress(Exception):
                pending = asyncio.all_tasks(self.loop)
                for task in pending:
                    task.cancel()
                self.loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
                self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def spawn(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        """Let something run on the agents' loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def submit(
        self, name: str, request: Any, context: RequestContext | None = None, max_steps: int | None = None
    ) -> Running:
        """Take on a run. Raises NoAgent, Busy, and ValueError for `max_steps` that the agent's limits do not allow."""
        agent, config = self._agents.get(name), self._configs.get(name)
        if agent is None:
            if name in self._wrong:
                raise NoAgent(f"agent {name} was not made: {self._wrong[name]}")
            raise NoAgent(f"no agent {name!r} runs here; there are: {', '.join(self._agents) or 'none'}")
        steps = max_steps if max_steps is not None else config.max_steps if config else 1
        if not 1 <= steps <= agent.limits.steps_max:
            raise ValueError(f"max_steps {steps}: use 1 to {agent.limits.steps_max} (agents.{name}.limits.steps_max)")
        running = Running(name, context or RequestContext())
        with self._lock:
            if len(self._running) >= RUNS_MAX or self._stopping.is_set():
                raise Busy(f"{len(self._running)} runs of agents are on their way or wait; ask again later")
            self._running[id(running)] = running
        running.future = asyncio.run_coroutine_threadsafe(self._run(agent, request, running, steps), self.loop)
        running.future.add_done_callback(lambda _: self._done(running))
        return running

    def _done(self, running: Running) -> None:
        with self._lock:
            self._running.pop(id(running), None)

    async def _run(self, agent: BaseAgent, request: Any, running: Running, max_steps: int) -> tuple[Message, str]:
        context = running.context
        try:
            if over := beyond(context, agent.limits):
                answer = agent.error(f"agent {agent.name} was not run: {over}")
            elif isinstance(agent, Agent) and type(agent).handle is Agent.handle:
                answer = await agent.auto_run(request, context, max_steps)
            else:
                answer = await agent.invoke(request, context)
        except Exception as error:  # an agent's own code; its failure is an answer too
            log.exception("agent %s failed", agent.name)
            answer = agent.error(f"agent {agent.name} failed: {type(error).__name__}: {error}")
        if answer.role == "error":
            self._store.count("agent_errors")
        return answer, self.recorder.taken(agent.name, context.request_id)

    def feedback(self, run_id: str, feedback: Feedback) -> None:
        """Label the sample of a run; an agent that learns hears of it. Raises BadFeedback, StoreError."""
        run = self._store.runs.get(run_id)
        agent = self._agents.get(run.agent) if run else None
        if isinstance(agent, LearnableAgent) and agent.learning_head is not None:
            agent.learn_from_feedback(feedback, run_id)
        else:
            self.recorder.feedback(run_id, feedback)

    def adapt(self, name: str) -> str:
        """Let an agent ask for a training with what it was told; what came of it. Raises NoAgent, and ValueError for an
        agent that does not learn."""
        agent = self._agents.get(name)
        if agent is None:
            raise NoAgent(f"no agent {name!r} runs here; there are: {', '.join(self._agents) or 'none'}")
        if not isinstance(agent, LearnableAgent):
            raise ValueError(f"agent {name} does not learn: set agents.{name}.factory to a kind that does (learnable)")
        return str(agent.adapt_behavior())

    def status(self) -> dict[str, Any]:
        """What `edged agent list` and `edged status` show."""
        with self._lock:
            at_work = [running.agent for running in self._running.values()]
        return {
            name: {
                "slot": config.slot, **self._answering(config.slot), "factory": config.made_by,
                "running": at_work.count(name),
                "error": self._wrong.get(name), "tools": sorted(agent.tools) if agent else [],
                "allowed_peers": sorted(config.allowed_peers), "callers": sorted(config.callers),
                "input_schema": agent.input_schema if agent else None,
                "output_schema": agent.output_schema if agent else None,
                "description": agent.description if agent else config.instruction,
            }
            for name, config in self._configs.items()
            for agent in (self._agents.get(name),)
        } | {
            name: {
                "device": peer.device, "agent": peer.agent, "running": at_work.count(name), "error": self._wrong.get(name),
                "input_schema": agent.input_schema if agent else None,
                "output_schema": agent.output_schema if agent else None, "description": peer.description,
            }
            for name, peer in self._peers.items()
            for agent in (self._agents.get(name),)
        }  # fmt: skip

    def _answering(self, slot: str) -> dict[str, str]:
        """Which release, with which adapter, answers for the agents of a slot now; "" where nothing does."""
        try:
            release, adapter = self._lessors[slot].running()
        except EngineError:
            release, adapter = "", ""
        return {"release": release, "adapter": adapter}

    def problems(self) -> Iterator[Problem]:
        """Agents that could not be made."""
        for name, why in self._wrong.items():
            yield Problem(
                f"agent {name}", f"it does not run: {why}", "mend it (`edged check` says the same), restart edged"
            )

    def accepts(self, name: str, caller: str) -> str:
        """Why the agent may not be asked by the device `caller`; "" when it may."""
        config = self._configs.get(name)
        if config is None or name not in self._agents:
            return f"no agent {name!r} runs here"  # nobody elsewhere needs to know which do
        if caller not in config.callers:
            return f"agent {name} does not answer {caller}: agents.{name}.callers does not name it"
        return ""


async def _close(agent: BaseAgent) -> None:
    """Let an agent give back what it holds: its `aclose()` or `close()`, where it has one."""
    close = getattr(agent, "aclose", None) or getattr(agent, "close", None)
    if not callable(close):
        return
    try:
        if inspect.iscoroutinefunction(close):  # what it holds may belong to this loop
            await close()
        else:
            await Apart(f"close {agent.name}").result(lambda wait: close(), CLOSE_S_MAX)
    except Exception:  # an agent's own code
        log.exception("agent %s was not closed", agent.name)
