"""The judgement of a canary from what devices did (rows L11-L13); how often it is wrong is test_canary_chance.py's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trainer.core.canary import CanaryRules, Finding, Fleet, Judgement, Tally, Verdict, judge, look_levels, measures
from trainer.core.contrast import contrast, of_rates, of_shares, of_values
from trainer.core.sequential import log_evidence

RULES = CanaryRules()
HOUR = Tally(
    items=3600, escalated=720, errors=4, audited=100, agreed=90, hours=1.0, crashes=0,
    latency_ms=[50.0] * 30, memory_mib=[300.0] * 30, temperature_c=[55.0] * 30,
)  # fmt: skip
DAY = replace(HOUR, items=86400, escalated=17280, errors=96, audited=1728, agreed=1555, hours=24.0)


def fleet(canary: Tally = HOUR, control: Tally = HOUR, before: Tally | None = DAY, canaries: int = 5) -> Fleet:
    """47 devices: all canaries alike, all others alike."""
    ours = {f"c{number}": canary for number in range(canaries)}
    others = {f"d{number}": control for number in range(47 - canaries)}
    return Fleet(ours, others, dict.fromkeys([*ours, *others], before) if before else {})


def looked(found: Fleet, look: int | None = 0, rules: CanaryRules = RULES) -> Judgement:
    return judge(found, rules, look=look, extensions=3)


def finding(found: Judgement, measure: str) -> Finding:
    return next(each for each in found.findings if each.measure == measure)


def test_l12_a_canary_that_is_like_the_others_passes_with_its_numbers() -> None:
    found = looked(fleet())
    assert found.verdict is Verdict.FINE
    assert found.audited == 500
    assert "audited agreement 0.900 on 5 canaries (500) against 0.900 on 42 others: +0.000 ± 0.0" in found.reason


WORSE: list[tuple[str, dict[str, Any]]] = [
    ("audited agreement", {"agreed": 78}),
    ("escalation rate", {"escalated": 1300}),
    ("error rate", {"errors": 200}),
    ("crashes an hour", {"crashes": 2}),
    ("p95 latency", {"latency_ms": [75.0] * 30}),
    ("memory", {"memory_mib": [420.0] * 30}),
    ("temperature", {"temperature_c": [66.0] * 30}),
]


@pytest.mark.parametrize(("measure", "changes"), WORSE, ids=[name for name, _ in WORSE])
def test_l12_each_measure_alone_brings_a_canary_back(measure: str, changes: dict[str, Any]) -> None:
    found = looked(fleet(replace(HOUR, **changes)))
    assert found.verdict is Verdict.WORSE
    assert [each.measure for each in found.findings if each.verdict is Verdict.WORSE] == [measure]
    assert measure in found.reason


@pytest.mark.parametrize(("measure", "changes"), WORSE, ids=[name for name, _ in WORSE])
def test_l12_what_the_others_do_too_is_not_the_releases_fault(measure: str, changes: dict[str, Any]) -> None:
    """The light changes, or the summer comes: for everybody at once."""
    assert looked(fleet(replace(HOUR, **changes), replace(HOUR, **changes))).verdict is Verdict.FINE, measure


@pytest.mark.parametrize(("measure", "changes"), WORSE, ids=[name for name, _ in WORSE])
def test_l12_devices_that_were_so_before_are_not_made_worse_by_a_release(measure: str, changes: dict[str, Any]) -> None:
    same = fleet(replace(HOUR, **changes))
    scale = {"agreed": 17.28, "escalated": 24, "errors": 24, "crashes": 24}
    were = {key: int(value * scale[key]) if key in scale else value for key, value in changes.items()}
    before = {**same.before, **dict.fromkeys(same.canary, replace(DAY, **were))}
    assert looked(replace(same, before=before)).verdict is Verdict.FINE, measure


def test_l12_what_is_much_better_passes() -> None:
    better = replace(HOUR, escalated=100, agreed=99, errors=0, latency_ms=[20.0] * 30, memory_mib=[200.0] * 30)
    assert looked(fleet(better)).verdict is Verdict.FINE


def test_l12_a_clearly_bad_release_is_called_so_between_the_planned_looks_and_a_good_one_never_passes_there() -> None:
    assert looked(fleet(), look=None).verdict is Verdict.UNSURE
    assert looked(fleet(replace(HOUR, agreed=50)), look=None).verdict is Verdict.WORSE


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (fleet(replace(HOUR, audited=79, agreed=71)), "395 audited answers of canaries, 400 are needed"),
        (fleet(replace(HOUR, audited=0, agreed=0)), "audited agreement: no canary reports it"),
        (fleet(replace(HOUR, items=10, escalated=2, errors=0)), "50 canary and"),
        (fleet(control=Tally()), "18000 canary and 0 control items"),
        (fleet(control=replace(HOUR, audited=0, agreed=0)), "audited agreement: nothing to compare it with"),
        (fleet(replace(HOUR, latency_ms=[])), "p95 latency: no canary reports it"),
        (fleet(replace(HOUR, memory_mib=[math.nan] * 9)), "memory: no canary reports it"),
        (Fleet(), "0 canary and 0 earlier items"),
    ],
)
def test_l12_too_little_evidence_is_inconclusive_and_says_what_is_missing(found: Fleet, said: str) -> None:
    judged = looked(found)
    assert judged.verdict is Verdict.UNSURE
    assert said in judged.reason


def test_l12_a_change_that_could_still_be_large_does_not_pass() -> None:
    now = fleet(replace(HOUR, audited=400, agreed=360), canaries=1)
    control = {name: replace(HOUR, agreed=80 + 20 * (number % 2)) for number, name in enumerate(now.control)}
    few = looked(replace(now, control=control, before={}))  # no past, and the others differ by ten points
    assert few.verdict is Verdict.UNSURE
    assert "audited agreement" in few.reason
    assert "does not exclude a change for the worse of +0.100" in few.reason


def test_what_no_device_reports_is_not_judged() -> None:
    without = replace(HOUR, temperature_c=[], crashes=None)
    assert looked(fleet(without, without, replace(DAY, temperature_c=[], crashes=None))).verdict is Verdict.FINE


def test_without_planned_audits_agreement_is_not_judged() -> None:
    blind = replace(HOUR, audited=0, agreed=0)
    found = looked(fleet(blind, blind), rules=CanaryRules(audits_planned=0))
    assert found.verdict is Verdict.FINE
    assert "audited agreement" not in [each.measure for each in found.findings]


def test_a_fleet_of_one_is_compared_with_its_own_past() -> None:
    alone = Fleet({"d1": replace(HOUR, audited=400, agreed=360)}, {}, {"d1": DAY})
    assert looked(alone).verdict is Verdict.FINE
    bad = Fleet({"d1": replace(HOUR, audited=400, agreed=280)}, {}, {"d1": DAY})
    assert looked(bad).verdict is Verdict.WORSE
    assert "against 0.900 before" in looked(bad).reason


def test_a_difference_in_differences_by_hand() -> None:
    """Two canaries of ten devices, a long baseline: the change of the means is the answer."""
    canary = np.arange(10) < 2
    before = np.linspace(800_000, 900_000, 10)
    now = before - 20_000 - 50_000 * canary
    n = np.full(10, 1e6)
    found = contrast(of_shares(before, n, now, n, canary), canary, 0.05, 0.02)
    assert float(found.change) == pytest.approx(-0.05, abs=1e-4)


def test_the_fewer_devices_the_wider_the_error() -> None:
    """The device is the unit: the same number of items from more devices says more."""

    def error(canaries: int) -> float:
        canary, n = np.arange(100) < canaries, np.full(100, 1000.0)
        items = np.where(canary, 2000.0 / canaries, 1000.0)
        moved = np.where(canary, 0.5, np.where(np.arange(100) % 2, 0.45, 0.55))  # by five points, by themselves
        found = contrast(of_shares(n * 0.5, n, items * moved, items, canary), canary, 0.05, 0.02)
        return math.sqrt(float(found.variance))

    assert error(1) > 1.5 * error(4) > 1.5 * error(20)


def test_rates_and_values_without_a_reading_are_no_numbers() -> None:
    canary = np.array([True, False])
    rates = of_rates(np.zeros(2), np.zeros(2), np.array([3.0, 0.0]), np.array([2.0, 0.0]), canary)
    assert rates.now[0] == 1.5
    assert np.isnan(rates.now[1])
    values = of_values([[], [4.0]], [[1.0, math.e], [0.0]], 0.1, log=True)
    assert values.now[0] == pytest.approx(0.5)
    assert np.isnan(values.now[1])  # no logarithm
    assert np.isnan(values.before[0])


def test_evidence_is_none_without_an_estimate_and_symmetric_in_nothing() -> None:
    assert log_evidence(math.nan, 1.0, 0.1) == 0
    assert log_evidence(0.1, math.inf, 0.1) == 0
    assert log_evidence(-5.0, 0.01, 0.1) < 0 < log_evidence(0.5, 0.01, 0.1)
    assert np.isfinite(log_evidence(-1e6, 1e-6, 0.1))


def test_the_levels_add_up() -> None:
    assert sum(each.level for each in measures(RULES)) == pytest.approx(1)
    sequence, first, later = look_levels(measures(RULES)[0], RULES, 1, 3)
    assert sequence + first + 3 * later == pytest.approx(0.65 * 0.05)  # the share of agreement
