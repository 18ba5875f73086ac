"""How often a canary is judged wrongly, by simulation of the very functions that judge (rows L11-L13)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.core.canary import (
    CanaryRules,
    Fleet,
    Tally,
    Verdict,
    fine,
    judge,
    look_levels,
    measures,
    worse,
)
from trainer.core.contrast import contrast, of_shares
from trainer.core.planning import TIMES_MAX, audits_needed, power
from trainer.core.sequential import quantile, surely_above_zero

RULES = CanaryRules()
AGREEMENT = measures(RULES)[0]
EXTENSIONS = 3
PASSED_MAX = 0.065  # 0.05, and what 4 000 runs scatter


@dataclass(frozen=True, slots=True)
class World:
    """A fleet: how its devices differ, and how much of each is audited before and during the watch."""

    devices: int = 47
    canaries: int = 5
    accuracy: float = 0.9
    spread: float = 0.05
    drift: float = 0.0  # of a device by itself, between the two periods
    audits_before: int = 200  # a device
    audits_now: int = 80  # a device, in the whole watch
    tide: float = 0.0  # what happens to everybody in the watch
    loss: float = 0.0


def play(world: World, runs: int, looks: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """(change for the worse, variance) of shape (runs, looks): the audits come evenly over the looks."""
    dice = np.random.default_rng(seed)
    canary = np.arange(world.devices) < world.canaries
    level = world.accuracy + world.spread * dice.standard_normal((runs, world.devices))
    moved = level + world.drift * dice.standard_normal(level.shape) - world.tide - world.loss * canary
    before = dice.binomial(world.audits_before, np.clip(level, 0, 1)).astype(float)
    share = -(-world.audits_now // looks)
    right = dice.binomial(share, np.clip(moved, 0, 1)[:, None, :], (runs, looks, world.devices)).cumsum(1).astype(float)
    items = np.broadcast_to((share * np.arange(1, looks + 1.0))[:, None], right.shape)
    earlier = np.broadcast_to(before[:, None, :], right.shape)
    readings = of_shares(earlier, np.full(right.shape, float(world.audits_before)), right, items, canary)
    found = contrast(readings, canary, AGREEMENT.spread, AGREEMENT.drift)
    return AGREEMENT.sign * found.change, found.variance


def aborted(world: World, runs: int = 1000, looks: int = 20, seed: int = 1, peeking: bool = True) -> float:
    """The share of watches in which the release is called worse, looked at `looks` times and judged at the end."""
    change, variance = play(world, runs, looks, seed)
    sequence, first, _ = look_levels(AGREEMENT, RULES, 1, EXTENSIONS)
    at_end = worse(change[:, -1], variance[:, -1], AGREEMENT, sequence, first)
    if peeking:
        at_end |= worse(change, variance, AGREEMENT, sequence, None).any(1)
    return float(at_end.mean())


SAME = [
    World(),
    World(drift=0.02),
    World(tide=0.1),  # the light changes for everybody
    World(devices=200, canaries=20),
    World(devices=3, canaries=1, audits_now=400),
    World(devices=10, canaries=1, audits_now=400, drift=0.02),
    World(audits_before=20),  # a short baseline
    World(audits_before=0),  # none at all
    World(accuracy=0.97, spread=0.02),
]


BAD = [
    World(),  # 5 canaries, 80 audits each
    World(drift=0.02),
    World(accuracy=0.8),
    World(audits_before=80),
    World(devices=100, canaries=10, audits_now=40),
    World(devices=10, canaries=1, audits_now=400, drift=0.01, audits_before=1000),
]


def name_of(world: World) -> str:
    given = [f"{key}={getattr(world, key)}" for key in World.__slots__ if getattr(world, key) != getattr(World(), key)]
    return " ".join(given) or "default"


@pytest.mark.parametrize("world", SAME, ids=name_of)
def test_l12_a_release_as_good_as_the_old_one_is_seldom_called_worse(world: World) -> None:
    """The whole level of all measures is 5 %; agreement has 0.65 of it. Looked at on the way, and judged at the end."""
    assert aborted(world) <= 0.04


@pytest.mark.parametrize("world", BAD, ids=name_of)
def test_l12_a_loss_of_ten_points_is_caught_with_400_audited_canary_answers(world: World) -> None:
    assert world.canaries * world.audits_now >= 400
    assert aborted(replace(world, loss=0.1)) >= 0.95


@dataclass(frozen=True, slots=True)
class Ends:
    """The shares of rollouts that end so, and the audits that the first watch planned."""

    audits: int
    aborted: float
    passed: float
    held: float


def course(world: World, runs: int = 1000, looks: int = 10, seed: int = 11) -> Ends:
    """Whole rollouts, agreement alone: the planned audits come evenly over `looks` looks of a watch, and each extension
    brings as many again. They end with the first look that says so, or are held."""
    others = world.devices - world.canaries
    audits = audits_needed(RULES, world.canaries, others, world.audits_before, extensions=EXTENSIONS)
    canary, dice = np.arange(world.devices) < world.canaries, np.random.default_rng(seed)
    share = np.where(canary, -(-audits // world.canaries // looks), np.maximum(1, audits // others // looks))
    level = world.accuracy + world.spread * dice.standard_normal((runs, world.devices))
    moved = level + world.drift * dice.standard_normal(level.shape) - world.tide - world.loss * canary
    before = dice.binomial(world.audits_before, np.clip(level, 0, 1)).astype(float)
    right, audited = np.zeros(level.shape), np.zeros(level.shape)
    aborted, passed = np.zeros(runs, np.bool_), np.zeros(runs, np.bool_)
    sequence, first, later = look_levels(AGREEMENT, RULES, 1, EXTENSIONS)
    for number in range(looks * (1 + EXTENSIONS)):
        right, audited = right + dice.binomial(share, np.clip(moved, 0, 1)), audited + share
        readings = of_shares(before, np.full(level.shape, float(world.audits_before)), right, audited, canary)
        found = contrast(readings, canary, AGREEMENT.spread, AGREEMENT.drift)
        change = AGREEMENT.sign * found.change
        at_end = number % looks == looks - 1
        planned = (first if number < looks else later) if at_end else None
        aborted |= worse(change, found.variance, AGREEMENT, sequence, planned) & ~passed
        passed |= fine(change, found.variance, AGREEMENT) & ~aborted & at_end
    return Ends(audits, float(aborted.mean()), float(passed.mean()), float((~aborted & ~passed).mean()))


KNOWN = [World(devices=devices, canaries=canaries, audits_before=before) for devices, canaries, before in (
    (30, 3, 80), (41, 5, 20), (47, 5, 80), (100, 10, 20), (500, 50, 20),
)]  # fmt: skip
UNKNOWN = [World(devices=devices, canaries=canaries, audits_before=0) for devices, canaries in (
    (47, 5), (60, 6), (100, 10), (500, 50),
)]  # fmt: skip
FEW = [World(devices=devices, canaries=canaries, audits_before=0) for devices, canaries in ((10, 1), (20, 2), (30, 3))]


@pytest.mark.parametrize("world", [*KNOWN, *UNKNOWN], ids=name_of)
def test_l12_with_and_without_a_baseline_a_loss_of_ten_points_is_caught_and_a_good_release_is_not(world: World) -> None:
    """Devices differ by five points; the watch plans as many audits as that needs, and 400 at least."""
    good, bad = course(world), course(replace(world, loss=0.1))
    assert good.audits >= 400
    assert good.aborted <= 0.05
    assert good.passed >= 0.9
    assert bad.aborted >= 0.95


@pytest.mark.parametrize("world", FEW, ids=name_of)
def test_l12_of_few_canaries_without_a_baseline_not_every_loss_is_seen_and_what_is_not_seen_is_held(
    world: World,
) -> None:
    """No number of audits tells one device's nature from the release: the power says so, and does not pass it either."""
    good, bad = course(world), course(replace(world, loss=0.1))
    assert power(RULES, world.canaries, world.devices - world.canaries, 0, 1e9, extensions=EXTENSIONS) < 0.95
    assert good.aborted <= 0.05
    assert bad.aborted < 0.95
    assert bad.passed <= 0.1  # 0.05 a look, and there may be four
    assert bad.held > 0.05


