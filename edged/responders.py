"""Other devices' questions: answered by a model here, or, where it is unsure, passed on to the next tier.

Law: a question is acknowledged when its answer, or our own question to the next tier, is in the outbox. What was passed on
is remembered in memory only: its owner keeps the question and asks again until he has a verdict, so that whoever dies on
the way loses nothing. Whoever passed a question on answers it himself when the next tier is silent.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edged.clock import Clock
from edged.config import Responder, Settings
from edged.core.tiers import ALIVE_BEATS, Presence, Stay, Tier, Waits, onward, waits
from edged.link import Inbound, Link
from edged.outgoing import GENERATE, Outgoing, had
from edged.pipeline import Pipeline
from edged.prompts import asked_for
from edged.sources import Asked, Item, Unsure
from edged.store import OutboxMessage, Store
from edged.wire import messages, topics
from edged.wire.messages import HOPS_MAX, Opinion
from edged.wire.parts import Prompt

FORWARDS_MAX = 256  # questions that the next tier has; beyond it the own answer must do


@dataclass(slots=True)
class _Forward:
    """A question that the next tier has. Times are of the monotonic clock."""

    asked: Asked
    own: Opinion
    tier: Tier
    speak_at: float  # the own answer is due
    forget_at: float  # a better one is not waited for any longer
    said: int = 0  # how many opinions the last verdict to the one who asked held; 0: he has none yet


def _content(asked: Asked) -> bytes:
    """The bytes that a question is about; empty when it carries none."""
    if asked.task == GENERATE:
        return (asked.escalation.prompt or "").encode()
    try:
        return base64.b64decode(asked.escalation.image or "", validate=True)
    except binascii.Error:
        return b""


def _key(asked: Asked) -> tuple[str, str, str]:
    return asked.tier, asked.device, asked.escalation.sample


class Responders:
    """The responders of this device. All calls on the control loop; `settle` comes from workers."""

    def __init__(
        self, store: Store, link: Link, outgoing: Outgoing, clock: Clock, configs: Mapping[str, Responder],
        pipelines: Mapping[Tier, Pipeline], presence: Presence, enqueue: Callable[[OutboxMessage], None],
        wake: Callable[[], None], full: Callable[[], bool],
    ) -> None:  # fmt: skip
        """`full`: so many questions are not acknowledged that desired state could be stuck behind them."""
        self._store, self._link, self._outgoing, self._clock = store, link, outgoing, clock
        self._configs: dict[Tier, Responder] = {(c.tier, c.task): c for c in configs.values()}
        self._pipelines, self._presence = pipelines, presence
        self._enqueue, self._wake, self._full = enqueue, wake, full
        self._in_hand: set[tuple[str, str, str]] = set()  # (tier, device, sample) that a model here is to answer
        self._forwards: dict[str, _Forward] = {}  # our own question -> what it is about, oldest first

    def configure(self, configs: Mapping[str, Responder]) -> None:
        """These responders answer from now on."""
        self._configs = {(c.tier, c.task): c for c in configs.values()}

    def in_hand(self) -> int:
        """How many questions are not acknowledged."""
        return len(self._in_hand)

    def on_escalation(self, message: Inbound, fields: dict[str, str], escalation: messages.Escalation) -> None:
        """`up/esc/{tier}/{task}`, for a responder here."""
        pipeline = self._pipelines.get((fields["tier"], fields["task"]))
        asked = Asked(
            fields["site"], fields["dev"], fields["tier"], fields["task"], escalation, self._clock.monotonic()
        )
        own_sample = asked.device == self._outgoing.device and not escalation.hops
        # Its own sample is for others of this tier: the question is repeated, and comes to another one then. What is in
        # hand was sent again by an owner who lost patience: one answer will do.
        if pipeline is None or own_sample or self._pending(asked):
            self._link.acknowledge(message)
            return
        if self._outgoing.device in had(asked):
            # Whoever sent it answers himself on this, at once; left to another of this tier it would have to wait for him.
            self._store.count("escalations_looped")
            self._refuse(message, asked, "unresolved", f"came back to where it was: {' > '.join(had(asked))}")
            return
        content = _content(asked)
        if hashlib.sha256(content).hexdigest() != escalation.sha256:
            self._store.count("escalations_corrupt")
            what = "prompt" if asked.task == GENERATE else "image"
            text = f"{what} of {len(content)} bytes does not have sha256 {escalation.sha256[:12]}"
            self._refuse(message, asked, "rejected", text)
            return
        try:
            given = (
                {"prompt": asked_for(Prompt.model_validate_json(content))}
                if asked.task == GENERATE
                else {"image": content}
            )
        except ValueError as error:
            self._store.count("escalations_corrupt")
            self._refuse(message, asked, "rejected", f"its prompt is none: {error}")
            return
        self._take(message, pipeline, asked, given)

    def _take(self, message: Inbound, pipeline: Pipeline, asked: Asked, given: dict[str, Any]) -> None:
        key, sample = _key(asked), asked.escalation.sample

        def settle(_reason: str) -> None:
            self._in_hand.discard(key)
            self._link.acknowledge(message)
            self._wake()

        self._in_hand.add(key)
        # An id of this tier's own: the item's lot decides on audits, and must not be the one that the tier before drew.
        id_here = f"{asked.tier}:{sample}"
        item = Item(id_here, sample, self._clock.now(), asked=asked, settle=settle, **given)
        if pipeline.slot.live is None or self._full() or not pipeline.offer(item):
            # Its owner keeps the question until it is answered and will ask again.
            self._in_hand.discard(key)
            self._store.count("escalations_busy")
            self._link.acknowledge(message)

    def _pending(self, asked: Asked) -> bool:
        """Whether the answer to this question is being made here or is awaited from the next tier."""
        if _key(asked) in self._in_hand:
            return True
        return any(not forward.said and _key(forward.asked) == _key(asked) for forward in self._forwards.values())

    def _refuse(self, message: Inbound, asked: Asked, status: str, reason: str) -> None:
        self._enqueue(self._outgoing.verdict(asked, status, [], 0.0, "", reason))
        self._link.acknowledge(message)

    # The next tier.

    def ask_on(self, unsure: Unsure) -> None:
        """A model here is not sure of its answer: ask the next tier, or say why not."""
        try:
            self._ask_on(unsure)
        finally:  # an error leaves the question with its owner, who asks again
            unsure.settle("")

    def _ask_on(self, unsure: Unsure) -> None:
        asked, now = unsure.asked, self._clock.monotonic()
        config = self._configs[asked.tier, asked.task]
        left = asked.escalation.answer_within_s
        waiting = waits(None if left is None else left - (now - asked.received), config.wait_s)
        step = self._onward(asked, config, now)
        if isinstance(step, Stay):
            self._store.count("escalations_kept")
            self._enqueue(self._outgoing.answer(asked, unsure.own, [unsure.own], f"{unsure.reason}: {step.reason}"))
            return
        self._forward(unsure, (step, asked.task), waiting, now)

    def _onward(self, asked: Asked, config: Responder, now: float) -> str | Stay:
        if not self._make_room():
            return Stay(f"{FORWARDS_MAX} questions wait for the next tier, the most that may")
        but = {*had(asked), self._outgoing.device}
        return onward(
            config.escalate_to, asked.escalation.hops, lambda tier: self._presence.living(tier, asked.task, now, but)
        )

    def _forward(self, unsure: Unsure, tier: Tier, waiting: Waits, now: float) -> None:
        question = self._outgoing.onward(unsure, tier[0], waiting.answer_within, waiting.forget)
        self._enqueue(question)
        # Without its content: that is in the outbox, and nobody here looks at it again.
        without = unsure.asked.escalation.model_copy(update={"image": None, "prompt": None})
        asked = replace(unsure.asked, escalation=without)
        self._forwards[question.id] = _Forward(asked, unsure.own, tier, now + waiting.speak, now + waiting.forget)
        self._store.count("escalations_forwarded")

    def _make_room(self) -> bool:
        """Whether one more question may go on: where too many wait, one whose owner has an answer is forgotten."""
        if len(self._forwards) < FORWARDS_MAX:
            return True
        answered = next((key for key, forward in self._forwards.items() if forward.said), None)
        if answered is None:
            return False
        del self._forwards[answered]
        return True

    def on_verdict(self, verdict: messages.Verdict) -> bool:
        """Take in the next tier's answer to a question that was passed on; false when it is about something else."""
        forward = self._forwards.get(verdict.sample)
        if forward is None:
            return False
        said = verdict.opinions or [_opinion(verdict, forward.tier[0])]
        opinions = [forward.own, *said][: HOPS_MAX + 1]  # no more can be, unless he who says so is wrong
        if verdict.status != "labelled":
            if not forward.said:
                self._answer(
                    forward, opinions, f"tier {forward.tier[0]} has no label: {verdict.reason or verdict.status}"
                )
        elif len(opinions) > forward.said:  # else a repetition, or an answer with less behind it than the last
            self._enqueue(self._outgoing.relayed(forward.asked, verdict, opinions))
            forward.said = len(opinions)
            self._store.count("verdicts_relayed")
        return True

    def tick(self) -> None:
        """Who was promised an answer gets ours where the next tier is silent; what is too old is forgotten."""
        now = self._clock.monotonic()
        for key, forward in list(self._forwards.items()):
            tier, asked = forward.tier, forward.asked
            if not forward.said:
                if forward.speak_at <= now:
                    self._answer(forward, [forward.own], f"tier {tier[0]} has not answered in time")
                elif not self._presence.living(*tier, now, {*had(asked), self._outgoing.device}):
                    self._answer(forward, [forward.own], f"tier {tier[0]} is gone")
            if forward.forget_at <= now:
                del self._forwards[key]

    def _answer(self, forward: _Forward, opinions: list[Opinion], reason: str) -> None:
        """Our own label, since the next tier has none."""
        self._enqueue(self._outgoing.answer(forward.asked, forward.own, opinions, reason))
        forward.said = len(opinions)
        self._store.count("forwards_unanswered")


def _opinion(verdict: messages.Verdict, tier: str) -> Opinion:
    """What a verdict says that brings no opinions."""
    return Opinion(
        who=verdict.provenance.who, release=verdict.provenance.release, tier=tier, status=verdict.status,
        confidence=verdict.confidence, label=verdict.label,
    )  # fmt: skip


def presences(
    settings: Settings, outgoing: Outgoing, state: str, models: dict[str, str]
) -> list[tuple[topics.Address, bytes]]:
    """A heartbeat (or the last one) of each responder of the device; the broker keeps it for as long as it counts. One that
    has no model yet (`models`: slot -> what is loaded) is not there: what it was asked would have to be asked again."""
    every_s = settings.delivery.presence_s
    out = []
    for name, responder in settings.responders.items():
        address = topics.RESPONDER(tier=responder.tier, task=responder.task, responder=f"{outgoing.device}.{name}")
        release = models.get(responder.slot, "")
        presence = messages.ResponderState(
            **outgoing.stamp(), state=state if release else "offline", release=release, device=outgoing.device,  # type: ignore[arg-type]
            every_s=every_s,
        )  # fmt: skip
        out.append((address.expiring(math.ceil(ALIVE_BEATS * every_s)), messages.encode(presence)))
    return out
