"""Requests to the pipelines, and who still waits for an answer.

Law: a question is acknowledged after its answer is in the outbox. A crash before that brings the question again.
"""

from __future__ import annotations

import base64
import binascii
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edged.clock import Clock
from edged.core.breaker import State
from edged.link import Inbound, Link
from edged.outgoing import GENERATE, Outgoing, moved, text_of
from edged.pipeline import Pipeline
from edged.prompts import asked_for
from edged.sources import Item, Waiting
from edged.store import OutboxMessage, Store
from edged.wire import messages, topics

log = logging.getLogger(__name__)

CONTENTS = ("image", "generation_prompt", "messages")  # of which a request has one
LANGUAGE = ("tokens_max", "temperature", "seed", "stop", "answer_schema", "deadline_s", "stream")


class Patience:
    """Whether the answer to a language request is still wanted; asked by the engine while it works."""

    def __init__(self, clock: Clock, deadline_s: float | None) -> None:
        self._clock = clock
        self._until = None if deadline_s is None else clock.monotonic() + deadline_s
        self.cancelled = False

    def __call__(self) -> str:
        """Empty, or why the answer shall end."""
        if self.cancelled:
            return "cancelled"
        return "deadline" if self._until is not None and self._clock.monotonic() >= self._until else ""


@dataclass(slots=True)
class _Open:
    """A request being answered; the newest copy of it is the one to acknowledge."""

    message: Inbound
    patience: Patience | None  # of a language request


