"""The policy: doubt, threshold, hints, audits, on every combination that matters; and what audits are for."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.core.confidence import Confidence, accept_threshold
from edged.core.policy import Decision, Hints, Policy, decide, judge, lot, strongest_missed
from edged.engines.base import Detections, ImageStats
from edged.wire.manifest import Calibration, ReleaseManifest, RiskTable

SURE = Confidence(0.95, 0.0, False, True)
UNSURE = Confidence(0.5, 0.0, False, True)
NOVEL = Confidence(0.95, 9.0, True, True)
UNCALIBRATED = Confidence(0.99, 0.0, False, False)
ASKING = Policy(audit_share=0.25, empty_share=0.5)
ALONE = replace(ASKING, escalate=False)
FULL, EMPTY, WEAK, LOST = Hints(), Hints(empty=True), Hints(weak=True), Hints(lost=True)
FROM = 0.9  # the threshold


@pytest.mark.parametrize(
    ("confidence", "policy", "hints", "draw", "expected"),
    [
        (SURE, ASKING, FULL, 0.25, Decision("accept", "confident", 0.25)),
        (SURE, ASKING, FULL, 0.2499, Decision("audit", "audit", 0.25)),
        (SURE, ASKING, EMPTY, 0.4999, Decision("audit", "audit_empty", 0.5)),
        (SURE, ASKING, EMPTY, 0.5, Decision("accept", "confident", 0.5)),
        (UNSURE, ASKING, FULL, 0.9, Decision("escalate", "unsure", 1.0)),
        (UNSURE, ASKING, FULL, 0.0, Decision("escalate", "unsure", 1.0)),
        (NOVEL, ASKING, FULL, 0.9, Decision("escalate", "novel", 1.0)),
        (UNCALIBRATED, ASKING, FULL, 0.9, Decision("escalate", "uncalibrated", 1.0)),
        (SURE, ASKING, WEAK, 0.0, Decision("escalate", "weak", 1.0)),
        (SURE, ASKING, LOST, 0.0, Decision("escalate", "lost_track", 1.0)),
        (SURE, ASKING, Hints(empty=True, weak=True, lost=True), 0.0, Decision("escalate", "lost_track", 1.0)),
        (UNSURE, ASKING, Hints(weak=True, lost=True), 0.0, Decision("escalate", "unsure", 1.0)),
        (SURE, ALONE, FULL, 0.0, Decision("accept", "confident", 0.0)),
        (UNSURE, ALONE, FULL, 0.0, Decision("accept", "unsure", 0.0)),
        (NOVEL, ALONE, FULL, 0.0, Decision("accept", "novel", 0.0)),
        (UNCALIBRATED, ALONE, FULL, 0.0, Decision("accept", "uncalibrated", 0.0)),
        (SURE, ALONE, WEAK, 0.0, Decision("accept", "weak", 0.0)),
        (replace(SURE, p=FROM), ASKING, FULL, 0.9, Decision("accept", "confident", 0.25)),  # exactly at the threshold
        (replace(SURE, p=0.8999), ASKING, FULL, 0.9, Decision("escalate", "unsure", 1.0)),
        (replace(SURE, p=math.nan), ASKING, FULL, 0.9, Decision("escalate", "unsure", 1.0)),
        (replace(SURE, novelty=math.nan), ASKING, FULL, 0.9, Decision("escalate", "novel", 1.0)),
    ],
)
def test_decisions(confidence: Confidence, policy: Policy, hints: Hints, draw: float, expected: Decision) -> None:
    assert decide(confidence, policy, FROM, hints, draw) == expected


@pytest.mark.parametrize("threshold", [math.nan, 2.0, math.inf])
def test_a_threshold_that_nothing_reaches_accepts_nothing(threshold: float) -> None:
    assert decide(replace(SURE, p=1.0), ASKING, threshold, FULL, 0.9).action == "escalate"


shares = st.floats(0, 1)
draws = st.floats(0, 1, exclude_max=True)
numbers = st.floats(0, 1) | st.just(math.nan)
confidences = st.builds(Confidence, numbers, st.floats(0, 1e6) | st.just(math.nan), st.booleans(), st.booleans())
all_hints = st.builds(Hints, st.booleans(), st.booleans(), st.booleans())
policies = st.builds(Policy, target_risk=shares, audit_share=shares, empty_share=shares)


@st.composite
def calibrations(draw: st.DrawFn) -> Calibration:
    """With a risk table, and without."""
    method = draw(st.sampled_from(["logistic", "uncalibrated"]))
    thresholds = sorted(draw(st.lists(shares, min_size=1, max_size=6, unique=True)))
    bounds = sorted(draw(st.lists(shares, min_size=len(thresholds), max_size=len(thresholds))), reverse=True)
    risk = draw(st.booleans()) and RiskTable(thresholds=thresholds, bounds=bounds)
    return Calibration(method=method, risk=risk or None)


@given(confidences, policies, numbers, all_hints, draws)
def test_what_is_accepted_was_sure_enough(
    confidence: Confidence, policy: Policy, threshold: float, hints: Hints, draw: float
) -> None:
    decision = decide(confidence, policy, threshold, hints, draw)
    if decision.action == "escalate":
        assert decision.inclusion == 1.0
        return
    assert confidence.calibrated
    assert not confidence.novel
    assert confidence.p >= threshold
    assert not math.isnan(confidence.novelty)
    assert not hints.weak
    assert not hints.lost
    assert decision.inclusion == (policy.empty_share if hints.empty else policy.audit_share)


@given(confidences, shares, policies, calibrations(), all_hints, draws)
def test_a_surer_answer_is_never_the_one_that_is_asked_about(
    confidence: Confidence, more: float, policy: Policy, calibration: Calibration, hints: Hints, draw: float
) -> None:
    threshold = accept_threshold(calibration, policy.target_risk)
    surer = replace(confidence, p=max(confidence.p, more))
    if decide(confidence, policy, threshold, hints, draw).action != "escalate":
        assert decide(surer, policy, threshold, hints, draw).action != "escalate"


@given(confidences, policies, shares, calibrations(), all_hints, draws)
def test_whoever_bears_more_risk_asks_no_more(
    confidence: Confidence, policy: Policy, more: float, calibration: Calibration, hints: Hints, draw: float
) -> None:
    def asks(risk: float) -> bool:
        bold = replace(policy, target_risk=risk)
        return decide(confidence, bold, accept_threshold(calibration, risk), hints, draw).action == "escalate"

    low, high = sorted((policy.target_risk, more))
    assert asks(low) or not asks(high)


@given(confidences, policies, numbers, all_hints, draws)
def test_a_device_that_may_ask_nobody_always_answers(
    confidence: Confidence, policy: Policy, threshold: float, hints: Hints, draw: float
) -> None:
    decision = decide(confidence, replace(policy, escalate=False), threshold, hints, draw)
    assert (decision.action, decision.inclusion) == ("accept", 0.0)


def test_lots_are_uniform_and_the_same_for_the_same_item() -> None:
    lots = np.array([lot(f"item-{number}") for number in range(20_000)])
    assert (lots >= 0).all()
    assert (lots < 1).all()
    counts = np.histogram(lots, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-squared, 19 degrees of freedom, 0.1 %
    assert lot("item-7") == lots[7]


@pytest.mark.parametrize(
    ("scores", "boxes", "expected"),
    [
        ([], [], 0.0),
        ([0.9], [[0, 0, 10, 10]], 0.0),
        ([0.9, 0.24], [[0, 0, 10, 10], [20, 20, 30, 30]], 0.24),
        ([0.9, 0.24], [[0, 0, 10, 10], [0, 0, 10, 11]], 0.0),  # it speaks about the answered box
        ([0.24, 0.1], [[0, 0, 10, 10], [20, 20, 30, 30]], 0.24),
    ],
)
def test_the_strongest_candidate_where_nothing_was_answered(
    scores: list[float], boxes: list[list[float]], expected: float
) -> None:
    found = Detections(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.zeros(len(scores), np.int64)
    )
    assert strongest_missed(found, 0.25) == pytest.approx(expected)


def detected(*scores: float) -> Detections:
    """Boxes that lie apart, with these scores."""
    boxes = np.array([[30 * n, 0, 30 * n + 20, 20] for n in range(len(scores))], np.float32).reshape(-1, 4)
    return Detections(boxes, np.array(scores, np.float32), np.zeros(len(scores), np.int64))


@pytest.mark.parametrize(
    ("scores", "keys", "lost", "reason"),
    [
        ([0.9, 0.19], {}, False, "confident"),
        ([0.9, 0.21], {}, False, "weak"),
        ([0.21], {}, False, "weak"),
        ([0.9, 0.21], {"weak_margin": 0.03}, False, "confident"),
        ([0.9, 0.2499], {"weak_margin": 0.0}, False, "confident"),
        ([0.9], {}, True, "lost_track"),
        ([0.9], {"audit_share": 1.0, "empty_share": 0.0}, False, "audit"),
        ([0.1], {"audit_share": 0.0, "empty_share": 1.0}, False, "audit_empty"),
        ([], {"audit_share": 1.0, "empty_share": 0.0}, False, "confident"),
        ([0.9], {"target_risk": 0.001}, False, "unsure"),
        ([math.nan], {}, False, "novel"),
    ],
)
def test_what_a_release_found_is_judged(scores: list[float], keys: dict[str, float], lost: bool, reason: str) -> None:
    sure = Calibration(method="logistic", features=["kept"], mean=[0.0], scale=[1.0], weights=[0.0], bias=5.0)
    manifest = ReleaseManifest(
        release="toy@1.0", kind="detect", engine="onnx_detect", files={}, labels=["cat"], calibration=sure,
        created="2026-01-01T00:00:00Z",
    )  # fmt: skip
    judged = judge(detected(*scores), ImageStats(0.4, 0.2, 0.5), manifest, Policy(**keys), 0.5, lost)  # type: ignore[arg-type]
    assert judged.decision.reason == reason


# What audits are for: accuracy over audits and escalations, each weighted with one over its inclusion, is the accuracy of
# all answers; docs/policy.md has the formula.


def estimate(rows: list[tuple[bool, float]], items: int) -> tuple[float, float]:
    """Horvitz-Thompson estimate of the share of right answers, and its standard error; rows are (right, inclusion)."""
    total = sum(right / inclusion for right, inclusion in rows)
    variance = sum(right * (1 - inclusion) / inclusion**2 for right, inclusion in rows)
    return total / items, math.sqrt(variance) / items


def checked(
    policy: Policy, seed: int, inclusion: Callable[[Decision], float]
) -> tuple[float, list[tuple[bool, float]], int]:
    """A stream of answers: their true accuracy, the rows that were checked, how many there were."""
    chance, rows, right_ones, items = random.Random(seed), [], 0, 6000
    for number in range(items):
        p, empty = chance.random() ** 0.2, chance.random() < 0.3
        right = chance.random() < p * (0.7 if empty else 0.95)  # not as sure as it thinks, worse where it sees nothing
        decision = decide(Confidence(p, 0, False, True), policy, 0.8, Hints(empty=empty), lot(f"{seed}-{number}"))
        right_ones += right
        if decision.action != "accept":
            rows.append((right, inclusion(decision)))
    return right_ones / items, rows, items


@pytest.mark.parametrize(("audit", "empty"), [(0.02, 0.02), (0.05, 0.2), (0.3, 0.02), (1.0, 1.0)])
def test_weighted_accuracy_is_the_true_one_whatever_the_audit_shares(audit: float, empty: float) -> None:
    policy, inside, errors = Policy(audit_share=audit, empty_share=empty), 0, []
    for seed in range(40):
        truth, rows, items = checked(policy, seed, lambda decision: decision.inclusion)
        accuracy, deviation = estimate(rows, items)
        inside += abs(accuracy - truth) <= 1.96 * deviation + 1e-9
        errors.append(accuracy - truth)
    assert inside >= 34  # of 40 intervals of 95 %; fewer come by chance once in 1 500
    assert abs(np.mean(errors)) <= 4 * np.std(errors) / math.sqrt(40) + 1e-9


@pytest.mark.parametrize("wrong", [lambda d: 1.0, lambda d: 0.05 if d.action == "audit" else 1.0])
def test_weighted_accuracy_is_wrong_when_the_inclusion_is(wrong: Callable[[Decision], float]) -> None:
    policy, outside = Policy(audit_share=0.05, empty_share=0.3), 0
    for seed in range(10):
        truth, rows, items = checked(policy, seed, wrong)
        accuracy, deviation = estimate(rows, items)
        outside += abs(accuracy - truth) > 1.96 * deviation
    assert outside == 10


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"target_risk": 1.5}, "target_risk=1.5: must be a number between 0 and 1, for example 0.1"),
        ({"target_risk": math.nan}, "target_risk=nan"),
        ({"target_risk": True}, "target_risk=True"),
        ({"audit_share": -0.1}, "audit_share=-0.1"),
        ({"audit_share": "much"}, "audit_share='much'"),
        ({"empty_share": 2}, "empty_share=2"),
        ({"weak_margin": -1}, "weak_margin=-1"),
        ({"dedupe_s": 1e9}, "dedupe_s=1000000000.0: must be a number between 0 and 86400, for example 60.0"),
        ({"messages_per_minute": -1}, "messages_per_minute=-1: must be a whole number between 0 and 6000"),
        ({"messages_per_minute": 2.5}, "messages_per_minute=2.5: must be a whole number"),
        ({"messages_per_minute": True}, "messages_per_minute=True"),
        ({"bytes_per_day": 1 << 41}, "must be a whole number between 0 and 1099511627776, for example 268435456"),
        ({"escalate": "no"}, "escalate='no': must be true or false"),
    ],
)
def test_impossible_policies_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Policy(**values)  # type: ignore[arg-type]