def test_l12_with_exactly_400_audits_and_no_baseline_five_canaries_cannot_do_it() -> None:
    """Why the watch plans more: even a test that spends the whole level on this one look has just 0.95."""
    alone = replace(RULES, alpha=RULES.alpha / look_levels(AGREEMENT, RULES, 1, EXTENSIONS)[1] * RULES.alpha)
    assert power(RULES, 5, 42, 0, 400, extensions=EXTENSIONS) < 0.93
    assert power(alone, 5, 42, 0, 400, extensions=EXTENSIONS) < 0.95
    assert power(RULES, 5, 42, 0, 1600, extensions=EXTENSIONS) > 0.95


def test_l12_a_watch_plans_more_audits_where_less_is_known() -> None:
    needed = [audits_needed(RULES, 5, 42, before, extensions=EXTENSIONS) for before in (0, 20, 80, 1000)]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] == TIMES_MAX * RULES.audits_planned
    assert audits_needed(RULES, 50, 450, 80, extensions=EXTENSIONS) == RULES.audits_planned
    assert audits_needed(replace(RULES, audits_planned=0), 5, 42, 0) == 0


@pytest.mark.parametrize("world", [*SAME, *BAD], ids=name_of)
def test_l12_a_release_that_loses_ten_points_does_not_pass(world: World) -> None:
    change, variance = play(replace(world, loss=0.1), 4000, 1, seed=3)
    assert fine(change, variance, AGREEMENT).mean() <= PASSED_MAX


