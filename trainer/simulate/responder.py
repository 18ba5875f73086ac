"""A simulated responder: answers the questions of simulated devices with what their pictures show."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import numpy as np

from edged.core.tiers import ALIVE_BEATS
from edged.link import Connected, Inbound, LinkEvent, Published
from edged.wire import messages, topics
from edged.wire.ids import uuid7
from edged.wire.messages import Box, Provenance, Verdict
from edged.wire.topics import Address
from trainer.core import simulated
from trainer.simulate.link import LoopLink
from trainer.simulate.plan import TASK, TIER, Plan
from trainer.simulate.questions import BOX
from trainer.simulate.tally import Tally

BEAT_S = 120.0  # every device hears each beat
RELEASE = "simulated-teacher@1.0"
CONFIDENCE = 0.95
WAITING_MAX = 4096


class Responder:
    """One of several that share the questions of their tier. Everything on the loop of `start`."""

    def __init__(self, plan: Plan, number: int, tally: Tally, pool: ThreadPoolExecutor) -> None:
        self.name, self._plan, self._tally = plan.responder(number), plan, tally
        self._rng = np.random.default_rng([plan.seed, 1 << 20, number])
        self._boot, self._seq = self._new_id(), 0
        self._classes = tuple(plan.classes)
        self._waiting: deque[tuple[Address, bytes, Inbound | None]] = deque()
        self._beat: asyncio.TimerHandle | None = None
        self._address = topics.RESPONDER(tier=TIER, task=TASK, responder=self.name)
        share = topics.ESCALATION.shared(f"{TIER}-{TASK}", site=plan.site, tier=TIER, task=TASK)
        self._link = LoopLink(
            plan.link(self.name), [share], self._take, pool, self._rng.random,
            will=(self._address, messages.encode(self._presence("offline"))), will_delay_s=0,
        )  # fmt: skip

    def start(self) -> None:
        """Connect, and answer."""
        self._link.start()

    def leave(self) -> None:
        """Say that it goes."""
        if self._beat is not None:
            self._beat.cancel()
        self._waiting.clear()
        self._send(self._address, messages.encode(self._presence("offline")))

    def settled(self) -> bool:
        """Whether that is out."""
        return not self._link.connected or (not self._waiting and self._link.unanswered() == 0)

    def close(self) -> None:
        """End the connection."""
        self._link.stop()

    def _new_id(self) -> str:
        return uuid7(int(time.time() * 1000), self._rng.bytes(10))

    def _stamp(self) -> dict[str, Any]:
        self._seq += 1
        return {"id": self._new_id(), "ts": time.time(), "boot": self._boot, "seq": self._seq}

    def _presence(self, state: str) -> messages.ResponderState:
        return messages.ResponderState(
            **self._stamp(), state=state, release=RELEASE, device=self.name, every_s=BEAT_S  # type: ignore[arg-type]
        )  # fmt: skip

    def _here(self) -> None:
        address = self._address.expiring(math.ceil(ALIVE_BEATS * BEAT_S))
        self._send(address, messages.encode(self._presence("online")))
        self._beat = asyncio.get_running_loop().call_later(BEAT_S, self._here)

    def _take(self, event: LinkEvent) -> None:
        if isinstance(event, Inbound):
            self._answer(event)
        elif isinstance(event, Connected):
            if self._beat is not None:
                self._beat.cancel()
            self._waiting.clear()  # what was not acknowledged comes again
            self._here()
        elif isinstance(event, Published):
            self._pump()

    def _answer(self, inbound: Inbound) -> None:
        """Acknowledged when the answer is out; what is no question at once."""
        try:
            _, fields, asked = messages.decode(inbound.topic, inbound.payload)
            assert isinstance(asked, messages.Escalation)
            content = base64.b64decode(asked.image or "", validate=True)
        except (messages.InvalidPayload, binascii.Error):
            self._tally.count("invalid")
            self._link.acknowledge(inbound)
            return
        label: list[Box] = []
        whole = sha256(content).hexdigest() == asked.sha256
        if whole:
            label = [Box(label=simulated.truth(content, self._classes), box=BOX)]
        verdict = Verdict(
            **self._stamp(), sample=asked.sample, status="labelled" if whole else "rejected", label=label,
            confidence=CONFIDENCE if whole else 0.0,
            provenance=Provenance(kind="model", who=self.name, release=RELEASE),
            reason="" if whole else "the picture does not have the hash that the question names",
        )  # fmt: skip
        self._tally.count("answered")
        address = topics.VERDICT(site=fields["site"], dev=fields["dev"])
        self._send(address, messages.encode(verdict), inbound)

    def _send(self, address: Address, payload: bytes, inbound: Inbound | None = None) -> None:
        if len(self._waiting) < WAITING_MAX:  # a question beyond that is asked again
            self._waiting.append((address, payload, inbound))
        self._pump()

    def _pump(self) -> None:
        while self._waiting and self._link.room():
            address, payload, inbound = self._waiting.popleft()
            if not self._link.publish(address, payload, "verdict"):
                self._waiting.appendleft((address, payload, inbound))
                return
            if inbound is not None:
                self._link.acknowledge(inbound)
