"""Messages as the outbox keeps them: what is sent, where, and what settles it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edged.engines.base import Detections
from edged.engines.outline import NOTHING, simplified
from edged.sources import Asked, Item, Unsure
from edged.stamp import Stamp
from edged.store import NewSample, OutboxMessage, Sample
from edged.wire import messages, topics
from edged.wire.ids import derived
from edged.wire.messages import POINTS_MAX, Box, Label, Message, Opinion, Text, label_of
from edged.wire.topics import Address

GENERATE = "generate"  # the task whose items are prompts; every other one has images


def boxes(found: Detections, labels: list[str]) -> list[Box]:
    """Detections as labelled boxes, best first, with the outlines that a segmenter has found."""
    outlines = found.outlines or [None] * len(found.scores)
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), outlines, strict=True)
    return [
        Box(label=labels[k], box=tuple(box), score=min(max(score, 0.0), 1.0), polygons=_polygons(outline))
        for box, score, k, outline in rows
    ]


def _polygons(outline: NDArray[np.float32] | None) -> list[list[float]] | None:
    points = NOTHING if outline is None else simplified(outline, POINTS_MAX)
    return [[round(value, 1) for value in points.ravel().tolist()]] if len(points) else None


def moved(label: Label, corner: tuple[int, int]) -> list[Box]:
    """A label about a part of an image, about the whole image: `corner` is where the part lies in it."""

    def to(numbers: Sequence[float]) -> list[float]:
        return [number + corner[place % 2] for place, number in enumerate(numbers)]

    return [
        part.model_copy(
            update={"box": tuple(to(part.box)), "polygons": part.polygons and [to(each) for each in part.polygons]}
        )
        for part in label
        if isinstance(part, Box)
    ]


def plain(label: Label) -> list[dict[str, Any]]:
    """A label as the store keeps it."""
    return [part.model_dump(mode="json") for part in label]


def text_of(label: Label) -> str | None:
    """The words of a label; None when it is no text."""
    return label[0].text if label and isinstance(label[0], Text) else None


def fits(task: str, label: Label) -> bool:
    """Whether a label says what this task asks: a text of a prompt, boxes (or none) of an image."""
    return (text_of(label) is not None) == (task == GENERATE)


def carried(task: str, content: bytes) -> dict[str, Any]:
    """The field of a question that carries the bytes it is about."""
    return {"prompt": content.decode()} if task == GENERATE else {"image": base64.b64encode(content).decode()}


def had(asked: Asked) -> list[str]:
    """The devices that have had a question, the origin first."""
    return asked.escalation.path or [asked.device]


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

    def result(self, pipeline: str, item: Item, **fields: Any) -> OutboxMessage:
        """An answered item, for whoever listens; durable, so it outlives a day without a broker.

        Its id follows from the item: an item that is answered again after a crash has the same result to a receiver."""
        address = topics.RESULT(site=self.site, dev=self.device, pipeline=pipeline).expiring(topics.DAY_S)
        stamp = self.stamp() | {"id": derived(item.id, f"result of {pipeline}")}
        return self.message(address, messages.Result(**stamp, pipeline=pipeline, item=item.name, **fields))

    def reply(self, request: str, **fields: Any) -> OutboxMessage:
        """The answer to an InferRequest. That of a request that is answered again after a crash is the same to a receiver; a
        refusal is one of its own, because the request may be sent again and answered."""
        address = topics.REPLY(site=self.site, dev=self.device, id=request)
        stamp = self.stamp()
        if not fields.get("error"):
            stamp |= {"id": derived(request, "reply")}
        return self.message(address, messages.InferReply(**stamp, request=request, **fields))

    def instead(self, message: OutboxMessage, size: int, size_max: int) -> OutboxMessage | None:
        """What is said where `message` of `size` bytes cannot be sent because the broker takes packets of at most
        `size_max` bytes: whoever asked gets an error for a reply. None: nobody waits for it."""
        fields = topics.REPLY.match(message.topic)
        if fields is None:
            return None
        error = (
            f"the reply has {size} bytes, and the broker takes packets of at most {size_max}: send a shorter prompt (the "
            "reply repeats it), or a smaller tokens_max"
        )
        reply = self.reply(fields["id"], error=error)
        return reply if len(reply.payload) < size else None  # where nothing fits, nothing is said again and again

    def command_state(
        self, kind: str, command: str, state: Literal["accepted", "done", "failed"], reason: str, detail: dict[str, Any]
    ) -> OutboxMessage:
        """How far the command `down/cmd/{kind}/{command}` is."""
        address = topics.COMMAND_STATE(site=self.site, dev=self.device, type=kind, id=command)
        body = messages.CommandState(**self.stamp(), command=command, state=state, reason=reason, detail=detail)
        return self.message(address, body)

    def event(self, kind: str, text: str, **detail: Any) -> OutboxMessage:
        """Something that a person should see."""
        address = topics.EVENT(site=self.site, dev=self.device)
        return self.message(address, messages.Event(**self.stamp(), kind=kind, text=text, detail=detail))

    def escalation(self, sample: NewSample, content: bytes, tier: str) -> OutboxMessage:
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
            **carried(sample.task, content),
            sha256=sample.sha256,
            prediction=label_of(sample.prediction),
            label_by=sample.label_by,
            answer_by=sample.answer_by,
            origin=self.device,
            path=[self.device],
        )
        address = topics.ESCALATION(site=self.site, dev=self.device, tier=tier, task=sample.task)
        address = address.expiring(sample.label_by - message.ts)
        return OutboxMessage(
            message.id, address.topic, address.qos, address.retain, sample.label_by, messages.encode(message),
            keep="verdict", sample=sample.id, correlation=sample.id.encode(),
        )  # fmt: skip

    def verdict(
        self, asked: Asked, status: str, label: Label, p: float, release: str, reason: str, who: str = ""
    ) -> OutboxMessage:
        """Our own answer to another device's escalation."""
        own = self.opinion(asked, status, label, p, release, who)
        return self.answer(asked, own, [own], reason)

    def opinion(self, asked: Asked, status: str, label: Label, p: float, release: str, who: str = "") -> Opinion:
        """What this device's model makes of a question; `who`: the server that answered for it, if one did."""
        return Opinion(
            who=who or self.device, release=release, tier=asked.tier, status=status, confidence=p, label=label  # type: ignore[arg-type]
        )  # fmt: skip

    def answer(self, asked: Asked, own: Opinion, opinions: list[Opinion], reason: str) -> OutboxMessage:
        """The verdict that our own opinion is the one that counts; `opinions` are all there are."""
        verdict = messages.Verdict(
            **self.stamp(),
            sample=asked.escalation.sample,
            status=own.status,
            label=own.label,
            confidence=own.confidence,
            provenance=messages.Provenance(kind="model", who=own.who, release=own.release),
            reason=reason,
            opinions=opinions,
        )
        return self._to(asked, verdict)

    def relayed(self, asked: Asked, verdict: messages.Verdict, opinions: list[Opinion]) -> OutboxMessage:
        """The next tier's verdict, passed on to the one who asked us."""
        update = {**self.stamp(), "sample": asked.escalation.sample, "opinions": opinions}
        return self._to(asked, verdict.model_copy(update=update))

    def _to(self, asked: Asked, verdict: messages.Verdict) -> OutboxMessage:
        """The address follows from the question's topic, never from what the question says about itself."""
        return self.message(topics.VERDICT(site=asked.site, dev=asked.device), verdict)

    def onward(self, unsure: Unsure, tier: str, answer_within_s: float | None, keep_s: float) -> OutboxMessage:
        """The question that `unsure` was asked, as one of our own to the next tier; wanted for `keep_s`. It has an id of
        its own: whose sample it is about is known here, so the answers to two devices' samples cannot be mixed up."""
        stamp = self.stamp()
        question = unsure.asked.escalation
        message = question.model_copy(
            update={
                **stamp,
                "sample": stamp["id"],
                "release": unsure.own.release,
                "reason": unsure.reason,
                "confidence": unsure.own.confidence,
                "prediction": unsure.own.label,
                "answer_within_s": answer_within_s,
                "hops": question.hops + 1,
                "path": [*had(unsure.asked), self.device],
            }
        )
        address = topics.ESCALATION(site=self.site, dev=self.device, tier=tier, task=unsure.asked.task)
        return self.message(address.expiring(keep_s), message)

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
            prediction=label_of(sample.prediction),
            confidence=sample.confidence,
            decision=sample.decision,
            inclusion_probability=sample.inclusion_probability,
            label=label_of(sample.label or []),
            label_confidence=sample.label_confidence or 0.0,
            provenance=messages.Provenance(**sample.provenance) if sample.provenance else None,
            opinions=[Opinion(**row) for row in sample.opinions],
            captured=sample.captured,
            reason=sample.reason,
        )
        return self.message(topics.SAMPLE(site=self.site, dev=self.device), message)
