"""The policy: Chow's rule with audits, on every combination that matters."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.core.confidence import Confidence
from edged.core.policy import Decision, Policy, decide

SURE = Confidence(0.95, 0.0, False, True)
UNSURE = Confidence(0.5, 0.0, False, True)
NOVEL = Confidence(0.95, 9.0, True, True)
UNCALIBRATED = Confidence(0.99, 0.0, False, False)
ASKING = Policy(target_risk=0.1, audit_share=0.25)
ALONE = Policy(target_risk=0.1, audit_share=0.25, escalate=False)


@pytest.mark.parametrize(
    ("confidence", "policy", "draw", "expected"),
    [
        (SURE, ASKING, 0.25, Decision("accept", "confident", 0.25)),
        (SURE, ASKING, 0.2499, Decision("audit", "audit", 0.25)),
        (UNSURE, ASKING, 0.9, Decision("escalate", "unsure", 1.0)),
        (NOVEL, ASKING, 0.9, Decision("escalate", "novel", 1.0)),
        (UNCALIBRATED, ASKING, 0.9, Decision("escalate", "uncalibrated", 1.0)),
        (SURE, ALONE, 0.0, Decision("accept", "confident", 0.0)),
        (UNSURE, ALONE, 0.0, Decision("accept", "unsure", 0.0)),
        (NOVEL, ALONE, 0.0, Decision("accept", "novel", 0.0)),
        (UNCALIBRATED, ALONE, 0.0, Decision("accept", "uncalibrated", 0.0)),
        (Confidence(0.9, 0.0, False, True), ASKING, 0.9, Decision("accept", "confident", 0.25)),  # exactly at the risk
        (Confidence(0.8999, 0.0, False, True), ASKING, 0.9, Decision("escalate", "unsure", 1.0)),
        (Confidence(math.nan, 0.0, False, True), ASKING, 0.9, Decision("escalate", "unsure", 1.0)),
    ],
)
def test_decisions(confidence: Confidence, policy: Policy, draw: float, expected: Decision) -> None:
    assert decide(confidence, policy, draw) == expected


shares = st.floats(0, 1)
draws = st.floats(0, 1, exclude_max=True)
confidences = st.builds(
    Confidence, st.floats(0, 1) | st.just(math.nan), st.floats(0, 1e6), st.booleans(), st.booleans()
)


@given(confidences, shares, shares, draws)
def test_what_is_accepted_was_sure_enough(confidence: Confidence, risk: float, share: float, draw: float) -> None:
    decision = decide(confidence, Policy(risk, share), draw)
    if decision.action in {"accept", "audit"}:
        assert confidence.calibrated
        assert not confidence.novel
        assert confidence.p >= 1 - risk
    else:
        assert decision.inclusion == 1.0


@given(confidences, confidences, shares, shares, draws)
def test_a_surer_answer_is_never_the_one_that_is_asked_about(
    a: Confidence, b: Confidence, risk: float, share: float, draw: float
) -> None:
    policy = Policy(risk, share)
    if (
        (a.novel, a.calibrated) == (b.novel, b.calibrated)
        and a.p <= b.p
        and decide(a, policy, draw).action != "escalate"
    ):
        assert decide(b, policy, draw).action != "escalate"


@given(confidences, shares, shares, draws)
def test_a_device_that_may_ask_nobody_always_answers(
    confidence: Confidence, risk: float, share: float, draw: float
) -> None:
    assert decide(confidence, Policy(risk, share, escalate=False), draw).action == "accept"


def test_the_audited_share_is_the_share_asked_for_and_is_its_inclusion_probability() -> None:
    chance = random.Random(7)
    decisions = [decide(SURE, Policy(audit_share=0.2), chance.random()) for _ in range(20_000)]
    audited = [decision for decision in decisions if decision.action == "audit"]
    assert len(audited) / len(decisions) == pytest.approx(0.2, abs=0.01)
    assert {decision.inclusion for decision in decisions} == {0.2}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"target_risk": 1.5}, "target_risk=1.5: must be a number between 0 and 1"),
        ({"target_risk": math.nan}, "target_risk=nan"),
        ({"target_risk": True}, "target_risk=True"),
        ({"audit_share": -0.1}, "audit_share=-0.1"),
        ({"audit_share": "much"}, "audit_share='much'"),
        ({"escalate": "no"}, "escalate='no': must be true or false"),
    ],
)
def test_impossible_policies_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Policy(**values)  # type: ignore[arg-type]
