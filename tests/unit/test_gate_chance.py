"""How often the gate errs: simulated holdouts, thousands of them, with models whose quality is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.parities import SAME
from trainer.core.evaluation import Counts, Evaluation
from trainer.core.gate import Evidence, Holdout, Rules, gain_interval, judge
from trainer.core.paired import chance_of_gain, class_drops, resampled

RUNS = 1000
RULES = Rules(bootstrap_draws=200)
SURELY_MAX = 0.05 + 3 * np.sqrt(0.05 * 0.95 / RUNS)  # three standard errors of a share of 5 %


def scored(name: str, skill: np.ndarray, rng: np.random.Generator, extra: float = 0.15) -> Evaluation:
    """A model that finds the box of class c in image n with the probability `skill[n, c]`, and errs by an extra box."""
    hits = rng.random(skill.shape) < skill
    extras = rng.random(skill.shape) < extra
    table = np.stack([hits, extras, ~hits], axis=2).astype(int)
    counts: list[Counts] = [(int(a), int(b), int(c)) for a, b, c in table.sum(axis=1)]
    by_class: list[Counts] = [(int(a), int(b), int(c)) for a, b, c in table.sum(axis=0)]
    rows = [(n, c, *map(int, table[n, c])) for n in range(skill.shape[0]) for c in range(skill.shape[1])]
    labels = [f"c{c}" for c in range(skill.shape[1])]
    images = [f"{name}{n}" for n in range(skill.shape[0])]
    return Evaluation("r@1.0", labels, images, counts, by_class, 0.8, 0.5, [0.8] * len(labels), 4.0, class_rows=rows)  # type: ignore[arg-type]


def holdout(rng: np.random.Generator, images: int = 60, classes: int = 2) -> np.ndarray:
    """Hard images and easy ones: what one model misses another often misses too."""
    return np.clip(rng.beta(2.0, 0.6, size=(images, 1)) + rng.normal(0, 0.05, size=(images, classes)), 0.02, 0.99)


def evidence(letter: str, target: Evaluation, base: Evaluation) -> Evidence:
    return Evidence(letter * 64, letter * 64, target, base, "logistic", 0.03, 0.81, 0.8, parity=(SAME,))


def passes(run: int, gain: float, images: int = 60) -> bool:
    """Whether a model that finds `gain` of what its predecessor misses passes the whole gate."""
    rng = np.random.default_rng(run)
    target, base = holdout(rng, images), holdout(rng, images)
    old = evidence("a", scored("t", target, rng), scored("b", base, rng))
    new = evidence("b", scored("t", target + gain * (1 - target), rng), scored("b", base + gain * (1 - base), rng))
    sets = [frozenset(each.images) for each in (old.target, old.base) if each is not None]
    return judge(new, old, Holdout(sets[0], sets[1], frozenset({"s"}), frozenset()), RULES, rng).passed


def test_the_same_model_again_passes_in_at_most_5_percent() -> None:
    share = sum(passes(run, 0.0) for run in range(RUNS)) / RUNS
    assert share <= SURELY_MAX, share


def test_a_real_gain_mostly_passes() -> None:
    share = sum(passes(run, 0.6, images=150) for run in range(100)) / 100
    assert share >= 0.8, share


def sides(rng: np.random.Generator, images: int, differ: float) -> list[np.ndarray]:
    """Two equally good models of one box an image; they differ in this share of the images."""
    first = rng.random(images) < 0.7
    second = np.where(rng.random(images) < differ, rng.random(images) < 0.5, first)
    swap = rng.random(images) < 0.5
    pair = np.where(swap, second, first), np.where(swap, first, second)
    return [np.stack([each, ~each, ~each], axis=1).astype(np.int64) for each in pair]


@pytest.mark.parametrize(("images", "differ"), [(60, 0.05), (200, 0.03), (200, 0.5), (1000, 0.01)])
def test_neither_few_nor_many_differences_make_a_gain(images: int, differ: float) -> None:
    """The bootstrap alone is too sure of three images that all went one way; a coin does that in an eighth of the cases."""
    wrong = 0
    for run in range(RUNS):
        rng = np.random.default_rng(run)
        new, old = sides(rng, images, differ)
        low = gain_interval(new, old, RULES, rng)[1]
        wrong += low > 0 and chance_of_gain(new, old, 200, rng) <= 0.05
    assert wrong / RUNS <= SURELY_MAX, wrong


def test_the_interval_holds_its_promise() -> None:
    """The bootstrap alone, where many images differ: the true gain, 0, lies below its lower end in one case of twenty."""
    wrong = 0
    for run in range(RUNS):
        rng = np.random.default_rng(run)
        new, old = sides(rng, 150, 0.8)
        wrong += gain_interval(new, old, RULES, rng)[1] > 0
    assert 0.02 <= wrong / RUNS <= SURELY_MAX + 0.01, wrong


def test_swapping_is_exact_where_every_swap_can_be_counted() -> None:
    new = np.array([[1, 0, 0]] * 4 + [[1, 0, 0]] * 20)
    old = np.array([[0, 1, 1]] * 4 + [[1, 0, 0]] * 20)
    assert chance_of_gain(new, old, 20_000, np.random.default_rng(0)) == pytest.approx(1 / 16, abs=0.006)
    assert chance_of_gain(old, new, 20_000, np.random.default_rng(0)) == 1.0
    assert chance_of_gain(new, new, 100, np.random.default_rng(0)) == 1.0


def test_the_bootstrap_agrees_with_the_formula_for_a_mean() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(500, 1))
    means = resampled(values, 4000, np.random.default_rng(2))[:, 0] / 500
    assert means.std() == pytest.approx(values.std() / np.sqrt(500), rel=0.05)
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)


def test_a_small_class_that_is_as_good_as_before_is_seldom_refused() -> None:
    """Of each class on its own, with 12 boxes: a bare bound of 0.1 refuses many models that lost nothing."""
    refused = bare = 0
    for run in range(RUNS):
        rng = np.random.default_rng(run)
        skill = holdout(rng, 12, 1)
        new, old = (scored("t", skill, rng).by_class() for _ in range(2))
        drop, low, _ = class_drops(new, old, 200, 0.95, rng)[0]
        bare += drop > RULES.class_drop_max
        refused += drop > RULES.class_drop_max and low > 0
    assert refused / RUNS <= 0.11, refused  # so few images make the interval too narrow: the error refuses
    assert bare / RUNS > 0.15, "else this test shows nothing"


def test_a_class_without_an_image_in_a_draw_says_nothing_in_it() -> None:
    old = np.zeros((200, 1, 3), np.int64)
    old[0, 0] = 6, 0, 0
    new = np.zeros_like(old)
    new[0, 0] = 0, 0, 6
    assert class_drops(new, old, 400, 0.95, np.random.default_rng(0)) == [(1.0, 1.0, 1.0)]
    nothing = np.zeros((5, 1, 3), np.int64)
    drop, low, _ = class_drops(nothing, nothing, 100, 0.95, np.random.default_rng(0))[0]
    assert drop == 0.0
    assert np.isnan(low)


def test_the_simulated_gate_refuses_by_the_gain_alone() -> None:
    """The runs above measure the gain only when nothing else refuses them."""
    rng = np.random.default_rng(5)
    skill = holdout(rng)
    old = evidence("a", scored("t", skill, rng), scored("b", skill, rng))
    new = replace(old, model_sha256="b" * 64, weights_sha256="b" * 64)
    images = [frozenset(each.images) for each in (old.target, old.base) if each is not None]
    result = judge(new, old, Holdout(images[0], images[1], frozenset({"s"}), frozenset()), RULES, rng)
    assert {check.name for check in result.checks if not check.passed} == {"gain", "chance"}
