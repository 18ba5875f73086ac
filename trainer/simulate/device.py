"""One simulated device: what it says and hears, in the messages of `edged.wire`.

Law of this file: what is to be said waits here until the connection takes it, and counts as a report when the broker has
answered for it; what arrived is acknowledged when it was taken in.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from edged.link import Connected, Inbound, LinkEvent, Published
from edged.wire import messages, topics
from edged.wire.ids import uuid7
from edged.wire.measured import Machine, latency_quantile
from edged.wire.messages import Message, Metrics, Reported, State
from edged.wire.topics import Address, Route
from trainer.core import simulated
from trainer.simulate.link import LoopLink
from trainer.simulate.plan import PIPELINE, PROFILE, SESSION_S, TIER, Plan
from trainer.simulate.questions import Questions
from trainer.simulate.slot import Slot
from trainer.simulate.tally import REPORTS, Tally

WAITING_MAX = 1000  # reports that wait for the connection or the trainer; what is older goes
URGENT = frozenset({topics.STATE, topics.REPORTED, topics.ESCALATION, topics.COMMAND_STATE})


@dataclass(slots=True)
class _Said:
    route: Route
    address: Address
    message: Message
    correlation: bytes | None = None


class Device:
    """A device with one model and one pipeline. Everything on the loop of `start`."""

    def __init__(self, plan: Plan, number: int, tally: Tally, pool: ThreadPoolExecutor) -> None:
        self.name, self._plan, self._tally = plan.name(number), plan, tally
        self._nature = plan.nature()
        self._rng = np.random.default_rng([plan.seed, number])
        self._boot = self._new_id()
        self._seq = self._rev = 0
        self._policy: dict[str, Any] = {}
        self._trainers: dict[str, messages.HostState] = {}
        self._waiting: deque[_Said] = deque()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._window_start = 0.0
        self._own = {"site": plan.site, "dev": self.name}
        self._slot = Slot(
            plan, self.name, self._stamp, self._rng.random, pool, tally.count, tally.moved, self._report, self._event
        )
        tally.updates[self._slot.state.value] += 1
        self._questions = Questions(plan, self.name, self._rng, self._new_id, self._stamp, tally.count, self._say)
        will = State(**self._stamp(), state="offline", device=self.name)
        listens = [
            topics.DESIRED.filter(**self._own), topics.VERDICT.filter(**self._own), topics.COMMAND.filter(**self._own),
            topics.HOST.filter(), topics.RESPONDER.filter(tier=TIER),
        ]  # fmt: skip
        self._link = LoopLink(
            plan.link(self.name, session_s=SESSION_S), listens, self._take, pool, self._rng.random,
            will=(topics.STATE(**self._own), messages.encode(will)), will_delay_s=plan.will_delay_s,
        )  # fmt: skip

    def start(self) -> None:
        """Connect, and live."""
        self._window_start = time.time()
        self._link.start()
        self._after("window", self._plan.window_s * float(self._rng.random()), self._window)
        if self._plan.lost_per_hour:
            self._after("lose", self._next_loss_s(), self._lose)

    def leave(self) -> None:
        """Say what is said at the end, as the plan has it; `settled` tells when that is out."""
        for timer in self._timers.values():
            timer.cancel()
        self._slot.stop()
        self._waiting.clear()
        if self._plan.end == "will":
            return
        self._say(topics.STATE, State(**self._stamp(), state="offline", device=self.name))
        if self._plan.end == "clear":
            for route in (topics.STATE, topics.REPORTED):
                self._link.publish(route(**self._own), b"")

    @property
    def online(self) -> bool:
        """Whether it is connected now."""
        return self._link.connected

    def settled(self) -> bool:
        """Whether the broker has all that was said, or cannot be asked."""
        return not self._link.connected or (not self._waiting and self._link.unanswered() == 0)

    def close(self) -> None:
        """End the connection: in order, or (`end` is `will`) as a failing network does."""
        if self._plan.end == "will":
            self._link.cut(3600.0)
        self._link.stop()

    # What it says.

    def _new_id(self) -> str:
        return uuid7(int(time.time() * 1000), self._rng.bytes(10))

    def _stamp(self) -> dict[str, Any]:
        self._seq += 1
        return {"id": self._new_id(), "ts": time.time(), "boot": self._boot, "seq": self._seq}

    def _say(self, route: Route, message: Message, correlation: bytes | None = None, **fields: str) -> None:
        address = route(**self._own, **fields)
        if len(self._waiting) >= WAITING_MAX:
            self._waiting.popleft()
            self._tally.count("overflowed")
        self._waiting.append(_Said(route, address, message, correlation))
        self._pump()

    def _pump(self) -> None:
        """Hand over what may go now. What is not urgent waits while a trainer that was here is away."""
        held: list[_Said] = []
        while self._waiting and self._link.room():
            said = self._waiting.popleft()
            if said.route not in URGENT and self._trainer_away():
                held.append(said)
                continue
            ref = (REPORTS.get(said.route), said.message.id)
            if not self._link.publish(said.address, messages.encode(said.message), ref, correlation=said.correlation):
                self._waiting.appendleft(said)
                break
        self._waiting.extendleft(reversed(held))

    def _trainer_away(self) -> bool:
        return bool(self._trainers) and all(each.state == "offline" for each in self._trainers.values())

    def _birth(self) -> None:
        born = State(
            **self._stamp(), state="online", device=self.name, profile=PROFILE, tier="device",
            models={self._plan.model: self._slot.active}, capabilities=[PIPELINE], labels={"simulated": "yes"},
        )  # fmt: skip
        self._say(topics.STATE, born)
        self._report()

    def _report(self) -> None:
        reported = Reported(
            **self._stamp(), desired_rev=self._rev, models={self._plan.model: self._slot.report()},
            bad=self._slot.bad(),
        )  # fmt: skip
        self._say(topics.REPORTED, reported)

    def _event(self, kind: str, text: str, **detail: Any) -> None:
        self._say(topics.EVENT, messages.Event(**self._stamp(), kind=kind, text=text, detail=detail))

    def _window(self) -> None:
        """Close a window: its counts, and the questions and samples that it brought."""
        release, start, end = self._slot.active, self._window_start, time.time()
        chance = simulated.accuracy(self._nature, self.name, release)
        share = float(self._policy.get(PIPELINE, {}).get("audit_share", self._plan.audit_share))
        counted = simulated.window(self._nature, chance, share, self._rng)
        metrics = Metrics(
            **self._stamp(), start=start, end=end, pipeline=PIPELINE, release=release, items=self._plan.items,
            accepted=counted.accepted, audited=counted.audited, escalated=counted.escalated,
            reasons={"unsure": counted.escalated} if counted.escalated else {},
            confidence_histogram=counted.confidence, latency_histogram=counted.latency,
            latency_ms_p50=latency_quantile(counted.latency, 0.5), latency_ms_p95=latency_quantile(counted.latency, 0.95),
            machine=Machine(
                memory_mib_max=200 + 5 * float(self._rng.random()), temperature_c_max=50 + 3 * float(self._rng.random())
            ),
        )  # fmt: skip
        self._say(topics.METRICS, metrics)
        for _ in range(counted.audited):
            self._questions.ask("audit", release, chance, share)
        for _ in range(counted.escalated):
            self._questions.ask("escalate", release, chance * simulated.UNSURE_RIGHT, 1.0)
        self._questions.again()
        self._window_start = end
        self._after("window", self._plan.window_s, self._window)

    # What it hears.

    def _take(self, event: LinkEvent) -> None:
        if isinstance(event, Published):
            kind, identifier = event.ref
            if event.error:
                self._tally.count("refused")
            elif kind is not None:
                self._tally.taken(kind, identifier)
            self._pump()
        elif isinstance(event, Inbound):
            self._hear(event)
            self._link.acknowledge(event)
        elif isinstance(event, Connected):
            self._tally.count("connected")
            self._birth()
        elif event.reason:
            self._tally.count("disconnected")

    def _hear(self, inbound: Inbound) -> None:
        if not inbound.payload:
            return
        try:
            _, fields, message = messages.decode(inbound.topic, inbound.payload)
        except messages.InvalidPayload:
            self._tally.count("invalid")
            return
        if isinstance(message, messages.Desired):
            self._desire(message)
        elif isinstance(message, messages.Verdict):
            self._questions.answered(message)
        elif isinstance(message, messages.HostState):
            self._trainers[fields["trainer"]] = message
            self._slot.serves = any(each.state == "online" and each.blocks for each in self._trainers.values())
            self._pump()
        elif isinstance(message, messages.ResponderState):
            self._questions.responder(fields["responder"], message)
        elif "type" in fields:
            self._command(fields["type"], fields["id"], message)

    def _desire(self, desired: messages.Desired) -> None:
        if desired.rev <= self._rev:
            return
        self._rev, self._policy = desired.rev, desired.policy
        self._report()
        self._slot.desire(desired.models.get(self._plan.model))

    def _command(self, kind: str, identifier: str, command: Message) -> None:
        """A listing is sent; of the pixels and files that everything else is about there are none."""
        state: dict[str, Any] = {"state": "done"}
        if isinstance(command, messages.SamplesCommand) and command.action == "list":
            self._questions.listed()
        elif not isinstance(command, messages.SamplesCommand) or command.action == "claim":
            state = {"state": "failed", "reason": "a simulated device keeps no pixels and no files"}
        said = messages.CommandState(**self._stamp(), command=identifier, **state)
        self._say(topics.COMMAND_STATE, said, type=kind, id=identifier)

    # What happens to it.

    def _next_loss_s(self) -> float:
        return float(self._rng.exponential(3600.0 / self._plan.lost_per_hour))

    def _lose(self) -> None:
        self._tally.count("lost_connections")
        self._link.cut(self._plan.lost_s * (0.5 + float(self._rng.random())))
        self._after("lose", self._next_loss_s(), self._lose)

    def _after(self, name: str, seconds: float, act: Any) -> None:
        self._timers[name] = asyncio.get_running_loop().call_later(seconds, act)