def test_l12_a_good_release_passes_with_the_planned_sample() -> None:
    change, variance = play(World(), 2000, 1, seed=4)
    assert fine(change, variance, AGREEMENT).mean() >= 0.95


def test_l12_device_spread_alone_would_fool_a_test_that_counts_items() -> None:
    """What the device as unit is for: a test of two shares, blind to devices, goes wrong where this one does not."""
    world = World(devices=47, canaries=5, audits_before=1000, audits_now=400)
    dice = np.random.default_rng(5)
    canary = np.arange(world.devices) < world.canaries
    level = np.clip(world.accuracy + world.spread * dice.standard_normal((2000, world.devices)), 0, 1)
    right = dice.binomial(world.audits_now, level)
    one, other = right[:, canary].mean(1) / world.audits_now, right[:, ~canary].mean(1) / world.audits_now
    items = np.array([canary.sum(), (~canary).sum()]) * world.audits_now
    error = np.sqrt(one * (1 - one) / items[0] + other * (1 - other) / items[1])
    assert ((other - one) / error > 1.96).mean() > 0.1  # meant to be 0.025
    assert aborted(world, looks=1) <= 0.04


def test_l12_peeking_every_minute_does_not_raise_the_level() -> None:
    """Four hours' worth of looks by the sequence alone, whose level is 0.003; the same looks by a plain test of that
    level go wrong much more often."""
    change, variance = play(replace(World(), devices=20, audits_now=480), 2000, 240, seed=6)
    level = look_levels(AGREEMENT, RULES, 1, EXTENSIONS)[0]
    assert level == pytest.approx(0.00325)
    assert worse(change, variance, AGREEMENT, level, None).any(1).mean() <= level + 0.003
    naive = change > quantile(1 - level) * np.sqrt(variance)
    assert naive.any(1).mean() > 3 * level


def test_l12_the_evidence_is_valid_however_long_one_looks() -> None:
    """On the Brownian motion itself, over four decades of information: at most alpha ever crosses, and mostly nearly so."""
    dice, alpha = np.random.default_rng(7), 0.05
    information = np.geomspace(10, 1e5, 600)
    steps = np.sqrt(np.diff(information, prepend=0.0)) * dice.standard_normal((4000, 600))
    effect = steps.cumsum(1) / information
    crossed = surely_above_zero(effect, np.broadcast_to(1 / information, effect.shape), 0.1, alpha).any(1)
    assert 0.3 * alpha < crossed.mean() <= alpha


