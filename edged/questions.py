"""Questions that come over MQTT: requests to a pipeline, other devices' escalations, and who still waits for an answer.

Law: a question is acknowledged after its answer is in the outbox. A crash before that brings the question again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import threading
from collections.abc import Callable
from typing import Any

from edged.clock import Clock
from edged.engines.base import GenerateRequest
from edged.link import RECEIVE_MAX, Inbound, Link
from edged.outgoing import Outgoing
from edged.pipeline import Pipeline
from edged.sources import Asked, Item, Waiting
from edged.store import OutboxMessage, Store
from edged.wire import messages, topics

# Questions are acknowledged when they are answered, so those that wait fill the window in which the broker may send: the
# other half of it stays free for desired state, verdicts and commands.
OPEN_MAX = RECEIVE_MAX // 2


class Questions:
    """Makes items of questions, and replies of verdicts. All calls on the control loop; `settle` comes from workers."""

    def __init__(
        self, store: Store, link: Link, outgoing: Outgoing, clock: Clock, pipelines: dict[str, Pipeline],
        responders: dict[tuple[str, str], Pipeline], enqueue: Callable[[OutboxMessage], None], wake: Callable[[], None],
    ) -> None:  # fmt: skip
        self._store, self._link, self._outgoing, self._clock = store, link, outgoing, clock
        self._pipelines, self._responders = pipelines, responders
        self._enqueue, self._wake = enqueue, wake
        self._waiting: dict[str, Waiting] = {}  # sample -> who waits for its verdict
        # Requests being answered, so that a repetition is not answered twice; the newest copy is the one to acknowledge.
        self._open: dict[str, Inbound] = {}
        self._asked: set[tuple[str, str]] = set()  # (device, sample) that a responder here has in hand
        self._lock = threading.Lock()  # workers take out what the control loop puts in

    # Who waits.

    def wait(self, sample: str, waiting: Waiting) -> None:
        """Answer with the verdict on `sample`, or locally when it is late."""
        self._waiting[sample] = waiting
        known = self._store.sample(sample)  # the verdict may have been faster, or came before a restart
        if known is None or known.state == "escalated":
            return
        decided: dict[str, Any] = {}
        if known.provenance and known.state not in {"unresolved", "rejected"}:
            decided = {"prediction": known.label, "confidence": known.label_confidence,
                       "release": known.provenance["release"], "decided_by": known.provenance["who"]}  # fmt: skip
        self._answer(sample, decided)

    def decided(self, verdict: messages.Verdict) -> None:
        """A verdict was stored: whoever waits for it gets it."""
        decided: dict[str, Any] = {}
        if verdict.status == "labelled":
            decided = {"prediction": verdict.label, "confidence": verdict.confidence,
                       "release": verdict.provenance.release, "decided_by": verdict.provenance.who}  # fmt: skip
        self._answer(verdict.sample, decided)

    def tick(self, now: float) -> None:
        """Who waited long enough gets the local answer."""
        for sample in [sample for sample, waiting in self._waiting.items() if waiting.answer_by <= now]:
            self._answer(sample, {})

    def _answer(self, sample: str, decided: dict[str, Any]) -> None:
        waiting = self._waiting.pop(sample, None)
        if waiting is None:
            return
        self._enqueue(self._outgoing.reply(waiting.request, **{**waiting.reply, **decided}))
        waiting.settle("")

    # Requests.

    def on_infer(self, message: Inbound, fields: dict[str, str], request: messages.InferRequest) -> None:
        """`down/infer/{pipeline}`."""
        with self._lock:
            if request.id in self._open:
                self._open[request.id] = message
                return
        name = fields["pipeline"]
        item, error = self._item(name, request)
        if self._store.seen(request.id, self._clock.now(), record=False):
            self._link.acknowledge(message)
            return
        if item is not None:
            pipeline = self._pipelines[name]
            if pipeline.slot.live is None:
                error = f"{name}: no model is loaded yet in slot {pipeline.slot.name}"
            else:
                self._open[request.id] = message
                if not self._full() and pipeline.offer(item):
                    return
                del self._open[request.id]
                self._store.count("requests_busy")
                error = f"{name}: busy, {len(self._open)} requests wait; ask again later"
        self._store.count("requests_refused")
        self._enqueue(self._outgoing.reply(request.id, error=error, generation_prompt=request.generation_prompt))
        self._link.acknowledge(message)

    def on_invalid(self, message: Inbound, reason: str) -> None:
        """A payload did not validate. Who sent it as a request gets the reason, under his request's id if it can be read,
        else under the pipeline's name."""
        parsed = topics.parse(message.topic)
        if parsed and parsed[0] is topics.INFER:
            request = messages.readable_id(message.payload) or parsed[1]["pipeline"]
            self._enqueue(self._outgoing.reply(request, error=reason))

    def _item(self, name: str, request: messages.InferRequest) -> tuple[Item | None, str]:
        """The request as an item of its pipeline, or why it is none."""
        pipeline = self._pipelines.get(name)
        if pipeline is None or pipeline.config.source.type != "mqtt":
            known = [n for n, p in self._pipelines.items() if p.config.source.type == "mqtt"]
            return None, f"pipeline {name!r} takes no requests here; those that do: {', '.join(known) or 'none'}"

        def settle(_reason: str) -> None:
            self._store.seen(request.id, self._clock.now())
            with self._lock:
                newest = self._open.pop(request.id)
            self._link.acknowledge(newest)
            self._wake()

        common: dict[str, Any] = {"id": request.id, "name": request.id, "captured": self._clock.now(),
                                  "request": request.id, "settle": settle}  # fmt: skip
        if request.generation_prompt is not None:
            return Item(**common, prompt=GenerateRequest(request.generation_prompt, tokens_max=request.tokens_max)), ""
        try:
            image = base64.b64decode(request.image or "", validate=True)
        except binascii.Error as error:
            return None, f"image: not base64: {error}"
        if not image:
            return None, "the request has neither `image` (base64) nor `generation_prompt`"
        return Item(**common, image=image), ""

    # Other devices' escalations.

    def on_escalation(self, message: Inbound, fields: dict[str, str], escalation: messages.Escalation) -> None:
        """`up/esc/{tier}/{task}` of another device, for a responder here."""
        pipeline = self._responders.get((fields["tier"], fields["task"]))
        if pipeline is None or fields["dev"] == self._outgoing.device:
            self._link.acknowledge(message)
            return
        key = (fields["dev"], escalation.sample)
        if key in self._asked:  # its owner lost patience: one answer will do
            self._link.acknowledge(message)
            return
        asked = Asked(fields["site"], fields["dev"], escalation)
        try:
            image = base64.b64decode(escalation.image or "", validate=True)
        except binascii.Error:
            image = b""
        if hashlib.sha256(image).hexdigest() != escalation.sha256:
            self._store.count("escalations_corrupt")
            text = f"image of {len(image)} bytes does not have sha256 {escalation.sha256[:12]}"
            self._enqueue(self._outgoing.verdict(asked, "rejected", [], 0.0, "", text))
            self._link.acknowledge(message)
            return

        def settle(_reason: str) -> None:
            self._asked.discard(key)
            self._link.acknowledge(message)
            self._wake()

        item = Item(escalation.sample, escalation.sample, self._clock.now(), image, asked=asked, settle=settle)
        self._asked.add(key)
        if pipeline.slot.live is None or self._full() or not pipeline.offer(item):
            # Its owner keeps the question until it is answered and will ask again.
            self._asked.discard(key)
            self._store.count("escalations_busy")
            self._link.acknowledge(message)

    def _full(self) -> bool:
        """Whether so many questions wait that desired state could be stuck in the broker behind them."""
        return len(self._open) + len(self._asked) > OPEN_MAX
