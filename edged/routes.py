"""Whom this device asks: decided each time that a question is sent, so that an old one does not wait for a dead tier."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from edged.clock import Clock
from edged.config import Pipeline as PipelineConfig
from edged.core.tiers import Beat, Choice, Presence, Tier, choose
from edged.outgoing import Outgoing
from edged.store import OutboxMessage
from edged.wire import messages, topics


class Routes:
    """The tiers that this device's pipelines ask, and who lives there. All calls on the control loop."""

    def __init__(
        self, presence: Presence, outgoing: Outgoing, clock: Clock, pipelines: Mapping[str, PipelineConfig]
    ) -> None:
        self._presence, self._outgoing, self._clock = presence, outgoing, clock
        self._chosen: dict[str, Choice] = {}  # pipeline -> what was best at the last look
        self.configure(pipelines)

    def configure(self, pipelines: Mapping[str, PipelineConfig]) -> None:
        """These pipelines ask from now on."""
        self._pipelines = {name: config for name, config in pipelines.items() if config.escalate_to}
        self._asked: set[Tier] = {(t, c.task) for c in self._pipelines.values() for t in c.escalate_to}

    def heard(self, fields: dict[str, str], responder: messages.ResponderState, *, retained: bool) -> bool:
        """Take in a heartbeat. True when open questions are worth sending again at once: somebody has just come."""
        beat = Beat(
            responder.id, responder.device or fields["responder"], responder.boot, responder.state == "online",
            responder.every_s,
        )  # fmt: skip
        tier = (fields["tier"], fields["task"])
        came = self._presence.heard(*tier, fields["responder"], beat, self._clock.monotonic())
        changed = self.changed()
        return changed or (came and not retained and tier in self._asked)

    def changed(self) -> bool:
        """Whether, since the last look, a pipeline's questions have a living tier that they did not go to before."""
        before, self._chosen = self._chosen, {name: self._choose(c) for name, c in self._pipelines.items()}
        return any(choice.living and choice != before.get(name) for name, choice in self._chosen.items())

    def _choose(self, config: PipelineConfig) -> Choice:
        now, own = self._clock.monotonic(), (self._outgoing.device,)
        return choose(config.escalate_to, lambda tier: self._presence.living(tier, config.task, now, own))

    def fresh(self, message: OutboxMessage, now: float) -> tuple[str, bytes]:
        """Topic and payload of a question in the outbox as it is to be asked at `now` (seconds since the epoch)."""
        fields = topics.ESCALATION.match(message.topic)
        try:
            way = messages.Waybill.model_validate_json(message.payload)
        except ValidationError:  # kept by another version: its receiver may understand it
            return message.topic, message.payload
        config = self._pipelines.get(way.pipeline)
        topic, payload = message.topic, message.payload
        if config is not None and fields is not None:
            topic = topics.ESCALATION(**{**fields, "tier": self._choose(config).tier}).topic
        if way.answer_by is not None and way.answer_by > now:
            question = messages.Escalation.model_validate_json(payload)
            payload = messages.encode(question.model_copy(update={"answer_within_s": way.answer_by - now}))
        return topic, payload
