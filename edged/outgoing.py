"""Messages as the outbox keeps them: what is sent, where, and what settles it."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from edged.core.policy import Decision
from edged.engines.base import Detections
from edged.sources import Asked, Item
from edged.stamp import Stamp
from edged.store import NewSample, OutboxMessage, Sample
from edged.wire import messages, topics
from edged.wire.messages import Box, Message
from edged.wire.topics import Address


def boxes(found: Detections, labels: list[str]) -> list[Box]:
    """Detections as labelled boxes, best first."""
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True)
    return [Box(label=labels[k], box=tuple(box), score=min(max(score, 0.0), 1.0)) for box, score, k in rows]


def plain(parts: list[Box]) -> list[dict[str, Any]]:
    """Boxes as the store keeps them."""
    return [part.model_dump(mode="json") for part in parts]


class Outgoing:
    """Builds this device's messages."""

    def __init__(self, site: str, device: str, stamp: Stamp) -> None:
        self.site, self.device, self.stamp = site, device, stamp

    def message(self, address: Address, message: Message, **kept: Any) -> OutboxMessage:
        """`message` for the outbox: it expires when its address says."""
        expires = None if address.expiry_s is None else message.ts + address.expiry_s
        return OutboxMessage(
            message.id, address.topic, address.qos, address.retain, expires, messages.encode(message), **kept
        )

    def result(self, pipeline: str, **fields: Any) -> OutboxMessage:
        """An answered item, for whoever listens; durable, so it outlives a day without a broker."""
        address = topics.RESULT(site=self.site, dev=self.device, pipeline=pipeline).expiring(topics.DAY_S)
        return self.message(address, messages.Result(**self.stamp(), pipeline=pipeline, **fields))

    def reply(self, request: str, **fields: Any) -> OutboxMessage:
        """The answer to an InferRequest."""
        address = topics.REPLY(site=self.site, dev=self.device, id=request)
        return self.message(address, messages.InferReply(**self.stamp(), request=request, **fields))

    def event(self, kind: str, text: str, **detail: Any) -> OutboxMessage:
        """Something that a person should see."""
        address = topics.EVENT(site=self.site, dev=self.device)
        return self.message(address, messages.Event(**self.stamp(), kind=kind, text=text, detail=detail))

    def sample(
        self, item: Item, pipeline: str, task: str, slot: str, release: str, decision: Decision, p: float,
        answer: list[Box], *, escalated: bool, answer_by: float, label_by: float,
    ) -> NewSample:  # fmt: skip
        """The sample that `item` becomes."""
        return NewSample(
            id=item.id,
            pipeline=pipeline,
            task=task,
            model=slot,
            release=release,
            state="escalated" if escalated else "captured",
            reason=decision.reason,
            decision=decision.action,
            confidence=p,
            inclusion_probability=decision.inclusion,
            sha256=hashlib.sha256(item.image).hexdigest(),
            bytes=len(item.image),
            prediction=plain(answer),
            item=item.name,
            captured=min(item.captured, self.stamp.clock.now()),  # a camera's clock may be ahead
            answer_by=answer_by if escalated else None,
            label_by=label_by if escalated else None,
        )

    def escalation(self, sample: NewSample, image: bytes, tier: str) -> OutboxMessage:
        """The question to the next tier; its row lives until the verdict or `label_by`."""
        assert sample.label_by is not None, "an escalated sample has a deadline"
        message = messages.Escalation(
            **self.stamp(),
            sample=sample.id,
            pipeline=sample.pipeline,
            task=sample.task,
            release=sample.release,
            reason=sample.reason,
            confidence=sample.confidence,
            image=base64.b64encode(image).decode(),
            sha256=sample.sha256,
            prediction=[Box(**row) for row in sample.prediction],
            label_by=sample.label_by,
            origin=self.device,
        )
        address = topics.ESCALATION(site=self.site, dev=self.device, tier=tier, task=sample.task)
        address = address.expiring(sample.label_by - message.ts)
        return OutboxMessage(
            message.id, address.topic, address.qos, address.retain, sample.label_by, messages.encode(message),
            keep="verdict", sample=sample.id, correlation=sample.id.encode(),
        )  # fmt: skip

    def verdict(
        self, asked: Asked, status: str, label: list[Box], p: float, release: str, reason: str
    ) -> OutboxMessage:
        """Our answer to another device's escalation. The address follows from the question's topic, never from what the
        question says about itself."""
        message = messages.Verdict(
            **self.stamp(),
            sample=asked.escalation.sample,
            status=status,  # type: ignore[arg-type]  # validated by the model
            label=label,
            confidence=p,
            provenance=messages.Provenance(kind="model", who=self.device, release=release),
            reason=reason,
        )
        return self.message(topics.VERDICT(site=asked.site, dev=asked.device), message)

    def catalogue(self, sample: Sample) -> OutboxMessage:
        """The catalogue entry of a sample as it stands."""
        message = messages.SampleEntry(
            **self.stamp(),
            sample=sample.id,
            pipeline=sample.pipeline,
            task=sample.task,
            model=sample.model,
            release=sample.release,
            state=sample.state,
            sha256=sample.sha256,
            bytes=sample.bytes,
            label=[Box(**row) for row in sample.label or []],
            label_confidence=sample.label_confidence or 0.0,
            provenance=messages.Provenance(**sample.provenance) if sample.provenance else None,
            captured=sample.captured,
            reason=sample.reason,
        )
        return self.message(topics.SAMPLE(site=self.site, dev=self.device), message)
