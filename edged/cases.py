"""What a model answered and what the policy makes of it, as keeping and asking need it: of an image, of a prompt.

Both become a `Case`; from there on nothing asks any more what kind of answer it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from edged import images, regions
from edged.core.confidence import Confidence, box_probabilities, features
from edged.core.dedupe import NOBODY, Look
from edged.core.policy import Decision, Judged, Policy
from edged.core.tracks import Lost
from edged.engines.base import Detections, Finished, GenerateRequest, Prepared
from edged.outgoing import boxes
from edged.slot import Loaded
from edged.sources import Item
from edged.wire.manifest import Calibration
from edged.wire.messages import Label, Text
from edged.wire.parts import ChatTurn, Prompt

LOST_MAX = 16  # of a frame's lost objects that its evidence names
EXCERPT_CHARS_MAX = 300  # of a prompt that its evidence shows


@dataclass(frozen=True, slots=True)
class Case:
    """An answer that may be kept and asked about.

    `content`: the bytes that are kept and sent, exactly what the model saw; `looks`: what tells it from others; `draw`: the
    item's lot; `evidence`: what the decision was made of, besides what every case has (`edged.capture`).
    """

    item: Item
    release: str
    prediction: Label
    p: float
    decision: Decision
    policy: Policy
    draw: float
    content: bytes
    looks: list[Look]
    evidence: Callable[[], dict[str, Any]]


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


def of_image(answer: Answer, *, whole: bool) -> Case:
    """The case of an image; `whole`: the model saw all of the file that came."""
    return Case(
        answer.item, answer.loaded.ref.release, boxes(answer.answered, answer.loaded.manifest.labels),
        answer.judged.confidence.p, answer.judged.decision, answer.policy, answer.draw, _pixels(answer, whole),
        regions.looks(answer.prepared.image, answer.answered), partial(_seen, answer, whole),
    )  # fmt: skip


def _pixels(answer: Answer, whole: bool) -> bytes:
    """The bytes that are kept and asked about: the file as it came, where the model saw all of it."""
    if answer.item.frame is not None:
        return images.compress(answer.prepared.image)
    return answer.item.image if whole else images.encode(answer.prepared.image)


def _seen(answer: Answer, whole: bool) -> dict[str, Any]:
    manifest, policy, judged = answer.loaded.manifest, answer.policy, answer.judged
    calibration = manifest.calibration
    (height, width), (left, top) = answer.prepared.image.shape[:2], answer.corner
    return {
        **_sureness(judged.confidence, judged.threshold, calibration),
        "seen": [left, top, left + width, top + height],
        "region": not whole,
        "boxes": box_probabilities(answer.answered, calibration).tolist(),
        "score_threshold": manifest.thresholds.score,
        "bias": calibration.bias,
        "features": _features(answer),
        "missed": judged.missed,
        "weak_from": manifest.thresholds.score - policy.weak_margin if policy.weak_margin else None,
        "lost": [
            {"sign": lost.sign, "label": manifest.labels[lost.track.label], "frames": lost.track.frames,
             "score": lost.track.score, "box": list(lost.track.box)}
            for lost in answer.lost[:LOST_MAX]
        ],
    }  # fmt: skip


def _sureness(confidence: Confidence, threshold: float, calibration: Calibration) -> dict[str, Any]:
    return {
        "p": confidence.p,
        "threshold": threshold,
        "method": calibration.method,
        "calibration_items": calibration.items,
        "novelty": confidence.novelty,
        "novelty_limit": calibration.novelty.limit if calibration.novelty else None,
    }


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


@dataclass(frozen=True, slots=True)
class Written:
    """The local answer to one prompt: which release (of an adapter, where there is one) wrote what, how it ended, and,
    where it is whole, how sure that was and what the policy makes of it."""

    item: Item
    request: GenerateRequest
    text: str
    end: Finished
    release: str
    adapter: str | None
    calibration: Calibration
    policy: Policy
    draw: float
    confidence: Confidence | None
    threshold: float
    decision: Decision | None
    latency_ms: float


def of_text(written: Written) -> Case:
    """The case of a prompt with a whole answer."""
    assert written.confidence is not None and written.decision is not None, "an answer that was cut off is no case"
    content = question(written.request)
    # The same prompt is the same thing to ask; another one has other bits, however alike the words are.
    bits = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    return Case(
        written.item, written.adapter or written.release, [Text(text=written.text)], written.confidence.p,
        written.decision, written.policy, written.draw, content, [Look(bits, 0.0, NOBODY)],
        partial(_read, written, written.confidence),
    )  # fmt: skip


def _read(written: Written, confidence: Confidence) -> dict[str, Any]:
    asked = written.request.prompt or "\n".join(f"{m.role}: {m.content}" for m in written.request.messages)
    return {
        **_sureness(confidence, written.threshold, written.calibration),
        "question": asked[:EXCERPT_CHARS_MAX],
        "question_chars": len(asked),
        "mean_logprob": written.end.mean_logprob,
        "prompt_tokens": written.end.prompt_tokens,
        "answer_tokens": written.end.answer_tokens,
        "finish_reason": written.end.reason,
        "adapter": written.adapter,
    }


def question(request: GenerateRequest) -> bytes:
    """A request as the bytes that are kept and sent: the JSON of a `wire.messages.Prompt`, the same for the same request."""
    turns = [ChatTurn(role=m.role, content=m.content) for m in request.messages]  # type: ignore[arg-type]
    prompt = Prompt(
        generation_prompt=None if turns else request.prompt, messages=turns or None, tokens_max=request.tokens_max,
        temperature=request.temperature, seed=request.seed, stop=list(request.stop), answer_schema=request.schema,
    )  # fmt: skip
    return prompt.model_dump_json(exclude_defaults=True).encode()


def finite(value: Any) -> Any:
    """The value as JSON can hold it: no NaN, no infinity."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
