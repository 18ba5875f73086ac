"""What is kept of an answer that the policy does not simply accept: whether it may be asked about, the sample, the question.

Law: what the policy wants is counted before any limit; what a limit then holds back is missing data, counted by its reason.
Audits are never held back as duplicates, and a tenth of the budget is theirs alone.
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from edged.answers import Answers
from edged.cases import Case, finite
from edged.clock import Clock
from edged.config import Pipeline as PipelineConfig
from edged.core.budget import Budget, Spent
from edged.core.dedupe import Dedupe
from edged.outgoing import GENERATE, Outgoing, plain
from edged.store import NewSample, OutboxFull, OutboxMessage, StorageFull, Store
from edged.wire.messages import INLINE_BYTES_MAX

log = logging.getLogger(__name__)

ENVELOPE_BYTES = 1024  # of a question besides its content, about


@dataclass(frozen=True, slots=True)
class Admission:
    """What may be done about a case; `suppressed` is why nobody is asked although the policy wants it, or empty."""

    spent: Spent
    suppressed: str


@dataclass(frozen=True, slots=True)
class Kept:
    """The outcome: the sample's id, if there is one, and why nobody is asked about it, or empty."""

    sample: str | None
    suppressed: str

    @property
    def asked(self) -> bool:
        """Whether the next tier is asked."""
        return self.sample is not None and not self.suppressed


class Capture:
    """Keeps the samples of one pipeline, within its budget. Used by the pipeline's worker alone."""

    def __init__(
        self, name: str, config: PipelineConfig, slot: str, store: Store, outgoing: Outgoing, clock: Clock,
        answers: Answers,
    ) -> None:  # fmt: skip
        self._name, self._config, self._slot = name, config, slot
        self._store, self._outgoing, self._clock, self._answers = store, outgoing, clock, answers
        self._dedupe = Dedupe()
        self._budget_key = f"budget/{name}"
        self._budget = Budget(clock.monotonic(), clock.now(), store.value(self._budget_key))

    def admit(self, case: Case) -> Admission:
        """Whether the next tier may be asked about this case; spends the budget when it may. Once an item."""
        suppressed = self._suppressed(case)
        return Admission(self._budget.spent(self._clock.monotonic()), suppressed)

    def _suppressed(self, case: Case) -> str:
        now, policy, size = self._clock.monotonic(), case.policy, len(case.content)
        audit = case.decision.action == "audit"
        if size > INLINE_BYTES_MAX:
            return "too_large"
        if not audit and self._dedupe.repeats(case.looks, case.item.id, now, policy.dedupe_s):
            return "duplicate"
        sent = _encoded(self._config.task, case.content) + ENVELOPE_BYTES
        return self._budget.take(sent, audit, now, policy.messages_per_minute, policy.bytes_per_day) or ""

    def keep(self, case: Case, admission: Admission) -> Kept:
        """Commit the sample, with its question in the same transaction where one may be asked. The same item again
        changes nothing. Raises StoreError when the store fails; when it is full, answering goes on and that is said."""
        store, now = self._store, self._clock.monotonic()
        if admission.suppressed == "duplicate":  # nothing new to learn from, and nothing worth the room
            return Kept(None, admission.suppressed)
        item, asks = case.item, not admission.suppressed
        sample = self._sample(case, admission, asks)
        # Which of its tiers is asked is decided each time that the question is sent.
        question = self._outgoing.escalation(sample, case.content, self._config.escalate_to[0]) if asks else None
        if asks:
            self._answers.asked(item.id, now)
        try:
            try:
                self._commit(sample, case.content, question)
            except StorageFull:
                store.evict(len(case.content))
                self._commit(sample, case.content, question)
        except (StorageFull, OutboxFull) as error:
            self._answers.forget(item.id)
            store.count("samples_not_kept")
            log.warning("pipeline %s: %s: not kept as a sample: %s", self._name, item.name, error)
            return Kept(None, admission.suppressed or "full")
        if asks and case.decision.action == "escalate":
            self._dedupe.remember(case.looks, item.id, now)
        return Kept(item.id, admission.suppressed)

    def _commit(self, sample: NewSample, content: bytes, question: OutboxMessage | None) -> None:
        if question is not None:  # before the sample: a crash in between costs some budget, never the limit
            saved = self._budget.saved(self._clock.monotonic(), self._clock.now())
            self._store.set_value(self._budget_key, saved, durable=False)  # the sample's commit makes both durable
        self._store.capture(sample, content, question)

    def _sample(self, case: Case, admission: Admission, asks: bool) -> NewSample:
        item, config, decision, wall = case.item, self._config, case.decision, self._clock.now()
        waits = asks and item.request is not None
        return NewSample(
            id=item.id,
            pipeline=self._name,
            task=config.task,
            model=self._slot,
            release=case.release,
            state="escalated" if asks else "captured",
            reason=decision.reason,
            decision=decision.action,
            confidence=case.p,
            inclusion_probability=decision.inclusion,
            sha256=hashlib.sha256(case.content).hexdigest(),
            bytes=len(case.content),
            prediction=plain(case.prediction),
            item=item.name,
            captured=min(item.captured, wall),  # a camera's clock may be ahead
            answer_by=wall + config.answer_by_s if waits else None,
            label_by=wall + config.label_by_s if asks else None,
            evidence=self._evidence(case, admission, wall),
        )

    def _evidence(self, case: Case, admission: Admission, wall: float) -> dict[str, Any]:
        """Everything that the decision was made of, for `edged why`."""
        policy = case.policy
        evidence: dict[str, Any] = finite(
            {
                **case.evidence(),
                "decided": wall,
                "draw": case.draw,
                "policy": {key: getattr(policy, key) for key in type(policy).__dataclass_fields__},
                "tiers": list(self._config.escalate_to),
                "suppressed": admission.suppressed,
                "spent": {"messages": admission.spent.messages, "bytes": admission.spent.bytes},
                "breaker": self._answers.state.value,
            }
        )
        return evidence


def _encoded(task: str, content: bytes) -> int:
    """The bytes that a question's content takes in its message: a prompt as a JSON string, an image in base64."""
    return len(to_json(content.decode())) if task == GENERATE else math.ceil(len(content) / 3) * 4
