"""What happens to an answer: accept it, check it, or ask the next tier. Pure: chance is an argument."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edged.core.confidence import SAME_PLACE_IOU, Confidence, accept_threshold, probability
from edged.core.matching import iou_matrix
from edged.engines.base import Detections, ImageStats
from edged.wire.manifest import ReleaseManifest

Action = Literal["accept", "audit", "escalate"]
Doubt = Literal["uncalibrated", "novel", "unsure", "lost_track", "weak"]
Reason = Literal["confident", "audit", "audit_empty"] | Doubt

MESSAGES_PER_MINUTE_MAX = 6000
BYTES_PER_DAY_MAX = 1 << 40

# Key of Policy -> its smallest and largest value; whole numbers where both are.
_RANGES: Mapping[str, tuple[float, float]] = {
    "target_risk": (0.0, 1.0),
    "audit_share": (0.0, 1.0),
    "empty_share": (0.0, 1.0),
    "weak_margin": (0.0, 1.0),
    "dedupe_s": (0.0, 86400.0),
    "messages_per_minute": (0, MESSAGES_PER_MINUTE_MAX),
    "bytes_per_day": (0, BYTES_PER_DAY_MAX),
}


@dataclass(frozen=True, slots=True)
class Policy:
    """One pipeline's rules; each key may be set by configuration or by the fleet's desired state."""

    target_risk: float = 0.1  # of what is accepted, at most this share may be wrong
    audit_share: float = 0.02  # of accepted answers, checked all the same: unbiased accuracy of this release
    empty_share: float = 0.02  # the same for answers without any box: what a blind model looks like
    weak_margin: float = 0.05  # a candidate this little below the release's score threshold hints at a miss; 0: never
    dedupe_s: float = 60.0  # what looks like something escalated within this time is not escalated again; 0: it is
    messages_per_minute: int = 60  # escalations and audits together
    bytes_per_day: int = 256 << 20  # of escalations and audits as they are sent
    escalate: bool = True

    def __post_init__(self) -> None:
        for key, (low, high) in _RANGES.items():
            value = getattr(self, key)
            kind, said = (int, "whole number") if isinstance(high, int) else (int | float, "number")
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                example = type(self).__dataclass_fields__[key].default
                raise ValueError(
                    f"policy {key}={value!r}: must be a {said} between {low:g} and {high:.15g}, for example {example}"
                )
        if not isinstance(self.escalate, bool):
            raise ValueError(f"policy escalate={self.escalate!r}: must be true or false")


@dataclass(frozen=True, slots=True)
class Hints:
    """What speaks against an answer besides its probability."""

    empty: bool = False  # it holds no box at all
    weak: bool = False  # something that is nearly a box, where nothing was answered
    lost: bool = False  # an object of the frames before is gone though it cannot have left (core.tracks)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do and why; `inclusion` is the probability with which such an item reaches the next tier, so that
    accuracy over escalations and audits together can be weighted without bias (docs/policy.md)."""

    action: Action
    reason: Reason
    inclusion: float


def doubt(confidence: Confidence, threshold: float, hints: Hints) -> Doubt | None:
    """The first reason not to accept an answer; None when there is none.

    `threshold` is the probability from which on the release may be accepted at the target risk
    (`core.confidence.accept_threshold`). NaN in any number is a reason.
    """
    if not confidence.calibrated:
        return "uncalibrated"
    if confidence.novel or math.isnan(confidence.novelty):
        return "novel"
    if not confidence.p >= threshold:  # written so that NaN on either side is unsure
        return "unsure"
    if hints.lost:
        return "lost_track"
    return "weak" if hints.weak else None


def decide(confidence: Confidence, policy: Policy, threshold: float, hints: Hints, draw: float) -> Decision:
    """Decide on one answer; `threshold` as in `doubt`, `draw` uniform in [0, 1).

    Doubt is escalated for certain. Of what is accepted a share drawn by lot is checked all the same. A device that may ask
    nobody accepts everything, with its doubt as the reason.
    """
    reason = doubt(confidence, threshold, hints)
    if reason is not None:
        return Decision("escalate", reason, 1.0) if policy.escalate else Decision("accept", reason, 0.0)
    if not policy.escalate:
        return Decision("accept", "confident", 0.0)
    share = policy.empty_share if hints.empty else policy.audit_share
    if draw < share:
        return Decision("audit", "audit_empty" if hints.empty else "audit", share)
    return Decision("accept", "confident", share)


@dataclass(frozen=True, slots=True)
class Judged:
    """The decision on one image, with what it was made of: `missed` is the score of the strongest weak candidate where
    nothing was answered, 0 without one."""

    confidence: Confidence
    threshold: float
    missed: float
    decision: Decision


def judge(
    found: Detections, stats: ImageStats, manifest: ReleaseManifest, policy: Policy, draw: float, lost: bool = False
) -> Judged:
    """Decide on what a release found in an image; `lost`: an object of the frames before is missing (core.tracks)."""
    thresholds, calibration = manifest.thresholds, manifest.calibration
    confidence = probability(found, thresholds, stats, calibration)
    threshold = accept_threshold(calibration, policy.target_risk)
    missed = strongest_missed(found, thresholds.score)
    empty = not (found.scores >= thresholds.score).any()
    hints = Hints(empty=empty, weak=missed > thresholds.score - policy.weak_margin, lost=lost)
    return Judged(confidence, threshold, missed, decide(confidence, policy, threshold, hints, draw))


def lot(item_id: str) -> float:
    """The item's draw: uniform in [0, 1) over ids, and the same whenever the item comes again after a crash.

    The first 53 bits of SHA-256, so that nothing about an item but its id decides whether it is audited.
    """
    return (int.from_bytes(hashlib.sha256(item_id.encode()).digest()[:8], "big") >> 11) / (1 << 53)


def strongest_missed(found: Detections, score: float) -> float:
    """The best score below the threshold `score` of a candidate where nothing was answered; 0 without one."""
    answered = found.scores >= score
    there = iou_matrix(found.boxes[~answered], found.boxes[answered]) >= SAME_PLACE_IOU
    missed = found.scores[~answered][~there.any(axis=1)]
    return float(missed.max(initial=0.0))