def test_l12_a_bad_release_is_stopped_early() -> None:
    """By the sequence alone, before the watch is over."""
    change, variance = play(World(loss=0.3), 1000, 60, seed=8)
    level = look_levels(AGREEMENT, RULES, 1, EXTENSIONS)[0]
    called = worse(change, variance, AGREEMENT, level, None)
    assert called.any(1).mean() >= 0.99
    assert np.median(called.argmax(1)) <= 20  # of 60 minutes


def test_l12_all_levels_together_are_alpha() -> None:
    total = sum(
        sum(look_levels(each, RULES, 2, EXTENSIONS)[:2]) + EXTENSIONS * look_levels(each, RULES, 2, EXTENSIONS)[2]
        for each in measures(RULES)
    )
    assert 2 * total == pytest.approx(RULES.alpha)


def tallies(world: World, dice: np.random.Generator, looks: int) -> list[Fleet]:
    """The same fleet at growing times, with everything that is compared; nothing is worse but what `loss` says."""
    names = [f"d{number}" for number in range(world.devices)]
    right = np.clip(world.accuracy + world.spread * dice.standard_normal(world.devices), 0, 1)
    asks = np.clip(0.2 + 0.05 * dice.standard_normal(world.devices), 0.01, 1)
    faults, speed, size = (
        0.002 * dice.random(world.devices),
        50 * np.exp(0.3 * dice.standard_normal(world.devices)),
        300,
    )
    heat = 55 + 5 * dice.standard_normal(world.devices)

    def lived(number: int, hours: float, audits: int, canary: bool) -> Tally:
        items = int(3600 * hours)
        accuracy = right[number] - (world.loss if canary else 0.0)
        windows = max(1, int(hours * 60))
        return Tally(
            items, dice.binomial(items, asks[number]), dice.binomial(items, faults[number]), audits,
            dice.binomial(audits, np.clip(accuracy, 0, 1)), hours, int(dice.poisson(0.01 * hours)),
            latency_ms=list(speed[number] * np.exp(0.1 * dice.standard_normal(windows))),
            memory_mib=list(size + 5 * dice.standard_normal(windows)),
            temperature_c=list(heat[number] + 1.5 * dice.standard_normal() + dice.standard_normal(windows)),
        )  # fmt: skip

    def both(one: Tally, two: Tally) -> Tally:
        joined = {key: getattr(one, key) + getattr(two, key) for key in Tally.__slots__ if key != "effective"}
        return Tally(**joined)

    before = {name: lived(number, 24.0, world.audits_before, False) for number, name in enumerate(names)}
    now = {name: Tally(crashes=0, latency_ms=[], memory_mib=[], temperature_c=[]) for name in names}
    found = []
    for _ in range(looks):
        for number, name in enumerate(names):
            part = lived(number, 1.0 / looks, world.audits_now // looks, number < world.canaries)
            now[name] = both(now[name], part)
        canaries = {name: now[name] for name in names[: world.canaries]}
        found.append(Fleet(canaries, {name: now[name] for name in names[world.canaries :]}, before))
    return found


def watched(world: World, runs: int, looks: int) -> tuple[float, float]:
    """(share called worse, share that passes) by `judge` with everything that is compared."""
    dice, bad, good = np.random.default_rng(9), 0, 0
    for _ in range(runs):
        verdicts = []
        for number, fleet in enumerate(tallies(world, dice, looks)):
            look = 0 if number == looks - 1 else None
            verdicts.append(judge(fleet, RULES, look=look, extensions=EXTENSIONS).verdict)
        bad += Verdict.WORSE in verdicts
        good += Verdict.WORSE not in verdicts and verdicts[-1] is Verdict.FINE
    return bad / runs, good / runs


def test_l12_all_measures_together_keep_the_level() -> None:
    bad, good = watched(World(devices=20, canaries=3, audits_now=140), 80, 3)
    assert bad <= 0.05
    assert good >= 0.85


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_l12_all_measures_together_keep_the_level_over_many_watches() -> None:
    bad, good = watched(World(audits_now=80), 400, 10)
    assert bad <= 0.05
    assert good >= 0.9
    bad, good = watched(World(audits_now=80, loss=0.1), 100, 10)
    assert bad >= 0.95
    assert good == 0
