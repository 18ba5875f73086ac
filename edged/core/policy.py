"""What happens to an answer: accept it, check it, or ask the next tier. Pure: chance is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edged.core.confidence import Confidence

Action = Literal["accept", "audit", "escalate"]


@dataclass(frozen=True, slots=True)
class Policy:
    """One pipeline's rules; each key may be set by configuration or by the fleet's desired state."""

    target_risk: float = 0.1  # an accepted answer may be wrong with at most this probability
    audit_share: float = 0.02  # of accepted answers, checked all the same: unbiased accuracy of this release
    escalate: bool = True

    def __post_init__(self) -> None:
        for key in ("target_risk", "audit_share"):
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0.0 <= value <= 1.0:
                raise ValueError(f"policy {key}={value!r}: must be a number between 0 and 1, for example 0.1")
        if not isinstance(self.escalate, bool):
            raise ValueError(f"policy escalate={self.escalate!r}: must be true or false")


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do and why; `inclusion` is the probability with which such an item reaches the next tier, so that
    accuracy over escalations and audits together can be weighted without bias."""

    action: Action
    reason: Literal["confident", "audit", "unsure", "novel", "uncalibrated"]
    inclusion: float


def decide(confidence: Confidence, policy: Policy, draw: float) -> Decision:
    """Decide on one answer; `draw` is uniform in [0, 1).

    Chow's rule (C. K. Chow, "On optimum recognition error and reject tradeoff", 1970): accept when the probability of
    being right is at least 1 - target_risk. With calibrated probabilities every accepted answer, and so their share as
    a whole, is wrong with at most the target risk. Under shift the calibration lapses: that is what audits are for.
    """
    if not confidence.calibrated:
        reason: Literal["uncalibrated", "novel", "unsure"] = "uncalibrated"
    elif confidence.novel:
        reason = "novel"
    elif not confidence.p >= 1.0 - policy.target_risk:  # written so that NaN is unsure
        reason = "unsure"
    else:
        if policy.escalate and draw < policy.audit_share:
            return Decision("audit", "audit", policy.audit_share)
        return Decision("accept", "confident", policy.audit_share if policy.escalate else 0.0)
    if not policy.escalate:
        return Decision("accept", reason, 0.0)
    return Decision("escalate", reason, 1.0)
