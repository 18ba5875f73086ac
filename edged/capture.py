"""What is kept of an answer that the policy does not simply accept: whether it may be asked about, the sample, the question.

Law: what the policy wants is counted before any limit; what a limit then holds back is missing data, counted by its reason.
Audits are never held back as duplicates, and a tenth of the budget is theirs alone.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

from edged import images, regions
from edged.answers import Answers
from edged.clock import Clock
from edged.config import WHOLE
from edged.config import Pipeline as PipelineConfig
from edged.core.budget import Budget, Spent
from edged.core.confidence import box_probabilities, features
from edged.core.dedupe import Dedupe, Look
from edged.core.policy import Judged, Policy
from edged.core.tracks import Lost
from edged.engines.base import Detections, Prepared
from edged.outgoing import Outgoing, boxes
from edged.slot import Loaded
from edged.sources import Item
from edged.store import NewSample, OutboxFull, OutboxMessage, StorageFull, Store
from edged.wire.messages import INLINE_IMAGE_BYTES_MAX

log = logging.getLogger(__name__)

ENVELOPE_BYTES = 1024  # of a question besides its image, about
LOST_MAX = 16  # of a frame's lost objects that its evidence names


@dataclass(frozen=True, slots=True)
class Answer:
    """The local answer to one image: what the model found in the pixels it saw, how sure, and what the policy makes of it.

    `corner`: where those pixels lie in the image that came, (left, top); `draw`: the item's lot.
    """

    item: Item
    loaded: Loaded
    prepared: Prepared
    corner: tuple[int, int]
    found: Detections
    policy: Policy
    draw: float
    lost: tuple[Lost, ...]
    judged: Judged
    latency_ms: float

    @property
    def answered(self) -> Detections:
        """The boxes that are the answer, in pixels of what the model saw."""
        return self.found.above(self.loaded.manifest.thresholds.score)


@dataclass(frozen=True, slots=True)
class Admission:
    """What may be done about an answer: `image` are the bytes that are kept and asked about, exactly the pixels that the
    model saw; `suppressed` is why nobody is asked although the policy wants it, or empty."""

    image: bytes
    looks: list[Look]
    spent: Spent
    suppressed: str


@dataclass(frozen=True, slots=True)
class Kept:
    """The outcome: the sample's id, if there is one, and why nobody is asked about it, or empty."""

    sample: str | None
    suppressed: str


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

    def admit(self, answer: Answer) -> Admission:
        """Whether the next tier may be asked about this answer; spends the budget when it may. Once an item."""
        image = self._content(answer)
        looks = regions.looks(answer.prepared.image, answer.answered)
        suppressed = self._suppressed(answer, len(image), looks)
        return Admission(image, looks, self._budget.spent(self._clock.monotonic()), suppressed)

    def _content(self, answer: Answer) -> bytes:
        """The bytes that are kept and asked about: the file as it came, where the model saw all of it."""
        if answer.item.frame is not None:
            return images.compress(answer.prepared.image)
        return answer.item.image if self._config.roi == WHOLE else images.encode(answer.prepared.image)

    def _suppressed(self, answer: Answer, size: int, looks: list[Look]) -> str:
        now, policy = self._clock.monotonic(), answer.policy
        audit = answer.judged.decision.action == "audit"
        if size > INLINE_IMAGE_BYTES_MAX:
            return "too_large"
        if not audit and self._dedupe.repeats(looks, answer.item.id, now, policy.dedupe_s):
            return "duplicate"
        sent = math.ceil(size / 3) * 4 + ENVELOPE_BYTES  # base64
        return self._budget.take(sent, audit, now, policy.messages_per_minute, policy.bytes_per_day) or ""

    def keep(self, answer: Answer, admission: Admission) -> Kept:
        """Commit the sample, with its question in the same transaction where one may be asked. The same item again
        changes nothing. Raises StoreError when the store fails; when it is full, answering goes on and that is said."""
        store, now = self._store, self._clock.monotonic()
        if admission.suppressed == "duplicate":  # nothing new to learn from, and nothing worth the room
            return Kept(None, admission.suppressed)
        item, config, tiers = replace(answer.item, image=admission.image), self._config, self._config.escalate_to
        asks = not admission.suppressed
        wall = self._clock.now()
        sample = self._outgoing.sample(
            item, self._name, config.task, self._slot, answer.loaded.ref.release, answer.judged.decision,
            answer.judged.confidence.p, boxes(answer.answered, answer.loaded.manifest.labels), escalated=asks,
            answer_by=wall + config.answer_by_s, label_by=wall + config.label_by_s,
            evidence=self._evidence(answer, admission, wall),
        )  # fmt: skip
        # Which of its tiers is asked is decided each time that the question is sent.
        question = self._outgoing.escalation(sample, item.image, tiers[0]) if asks else None
        if asks:
            self._answers.asked(item.id, now)
        try:
            try:
                self._commit(sample, item.image, question)
            except StorageFull:
                store.evict(len(item.image))
                self._commit(sample, item.image, question)
        except (StorageFull, OutboxFull) as error:
            self._answers.forget(item.id)
            store.count("samples_not_kept")
            log.warning("pipeline %s: %s: not kept as a sample: %s", self._name, item.name, error)
            return Kept(None, admission.suppressed or "full")
        if asks and answer.judged.decision.action == "escalate":
            self._dedupe.remember(admission.looks, item.id, now)
        return Kept(item.id, admission.suppressed)

    def _commit(self, sample: NewSample, image: bytes, question: OutboxMessage | None) -> None:
        if question is not None:  # before the sample: a crash in between costs some budget, never the limit
            self._store.set_value(self._budget_key, self._budget.saved(self._clock.monotonic(), self._clock.now()))
        self._store.capture(sample, image, question)

    def _evidence(self, answer: Answer, admission: Admission, wall: float) -> dict[str, Any]:
        """Everything that the decision was made of, for `edged why`."""
        manifest, policy = answer.loaded.manifest, answer.policy
        calibration, judged = manifest.calibration, answer.judged
        (height, width), (left, top) = answer.prepared.image.shape[:2], answer.corner
        evidence: dict[str, Any] = _finite(
            {
                "decided": wall,
                "seen": [left, top, left + width, top + height],
                "region": self._config.roi != WHOLE,
                "boxes": box_probabilities(answer.answered, calibration).tolist(),
                "score_threshold": manifest.thresholds.score,
                "p": judged.confidence.p,
                "threshold": judged.threshold,
                "method": calibration.method,
                "calibration_items": calibration.items,
                "bias": calibration.bias,
                "features": _features(answer),
                "novelty": judged.confidence.novelty,
                "novelty_limit": calibration.novelty.limit if calibration.novelty else None,
                "missed": judged.missed,
                "weak_from": manifest.thresholds.score - policy.weak_margin if policy.weak_margin else None,
                "lost": [
                    {"sign": lost.sign, "label": manifest.labels[lost.track.label], "frames": lost.track.frames,
                     "score": lost.track.score, "box": list(lost.track.box)}
                    for lost in answer.lost[:LOST_MAX]
                ],
                "draw": answer.draw,
                "policy": {key: getattr(policy, key) for key in type(policy).__dataclass_fields__},
                "tiers": list(self._config.escalate_to),
                "suppressed": admission.suppressed,
                "spent": {"messages": admission.spent.messages, "bytes": admission.spent.bytes},
                "breaker": self._answers.state.value,
            }
        )  # fmt: skip
        return evidence


def _features(answer: Answer) -> dict[str, dict[str, float]]:
    """Feature -> its value and its contribution to the logit of p: weight x standardised value; only what is fitted."""
    manifest = answer.loaded.manifest
    calibration = manifest.calibration
    if calibration.method != "logistic":
        return {}
    values = features(answer.found, manifest.thresholds, answer.prepared.stats, calibration)
    rows = zip(calibration.features, calibration.mean, calibration.scale, calibration.weights, strict=True)
    return {
        name: {"value": values[name], "contribution": weight * (values[name] - mean) / scale}
        for name, mean, scale, weight in rows
    }


def _finite(value: Any) -> Any:
    """The value as JSON can hold it: no NaN, no infinity."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
