"""The samples of a simulated device: what it is unsure of and what it has checked, asked of a responder and catalogued."""

from __future__ import annotations

import base64
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from edged.core.tiers import ALIVE_BEATS
from edged.wire import messages, topics
from edged.wire.messages import Box, Escalation, SampleEntry
from trainer.core import simulated
from trainer.simulate.fetch import Count
from trainer.simulate.plan import PIPELINE, TASK, TIER, Plan

OPEN_MAX = 64  # questions without an answer that a device keeps; the oldest goes
KEPT_MAX = 32  # samples with an answer that it can list
AGAIN_S = 60.0  # until a question is asked again
LABEL_S = 86400.0  # that an answer is wanted
PICTURE_BYTES = 256
BOX = (0.0, 0.0, 10.0, 10.0)


@dataclass(slots=True)
class _Sample:
    entry: SampleEntry
    content: bytes
    asked_at: float = 0.0


class Questions:
    """`say(route, message, correlation, **fields)` sends."""

    def __init__(
        self, plan: Plan, device: str, rng: np.random.Generator, new_id: Callable[[], str],
        stamp: Callable[[], dict[str, Any]], count: Count, say: Callable[..., None],
    ) -> None:  # fmt: skip
        self._plan, self._rng, self._new_id, self._stamp, self._count, self._say = plan, rng, new_id, stamp, count, say
        self._device, self._classes = device, tuple(plan.classes)
        self._open: OrderedDict[str, _Sample] = OrderedDict()
        self._kept: OrderedDict[str, SampleEntry] = OrderedDict()
        self._alive: dict[str, float] = {}  # responder -> when it is taken for dead

    def ask(self, decision: str, release: str, chance: float, inclusion: float) -> None:
        """An item whose answer is right with `chance` becomes a sample, and a question."""
        content = self._rng.bytes(PICTURE_BYTES)
        seen = simulated.answer(content, self._classes, chance, float(self._rng.random()))
        entry = SampleEntry(
            **self._stamp(), sample=self._new_id(), pipeline=PIPELINE, task=TASK, model=self._plan.model,
            release=release, state="escalated", sha256=sha256(content).hexdigest(), bytes=len(content),
            prediction=[Box(label=seen, box=BOX)], confidence=round(chance, 4), decision=decision,
            inclusion_probability=min(1.0, max(1e-6, inclusion)), captured=time.time(),
            reason="audit" if decision == "audit" else "unsure",
        )  # fmt: skip
        if len(self._open) >= OPEN_MAX:
            self._open.popitem(last=False)
            self._count("questions_dropped")
        self._open[entry.sample] = sample = _Sample(entry, content)
        self._say(topics.SAMPLE, entry)
        self._send(sample)

    def responder(self, name: str, state: messages.ResponderState) -> None:
        """One is here, or leaves; what nobody could answer is asked as soon as one is."""
        self._alive.pop(name, None)
        if state.state == "online":
            self._alive[name] = time.time() + ALIVE_BEATS * state.every_s
            for sample in self._open.values():
                if not sample.asked_at:
                    self._send(sample)

    def again(self) -> None:
        """Ask again what was not answered for long."""
        now = time.time()
        for sample in self._open.values():
            if sample.asked_at and now - sample.asked_at >= AGAIN_S:
                self._send(sample)

    def answered(self, verdict: messages.Verdict) -> None:
        """An answer: the sample has a label, or nobody knows one."""
        self._count("verdicts")
        sample = self._open.pop(verdict.sample, None)
        if sample is None:
            return
        change: dict[str, Any] = {"state": verdict.status, **self._stamp()}
        if verdict.status == "labelled":
            change |= {
                "label": verdict.label, "label_confidence": verdict.confidence, "provenance": verdict.provenance,
            }  # fmt: skip
        entry = sample.entry.model_copy(update=change)
        self._kept[entry.sample] = entry
        while len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)
        self._say(topics.SAMPLE, entry)

    def listed(self) -> None:
        """Send the whole catalogue."""
        for entry in [*self._kept.values(), *(sample.entry for sample in self._open.values())]:
            self._say(topics.SAMPLE, entry.model_copy(update=self._stamp()))

    def _send(self, sample: _Sample) -> None:
        now, entry = time.time(), sample.entry
        if not any(until > now for until in self._alive.values()):
            return
        sample.asked_at = now
        asked = Escalation(
            **self._stamp(), sample=entry.sample, pipeline=PIPELINE, task=TASK, release=entry.release,
            reason=entry.reason, confidence=entry.confidence, image=base64.b64encode(sample.content).decode(),
            sha256=entry.sha256, prediction=entry.prediction, label_by=entry.captured + LABEL_S, origin=self._device,
            path=[self._device],
        )  # fmt: skip
        self._count("questions")
        self._say(topics.ESCALATION, asked, entry.sample.encode(), tier=TIER, task=TASK)
