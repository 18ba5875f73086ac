"""Agents of other devices: asked over MQTT, and answered.

Whom a request is for and who asks are levels of its topic, which the broker lets nobody else write; schemas are held against
it on both sides. Law: a request is acknowledged after its answer is in the outbox, so a crash brings it again and it is
answered once; an answer that comes when nobody waits any more is counted and dropped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import ValidationError

from edged.agents.base import BaseAgent, RunLimits
from edged.agents.hosted import Busy, Hosted, NoAgent, Running
from edged.agents.messages import Calls, Message, RequestContext
from edged.agents.models import Hear, Said
from edged.agents.schemas import faults
from edged.clock import Clock
from edged.config_agents import Peer, form
from edged.engines.base import EngineError, GenerateRequest
from edged.link import Inbound, Link
from edged.outgoing import Outgoing
from edged.store import OutboxFull, OutboxMessage, StorageFull, Store, StoreError
from edged.wire import topics
from edged.wire.ids import derived
from edged.wire.invoked import DEPTH_MAX, INTERACTIONS_MAX, WITHIN_S_MAX, Invocation, Invoked

log = logging.getLogger(__name__)

IN_HAND_MAX = 8  # requests of other devices that are not answered yet
CLOCKS_APART_S_MAX = 60.0  # of two devices; a request older than its time by more is late by any clock
ERROR_CHARS_MAX = 4000
TASKS_MAX = 256  # whose calls are counted together, also when a device asks more than once


class Courier(Protocol):
    """Brings a request to an agent of another device, and its answer back."""

    async def ask(self, peer: Peer, request: Any, context: RequestContext) -> Message:
        """The response, or a message of role `error`."""
        ...


class _Elsewhere:
    """The model of an agent of another device is none of this one's."""

    def say(self, request: GenerateRequest, hear: Hear | None = None) -> Said:
        raise EngineError("an agent of another device has its model there")


class RemoteAgent(BaseAgent):
    """An agent of another device, under its name here. What is refused here never travels."""

    recorded_by_invoke = False  # its runs are kept where it runs

    def __init__(self, name: str, peer: Peer, courier: Courier) -> None:
        """Raises BadSchema, NameTaken."""
        super().__init__(
            _Elsewhere(), peer.description, agent_name=name, input_schema=form(peer.input_schema),
            output_schema=form(peer.output_schema), limits=RunLimits(seconds_max=2 * WITHIN_S_MAX),
        )  # fmt: skip
        # Its time is the peer's `deadline_s`, which the courier keeps.
        self._peer, self._courier = peer, courier

    async def handle(self, request: Any, request_context: RequestContext) -> Message:
        said = await self._courier.ask(self._peer, request, request_context)
        if said.role == "error":
            return self.error(said.text)
        if why := faults(said.content, self.output_schema):
            return self.error(f"Response validation failed: the answer of {self._where} is wrong: {why}")
        return Message("assistant", said.content, name=self.name)

    @property
    def _where(self) -> str:
        return f"agent {self._peer.agent} of device {self._peer.device}"


@dataclass(slots=True)
class _Waiting:
    """A request of ours that is not answered yet; `task` is what it is part of."""

    device: str
    task: str
    answer: asyncio.Future[Invoked]


@dataclass(slots=True)
class _Open:
    """Another device's request being answered; the newest copy of it is the one to acknowledge."""

    message: Inbound
    until: float
    caller: str
    running: Running | None = None
    cancelled: bool = False  # by who asked


