"""The gate for adapters, row by row: it passes what is better and was measured, and nothing else."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.parities import SAME, Parity
from trainer.core.crossed import Crossed, pair_up
from trainer.core.gate_text import Evidence, Rules, Scores, judge
from trainer.core.targets import MIB, Footprint, Target

NAMES = tuple(f"e{number}" for number in range(20))
KEPT = tuple(f"k{number}" for number in range(12))
LENGTHS = tuple(3 + number % 3 for number in range(20))


def scores(each: float, release: str = "a@1.0", names: tuple[str, ...] = NAMES, margin: float | None = None) -> Scores:
    """A model that loses `each` nats a token, with some spread from example to example."""
    losses = tuple(each * tokens + 0.01 * (place % 5) for place, tokens in enumerate(LENGTHS[: len(names)]))
    margins = () if margin is None else tuple(margin + 0.01 * (place % 5) for place in range(len(names)))
    return Scores(release, names, LENGTHS[: len(names)], losses, margins)


def leads(each: float, count: int = 6, spread: float = 0.1) -> Crossed:
    """What a model makes of `count` pairs of exchanged answers."""
    pairs = tuple((f"e{2 * number}", f"e{2 * number + 1}") for number in range(count))
    return Crossed(pairs, tuple(each + spread * (number % 3 - 1) for number in range(count)))


GOOD = Evidence(
    held_out=frozenset(NAMES), trained=frozenset({"t1", "t2"}), candidate=scores(0.5), base=scores(2.0),
    adapter_sha256="new", checkpoint_base=2.0, checkpoint_adapter=0.5, shipped_base=2.01, shipped_adapter=0.52,
    near_duplicates=frozenset(), calibration_method="scaled", calibration_items=120, calibration_ece=0.04, latency_ms=1200.0,
    before_latency_ms=1000.0, model_bytes=3 * MIB, kept_out=frozenset(KEPT), kept=scores(1.0, names=KEPT),
    kept_base=scores(1.0, names=KEPT), parity=(SAME,),
    matching=leads(9.0), base_matching=leads(8.0),
)  # fmt: skip
QUICK = replace(GOOD, latency_ms=59.0, before_latency_ms=10.0)
BARE = replace(GOOD, calibration_method="uncalibrated", calibration_items=40, calibration_ece=None)
AGAIN = replace(GOOD, has_current=True, current=scores(1.0), current_sha256="old")
PAIRS = replace(GOOD, pairs=True, candidate=scores(2.0, margin=3.0), base=scores(2.0, margin=-1.0))


def verdict(found: Evidence) -> Any:
    return judge(found, Rules(), np.random.default_rng(0))


@pytest.mark.parametrize("found", [GOOD, AGAIN, PAIRS, BARE, QUICK])
def test_what_is_better_passes(found: Evidence) -> None:
    assert verdict(found).reasons == []


@pytest.mark.parametrize(
    ("found", "check"),
    [
        (replace(GOOD, candidate=None), "measured (candidate)"),
        (replace(GOOD, base=None), "measured (base)"),
        (replace(GOOD, held_out=frozenset()), "holdout_examples"),
        (replace(GOOD, held_out=frozenset(NAMES[:9]), candidate=scores(0.5, names=NAMES[:9]),
                 base=scores(2.0, names=NAMES[:9])), "holdout_examples"),
        (replace(GOOD, trained=frozenset()), "training_known"),
        (replace(GOOD, trained=frozenset({"t1", "e3"})), "disjoint"),
        (replace(GOOD, candidate=scores(0.5, names=NAMES[:19])), "measured (candidate)"),
        (replace(GOOD, candidate=scores(math.nan)), "gain"),
        (replace(GOOD, candidate=scores(math.inf)), "gain"),
        (replace(GOOD, candidate=scores(2.0)), "gain"),
        (replace(GOOD, candidate=scores(2.2)), "gain"),
        (replace(GOOD, shipped_adapter=0.6), "export"),
        (replace(GOOD, shipped_adapter=None), "export"),
        (replace(GOOD, checkpoint_adapter=math.nan), "export"),
        (replace(GOOD, shipped_base=3.0, shipped_adapter=1.5), "base_parity"),
        (replace(GOOD, checkpoint_base=None), "base_parity"),
        (replace(GOOD, parity=()), "parity"),
        (replace(GOOD, parity=(SAME, Parity("adapter", 0.11, 0.1, False))), "parity (adapter)"),
        (replace(GOOD, parity=(Parity("logits", math.nan, 0.1, True),)), "parity (logits)"),
        (replace(GOOD, matching=None), "matching"),
        (replace(GOOD, base_matching=None), "matching"),
        (replace(GOOD, matching=leads(9.0, 4), base_matching=leads(8.0, 4)), "matching_pairs"),
        (replace(GOOD, matching=leads(9.0, 7)), "matching"),
        (replace(GOOD, matching=leads(math.nan)), "matching"),
        (replace(GOOD, matching=leads(math.inf)), "matching"),
        (replace(GOOD, base_matching=leads(math.nan)), "matching"),
        (replace(GOOD, matching=leads(0.0), base_matching=leads(0.0)), "matching"),
        (replace(GOOD, matching=leads(0.1, spread=1.0), base_matching=leads(0.0)), "matching"),
        (replace(GOOD, matching=leads(7.0)), "matching (base)"),
        (replace(AGAIN, adapter_sha256="old"), "new_bytes"),
        (replace(AGAIN, current_sha256=""), "new_bytes"),
        (replace(AGAIN, current=None), "gain (current)"),
        (replace(AGAIN, current=scores(0.5)), "gain (current)"),
        (replace(PAIRS, candidate=scores(2.0, margin=-1.0)), "gain"),
        (replace(PAIRS, candidate=scores(2.0)), "gain"),
        (replace(PAIRS, candidate=scores(2.5, margin=3.0)), "wanted"),
        (replace(PAIRS, candidate=scores(2.0, margin=-0.5)), "preferred"),
        (replace(PAIRS, candidate=scores(2.0)), "preferred"),
        (replace(GOOD, kept=scores(1.06, names=KEPT)), "forgetting"),
        (replace(GOOD, kept=scores(math.nan, names=KEPT)), "forgetting"),
        (replace(GOOD, kept=None), "forgetting"),
        (replace(GOOD, kept_base=None), "forgetting"),
        (replace(GOOD, kept=scores(0.5, names=KEPT[:11])), "forgetting"),
        (replace(GOOD, kept=scores(0.5, names=KEPT[:11]), kept_base=scores(0.5, names=KEPT[:11])),
         "measured (candidate, base set)"),
        (replace(GOOD, kept_out=frozenset(), kept=None, kept_base=None), "base_examples"),
        (replace(GOOD, kept_out=frozenset(KEPT[:9]), kept=scores(1.0, names=KEPT[:9]),
                 kept_base=scores(1.0, names=KEPT[:9])), "base_examples"),
        (replace(GOOD, trained=frozenset({"t1", "k3"})), "disjoint"),
        (replace(GOOD, near_duplicates=frozenset({"k4"})), "near_duplicates"),
        (replace(GOOD, near_duplicates=None), "near_duplicates"),
        (replace(GOOD, near_duplicates=frozenset({"e4", "elsewhere"})), "near_duplicates"),
        (replace(GOOD, calibration_method=""), "calibrated"),
        (replace(GOOD, calibration_ece=0.11), "calibration"),
        (replace(GOOD, calibration_ece=None), "calibration"),
        (replace(GOOD, calibration_ece=math.nan), "calibration"),
        (replace(GOOD, latency_ms=2001.0), "latency"),
        (replace(GOOD, latency_ms=None), "latency"),
        (replace(GOOD, before_latency_ms=None), "latency"),
        (replace(GOOD, before_latency_ms=0.0), "latency"),
        (replace(GOOD, before_latency_ms=math.inf), "latency"),
        (replace(GOOD, latency_ms=math.nan), "latency"),
        (replace(GOOD, latency_ms=60.1, before_latency_ms=10.0), "latency"),
    ],
)  # fmt: skip
def test_what_is_not_measured_or_not_better_fails_and_says_which(found: Evidence, check: str) -> None:
    judged = verdict(found)
    assert not judged.passed
    assert check in [each.name for each in judged.checks if not each.passed]


def test_a_gain_that_chance_explains_is_none() -> None:
    luck = np.random.default_rng(3).normal(0, 1, 20)
    noisy = replace(scores(2.0), losses=tuple(float(loss - 0.05 + jump) for loss, jump in zip(
        scores(2.0).losses, luck - luck.mean(), strict=True)))  # fmt: skip
    judged = verdict(replace(GOOD, candidate=noisy))
    gain = next(each for each in judged.checks if each.name == "gain")
    assert noisy.loss < scores(2.0).loss
    assert not gain.passed
    assert "no better than the bare base" in gain.reason


def test_nobody_looks_at_what_is_forgotten_only_where_that_is_said() -> None:
    none = replace(GOOD, kept_out=frozenset(), kept=None, kept_base=None)
    (said,) = [reason for reason in verdict(none).reasons if "examples of what" in reason]
    assert "trainer holdout freeze MODEL --set base" in said
    told = Rules(kept_examples_min=0)
    assert judge(none, told, np.random.default_rng(0)).passed
    forgets = replace(GOOD, kept=scores(1.5, names=KEPT))
    assert not judge(forgets, told, np.random.default_rng(0)).passed, "what is there is looked at all the same"


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (replace(GOOD, matching=leads(7.3)), "a tenth less than the base's may be noise of what answers look like now"),
        (replace(GOOD, matching=leads(7.0, spread=3.0)), "less, but not surely"),
        (replace(GOOD, matching=leads(1.0), base_matching=leads(-3.0)), "the base was wrong"),
        (replace(PAIRS, matching=None, base_matching=None), "of pairs both answers are to one question"),
    ],
)
def test_answers_that_follow_from_the_questions_pass(found: Evidence, why: str) -> None:
    assert verdict(found).reasons == [], why


@pytest.mark.parametrize(
    ("answers", "pairs"),
    [
        ([], []),
        (["yes"], []),
        (["yes", " YES ", "yes"], []),
        (["yes", "no"], [(0, 1)]),
        (["yes", "yes", "yes", "no", "no"], [(0, 3), (1, 4)]),
        (["a", "b", "c", "c", "c"], [(0, 2), (1, 3)]),
        (["a", "b", "c", "d"], [(0, 1), (2, 3)]),
    ],
)
def test_examples_are_paired_with_those_of_another_answer(answers: list[str], pairs: list[tuple[int, int]]) -> None:
    assert pair_up(answers) == pairs
    assert pair_up(answers, 1) == pairs[:1]


def test_nothing_measured_at_all_fails() -> None:
    assert not verdict(Evidence(frozenset(), frozenset(), None, None)).passed


def test_too_few_answers_to_calibrate_are_said_and_refused_only_where_that_is_asked() -> None:
    judged = verdict(BARE)
    said = next(each for each in judged.checks if each.name == "calibrated")
    assert judged.passed
    assert "uncalibrated: 40 answers are too few" in said.reason
    assert "calibration" not in [each.name for each in judged.checks], "there is no error to bound"
    for found, passes in ((BARE, False), (GOOD, True), (replace(GOOD, calibration_items=99), False)):
        strict = judge(found, Rules(calibration_items_min=100), np.random.default_rng(0))
        assert strict.passed is passes


PI = Target("pi", file_mib_max=4.0, memory_mib_max=100.0)
FITS = replace(
    GOOD, footprints=(Footprint("pi", 90 * MIB, 30.0),), before_footprints=(Footprint("pi", 80 * MIB, 20.0),)
)


@pytest.mark.parametrize(
    ("found", "target", "failed"),
    [
        (FITS, PI, []),
        (FITS, replace(PI, file_mib_max=2.9), ["size (pi)"]),
        (FITS, replace(PI, memory_mib_max=89.0), ["memory (pi)"]),
        (FITS, replace(PI, latency_ms_max=29.0), ["latency (pi)"]),
        (replace(FITS, before_footprints=(Footprint("pi", 80 * MIB, 14.0),)), PI, ["latency (pi)"]),
        (replace(FITS, footprints=(Footprint("pi", error="it died"),)), PI, ["memory (pi)", "latency (pi)"]),
        (replace(FITS, footprints=()), PI, ["memory (pi)", "latency (pi)"]),
        (replace(FITS, model_bytes=None), PI, ["size (pi)"]),
        (FITS, Target("pi", problem="it makes no claim"), ["size (pi)", "memory (pi)"]),
    ],
)
def test_base_and_adapter_must_fit_every_profile(found: Evidence, target: Target, failed: list[str]) -> None:
    judged = judge(found, Rules(), np.random.default_rng(0), [target])
    assert [each.name for each in judged.checks if not each.passed] == failed


def test_docs_name_every_rule_with_its_default_and_every_check() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gate.md").read_text()
    adapters = text[text.index("## Adapters") :]
    for rule in fields(Rules):
        assert f"`{rule.name}` = {getattr(Rules(), rule.name)}" in adapters, rule.name
    checks = {each.name for found in (GOOD, AGAIN, PAIRS) for each in verdict(found).checks}
    for name in {*checks, "size (PROFILE)", "memory (PROFILE)", "latency (PROFILE)", "parity"}:
        shown = re.sub(r"^(measured|parity) \(.*", r"\1 (WHAT)", name)
        assert f"`{shown}`" in adapters or "current" in name, name


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ({"gain_confidence": 0}, "gain_confidence = 0: use a number from 0.5"),
        ({"gain_confidence": 7}, "gain_confidence = 7"),
        ({"examples_min": 0}, "examples_min = 0: use a number from 1"),
        ({"bootstrap_draws": 1}, "bootstrap_draws = 1: use a number from 100"),
        ({"parity_max": math.inf}, "parity_max = inf"),
        ({"forget_max": math.nan}, "forget_max = nan"),
        ({"ece_max": 2}, "ece_max = 2: use a number from 0 to 1"),
    ],
)
def test_a_bound_that_bounds_nothing_is_refused(bound: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rules(**bound)


def test_every_bound_is_bounded() -> None:
    from trainer.core.gate_text import _ALLOWED

    assert set(_ALLOWED) == {each.name for each in fields(Rules)}