class Questions:
    """Makes items of questions, and replies of verdicts. All calls on the control loop; `settle` comes from workers."""

    def __init__(
        self, store: Store, link: Link, outgoing: Outgoing, clock: Clock, pipelines: dict[str, Pipeline],
        enqueue: Callable[[OutboxMessage], None], wake: Callable[[], None], full: Callable[[], bool],
        expects: Callable[[str], bool],
    ) -> None:  # fmt: skip
        """`full`: so many questions are not acknowledged that desired state could be stuck behind them; `expects`: whether
        a slot has a model, or one on its way."""
        self._store, self._link, self._outgoing, self._clock = store, link, outgoing, clock
        self._pipelines = pipelines
        self._enqueue, self._wake, self._full, self._expects = enqueue, wake, full, expects
        self._waiting: dict[str, Waiting] = {}  # sample -> who waits for its verdict
        self._open: dict[str, _Open] = {}  # requests being answered, so that a repetition is not answered twice
        self._lock = threading.Lock()  # workers take out what the control loop puts in

    def in_hand(self) -> int:
        """How many requests are not acknowledged."""
        return len(self._open)

    # Who waits.

    def wait(self, sample: str, waiting: Waiting) -> None:
        """Answer with the verdict on `sample`, or locally when it is late."""
        self._waiting[sample] = waiting
        known = self._store.sample(sample)  # the verdict may have been faster, or came before a restart
        if known is None or known.state == "escalated":
            return
        decided: dict[str, Any] = {}
        if known.provenance and known.state not in {"unresolved", "rejected"}:
            label = messages.label_of(known.label)
            decided = _decided(label, known.label_confidence, messages.Provenance(**known.provenance))
        self._answer(sample, decided)

    def decided(self, verdict: messages.Verdict, pipeline: str) -> None:
        """A verdict on a sample of `pipeline` was stored: whoever waits for it gets it."""
        if pipeline in self._pipelines and verdict.provenance.kind == "model":  # a person says nothing of the tiers
            self._on_breaker(pipeline, self._pipelines[pipeline].answers.answered(verdict.sample))
        decided: dict[str, Any] = {}
        if verdict.status == "labelled":
            decided = _decided(verdict.label, verdict.confidence, verdict.provenance)
        self._answer(verdict.sample, decided)

    def tick(self) -> None:
        """Who waited long enough gets the local answer; where nobody answers, nobody is kept waiting from then on."""
        now = self._clock.monotonic()
        for name, pipeline in self._pipelines.items():
            self._on_breaker(name, pipeline.answers.tick(now))
        for sample in [sample for sample, w in self._waiting.items() if w.answer_by <= now or w.wanted()]:
            self._answer(sample, {})

    def _on_breaker(self, pipeline: str, state: State | None) -> None:
        """Whether the questions of a pipeline are answered has changed (None: it has not)."""
        if state is State.OPEN:
            self._store.count("breaker_opened")
            text = f"{pipeline}: nobody answers its questions: whoever asks gets the local answer at once"
        elif state is State.CLOSED:
            text = f"{pipeline}: its questions are answered again"
        else:
            return
        log.warning("%s", text)
        self._enqueue(self._outgoing.event(f"breaker_{state}", text, pipeline=pipeline))

    def _answer(self, sample: str, decided: dict[str, Any]) -> None:
        waiting = self._waiting.pop(sample, None)
        if waiting is None:
            return
        if decided.get("prediction"):
            decided["prediction"] = moved(decided["prediction"], waiting.corner)
        self._enqueue(self._outgoing.reply(waiting.request, **{**waiting.reply, **decided}))
        waiting.settle("")

    # Requests.

    def on_infer(self, message: Inbound, fields: dict[str, str], request: messages.InferRequest) -> None:
        """`down/infer/{pipeline}`."""
        with self._lock:
            if request.id in self._open:
                self._open[request.id].message = message
                return
        name = fields["pipeline"]
        patience = None if request.image is not None else Patience(self._clock, request.deadline_s)
        item, error = self._item(name, request, patience)
        if self._store.seen(request.id, self._clock.now(), record=False):
            self._link.acknowledge(message)
            return
        if item is not None:
            pipeline = self._pipelines[name]
            # After a start requests come before the model does: they wait for it in the queue.
            if pipeline.slot.live is None and not self._expects(pipeline.slot.name):
                error = f"{name}: no model is loaded yet in slot {pipeline.slot.name}"
            else:
                self._open[request.id] = _Open(message, patience)
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

    def on_cancel(self, message: Inbound, fields: dict[str, str], command: messages.CancelCommand) -> None:
        """`down/cmd/cancel`: whoever has the request in hand ends it, now or when its turn comes. Not remembered across a
        restart, where the request comes again."""
        with self._lock:
            found = self._open.get(command.request)
        if found is not None and found.patience is not None:
            found.patience.cancelled = True
            text = "it ends, and is answered with the error `cancelled` unless its answer was just made"
        elif found is not None:
            text = "a request with an image is not cancelled: its answer is on its way"
        else:
            text = "no such request is open here: it was answered, or never came"
        detail = {"request": command.request, "open": found is not None, "text": text}
        self._enqueue(self._outgoing.command_state("cancel", fields["id"], "done", "", detail))
        self._link.acknowledge(message)

    def _item(self, name: str, request: messages.InferRequest, patience: Patience | None) -> tuple[Item | None, str]:
        """The request as an item of its pipeline, or why it is none."""
        pipeline = self._pipelines.get(name)
        if pipeline is None or pipeline.config.source.type != "mqtt":
            known = [n for n, p in self._pipelines.items() if p.config.source.type == "mqtt"]
            return None, f"pipeline {name!r} takes no requests here; those that do: {', '.join(known) or 'none'}"

        given = [content for content in CONTENTS if getattr(request, content) is not None]
        if not given:
            return None, "the request has neither `image` (base64) nor `generation_prompt` nor `messages`"
        if len(given) > 1:
            return None, f"the request has `{'` and `'.join(given)}`: send one of them"

        def settle(_reason: str) -> None:
            self._store.seen(request.id, self._clock.now())
            with self._lock:
                newest = self._open.pop(request.id).message
            self._link.acknowledge(newest)
            self._wake()

        common: dict[str, Any] = {"id": request.id, "name": request.id, "captured": self._clock.now(),
                                  "request": request.id, "settle": settle}  # fmt: skip
        # Its questions go to the responders of its task: they would find the wrong kind of item.
        if pipeline.config.escalate_to and (pipeline.config.task == GENERATE) != (patience is not None):
            wants = "`generation_prompt` or `messages`" if patience is None else "an `image`"
            return None, f"pipeline {name!r} has task {pipeline.config.task!r}: send {wants}"
        if patience is not None:
            return Item(**common, prompt=asked_for(request, patience), stream=request.stream), ""
        useless = [key for key in LANGUAGE if getattr(request, key) != type(request).model_fields[key].default]
        if useless:
            return None, f"`{useless[0]}` is for language: a request with an `image` has no use for it"
        try:
            image = base64.b64decode(request.image or "", validate=True)
        except binascii.Error as error:
            return None, f"image: not base64: {error}"
        if not image:
            return None, "image: empty; send the bytes of a picture in base64"
        return Item(**common, image=image), ""


def _decided(label: messages.Label, confidence: float, by: messages.Provenance) -> dict[str, Any]:
    """The fields of a reply that somebody else's answer changes."""
    said: dict[str, Any] = {"confidence": confidence, "release": by.release, "decided_by": by.who}
    text = text_of(label)
    if text is None:
        return {**said, "prediction": label}
    # How the local model ended, with which adapter, and its doubts are nothing that this answer has.
    own = dict.fromkeys(("adapter", "doubt", "finish_reason", "prompt_tokens", "answer_tokens"))
    return {**said, **own, "generated_response": text}