class Mail:
    """Requests to other devices' agents, and theirs to ours. `on_invoke` and `on_invoked` on the control loop, `ask` on the
    agents' loop."""

    def __init__(
        self, hosted: Hosted, store: Store, link: Link, outgoing: Outgoing, clock: Clock, wake: Callable[[], None]
    ) -> None:
        """`wake`: there is something new in the outbox."""
        self._hosted, self._store, self._link, self._outgoing = hosted, store, link, outgoing
        self._clock, self._wake = clock, wake
        self._waiting: dict[str, _Waiting] = {}  # by the request's id
        self._open: dict[str, _Open] = {}
        self._calls: dict[str, Calls] = {}  # by the task, the newest last
        self._lock = threading.Lock()  # the agents' loop takes out of `_open` what the control loop puts in

    def _own(self, name: str) -> str:
        return name if "/" in name else f"{self._outgoing.device}/{name}"

    # Ours to others.

    async def ask(self, peer: Peer, request: Any, context: RequestContext) -> Message:
        """As Courier."""
        where, now = f"agent {peer.agent} of device {peer.device}", time.monotonic()
        within_s = min(peer.deadline_s, WITHIN_S_MAX, (context.deadline or now + peer.deadline_s) - now)
        if within_s <= 0:
            return Message("error", f"{where} was not asked: the task's time is over")
        try:
            invocation = Invocation(
                **self._outgoing.stamp(), request=request, within_s=within_s, task=context.request_id,
                depth=min(context.depth, DEPTH_MAX), interactions=min(context.calls.made, INTERACTIONS_MAX),
                path=[self._own(name) for name in context.path],
            )  # fmt: skip
        except ValidationError as error:
            return Message("error", f"{where} was not asked: {error.errors(include_url=False)[0]['msg']}")
        address = topics.INVOKE(
            site=self._outgoing.site, dev=peer.device, agent=peer.agent, caller=self._outgoing.device
        ).expiring(within_s)
        self._count_of(context.request_id, context.calls)
        waiting = _Waiting(peer.device, context.request_id, asyncio.get_running_loop().create_future())
        self._waiting[invocation.id] = waiting
        try:
            await asyncio.to_thread(self._enqueue, self._outgoing.message(address, invocation))
            said = await asyncio.wait_for(waiting.answer, now + within_s - time.monotonic())
        except (OutboxFull, StorageFull) as error:
            return Message("error", f"{where} was not asked: {error}")
        except (asyncio.CancelledError, TimeoutError) as error:
            await asyncio.to_thread(self._cancel, address, invocation)
            late = isinstance(error, TimeoutError)
            if late or time.monotonic() - now >= within_s:
                self._store.count("invocations_unanswered")
            if not late:
                raise
            return Message(
                "error", f"{where} did not answer within {within_s:.1f} s; is it online, and its edged running?"
            )
        finally:
            self._waiting.pop(invocation.id, None)
        if said.error is not None:
            return Message("error", f"{where}: {said.error}")
        return Message("assistant", said.response)

    def _cancel(self, address: topics.Address, invocation: Invocation) -> None:
        """Nobody waits any more. What cannot be kept is left: the other one ends at its deadline."""
        update = self._outgoing.stamp() | {"request": None, "cancels": invocation.id}
        try:
            self._enqueue(self._outgoing.message(address, invocation.model_copy(update=update)))
        except StoreError as error:
            log.warning("%s is not told that it is cancelled: %s", address.topic, error)

    def _enqueue(self, message: OutboxMessage) -> None:
        self._store.enqueue(message, self._clock.now())
        self._wake()

    def on_invoked(self, message: Inbound, fields: dict[str, str], said: Invoked) -> None:
        """`down/invoked/{by}/{id}`: the answer to a request of ours."""
        self._link.acknowledge(message)
        waiting = self._waiting.get(said.invocation)
        if waiting is None or waiting.device != fields["by"]:  # nobody waits any more, or it was never asked
            self._store.count("invocations_late" if waiting is None else "invocations_foreign")
            return

        def tell() -> None:
            if not waiting.answer.done():
                waiting.answer.set_result(said)

        self._hosted.loop.call_soon_threadsafe(tell)

    # Others' to ours.

    def on_invoke(self, message: Inbound, fields: dict[str, str], asked: Invocation) -> None:
        """`down/invoke/{agent}/{caller}`: another device's agent asks one of ours."""
        if asked.cancels is not None:
            self._on_cancel(message, fields["caller"], asked.cancels)
            return
        with self._lock:
            if asked.id in self._open:  # it came again with a new connection
                self._open[asked.id].message = message
                return
            full = len(self._open) >= IN_HAND_MAX
        if self._store.seen(asked.id, self._clock.now(), record=False):
            self._store.count("invocations_repeated")
            self._link.acknowledge(message)
            return
        if self._clock.now() - asked.ts > asked.within_s + CLOCKS_APART_S_MAX:
            self._store.count("invocations_expired")
            self._link.acknowledge(message)
            return
        caller, name = fields["caller"], fields["agent"]
        refused = self._hosted.accepts(name, caller)
        if not refused and full:
            refused = f"busy: {IN_HAND_MAX} requests of other devices wait already; ask again later"
        until = time.monotonic() + asked.within_s
        if not refused:
            own = self._open[asked.id] = _Open(message, until, caller)
            try:
                running = own.running = self._hosted.submit(name, asked.request, self._context(asked, caller, until))
            except (NoAgent, Busy) as error:
                del self._open[asked.id]
                refused = str(error)
            else:
                self._store.count("invocations")
                self._hosted.spawn(self._answer(asked, caller, running))
                return
        self._store.count("invocations_refused")
        self._enqueue(self._invoked(asked, caller, asked.within_s, error=refused))
        self._store.seen(asked.id, self._clock.now())
        self._link.acknowledge(message)

    def _on_cancel(self, message: Inbound, caller: str, cancelled: str) -> None:
        """Whoever asked, and nobody else, ends his request."""
        with self._lock:
            found = self._open.get(cancelled)
            if found is not None and found.caller == caller and found.running is not None:
                found.cancelled = True
                found.running.cancel()
                self._store.count("invocations_cancelled")
        self._link.acknowledge(message)

    def _context(self, asked: Invocation, caller: str, until: float) -> RequestContext:
        """Whose work the request is. Only one that really came out of this device can wait for itself here."""
        home, path = f"{self._outgoing.device}/", tuple(asked.path)
        if any(waiting.task == asked.task for waiting in list(self._waiting.values())):
            path = tuple(name.removeprefix(home) for name in path)
        return RequestContext(
            request_id=asked.task, interaction_count=asked.interactions, depth=asked.depth,
            caller_agent_name=path[-1] if path else caller, path=path, deadline=until,
            calls=self._count_of(asked.task, Calls()),
        )  # fmt: skip

    def _count_of(self, task: str, calls: Calls) -> Calls:
        """The one count of a task's calls on this device, which is `calls` for a task that is new: also of a task that went
        out of here and comes back, and of all requests of another device's."""
        with self._lock:
            known = self._calls.pop(task, calls)
            self._calls[task] = known
            while len(self._calls) > TASKS_MAX:
                del self._calls[next(iter(self._calls))]
        return known

    async def _answer(self, asked: Invocation, caller: str, running: Running) -> None:
        try:
            message, run = await asyncio.wrap_future(running.future)
        except asyncio.CancelledError:
            with self._lock:
                found = self._open.pop(asked.id)
            if found.cancelled:
                await asyncio.to_thread(self._store.seen, asked.id, self._clock.now())
                self._link.acknowledge(found.message)
            return  # else the daemon ends: not acknowledged, so it comes again
        try:
            await asyncio.to_thread(self._settle, asked, caller, message, run)
        except StoreError as error:  # not acknowledged: it comes again with the next connection, and is asked again
            self._store.count("store_errors")
            log.error("the answer to %s: %s", caller, error)
            with self._lock:
                self._open.pop(asked.id, None)

    def _settle(self, asked: Invocation, caller: str, message: Message, run: str) -> None:
        left_s = self._open[asked.id].until - time.monotonic()
        if left_s <= 0:
            self._store.count("invocations_expired")
        else:
            said = (
                {"error": message.text[:ERROR_CHARS_MAX]} if message.role == "error" else {"response": message.content}
            )
            self._enqueue(self._invoked(asked, caller, left_s, run=run, **said))
        self._store.seen(asked.id, self._clock.now())
        with self._lock:
            newest = self._open.pop(asked.id).message
        self._link.acknowledge(newest)

    def _invoked(self, asked: Invocation, caller: str, left_s: float, **said: Any) -> OutboxMessage:
        """The answer, under an id that follows from the request's: said again, it is the same to a receiver."""
        stamp = self._outgoing.stamp() | {"id": derived(asked.id, "invoked")}
        try:
            body = Invoked(**stamp, invocation=asked.id, **said)
        except ValidationError as error:
            why = f"the response cannot be sent: {error.errors(include_url=False)[0]['msg']}"
            body = Invoked(**stamp, invocation=asked.id, error=why)
        address = topics.INVOKED(site=self._outgoing.site, dev=caller, by=self._outgoing.device, id=asked.id)
        return self._outgoing.message(address.expiring(left_s), body)
