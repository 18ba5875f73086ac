"""Drift on simulated streams: what changes is found within a stated number of windows, what does not is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from trainer.config_drift import Drift
from trainer.core import drift
from trainer.core.accuracy import Checked
from trainer.core.changes import changes, cycle_end, evenly
from trainer.core.drift import RULES, Look, Rules, look
from trainer.core.streams import Block, Period, Verdict, design_effect, split

BLOCK_S = 6 * 3600.0
BLOCKS = 28  # of each place in a window of a week
WINDOW_S = BLOCKS * BLOCK_S
EACH = Rules(window_s=WINDOW_S, baseline_s=WINDOW_S, cycle_s=WINDOW_S)
SURE = np.array([0, 0, 0, 0, 0.05, 0.05, 0.1, 0.1, 0.2, 0.5])  # the confidence of what is not escalated
UNSURE = np.array([0, 0, 0, 0.05, 0.1, 0.1, 0.15, 0.2, 0.2, 0.2])


@dataclass(frozen=True)
class World:
    """One fleet's stream. `spread`: how much the escalation rate differs between devices, `noise`: from block to block
    beyond chance (0: not at all), `day`: between day and night."""

    items: int = 40  # of a block
    places: int = 2
    rate: float = 0.1
    spread: float = 0.03
    noise: float = 0.0
    day: float = 0.0
    right: float = 0.93
    audit_share: float = 0.1
    sure: tuple[float, ...] = tuple(SURE)
    joins: int = 0  # the window in which as many places again come, whose rate and accuracy are others; 0: nobody comes
    theirs: tuple[float, float] = (0.2, 0.75)


Change = Callable[[World, float], World]  # the world after so many windows


def stream(world: World, windows: int, rng: np.random.Generator, change: Change) -> tuple[list[Block], list[Verdict]]:
    blocks, verdicts = [], []
    count = world.places * (2 if world.joins else 1)
    away = rng.uniform(-world.spread, world.spread, count)
    for number in range(windows * BLOCKS):
        now, at = change(world, number / BLOCKS), number * BLOCK_S
        for place in range(count):
            if place >= world.places:
                now = replace(change(world, number / BLOCKS), rate=world.theirs[0], right=world.theirs[1])
                if number < world.joins * BLOCKS:
                    continue
            p = now.rate * (1 + away[place] / 0.1 + now.day * (1 if number % 4 < 2 else -1))
            p = float(rng.beta(p / now.noise, (1 - p) / now.noise)) if now.noise else p
            items = int(rng.poisson(now.items * (1 + place % world.places)))
            asked = int(rng.binomial(items, p))
            counts = rng.multinomial(items - asked, now.sure)
            counts[2] += asked
            blocks.append(Block(f"d{place}/eye", at, items, asked, tuple(counts.tolist())))
            for chance, answers, right, escalated in (
                (now.audit_share, items - asked, now.right, False), (1.0, asked, 0.6, True),
            ):  # fmt: skip
                checked = rng.random(int(rng.binomial(answers, chance))) < right
                rows = [Verdict(f"d{place}/eye", at + 1.0, Checked(bool(each), chance, escalated)) for each in checked]
                verdicts += rows
    return blocks, verdicts


def looks(
    world: World, windows: int, seed: int, change: Change = lambda world, _: world, each: int = 1, rules: Rules = EACH
) -> list[list[Look]]:
    """What is found at the end of every window (or `each` times in one) after the baseline."""
    rng = np.random.default_rng(seed)
    blocks, verdicts = stream(world, windows, rng, change)
    asked = round(200 * world.rate)  # the calibration's items are as the stream is
    counts = rng.multinomial(200 - asked, np.array(world.sure))
    counts[2] += asked
    rules, found, before = replace(rules, looks=each), list[list[Look]](), 0.0
    for number in range(each, windows * each):
        now = (number + 1) * WINDOW_S / each
        seen = [block for block in blocks if block.start < now], [verdict for verdict in verdicts if verdict.at < now]
        found.append(look(*seen, counts.tolist(), rules, now, before))
        before = now
    return found


QUIET = {
    "independent items": World(),
    "items that are alike, and days with nights": World(noise=0.03, day=0.4),
    "hardly any escalation": World(rate=0.01, spread=0.0, items=30),
    "cameras that ask more and are wrong more come later": World(joins=3),
    "cameras that are right more often come later": World(right=0.85, joins=3, theirs=(0.1, 0.99)),
}


def alarms(found: list[list[Look]]) -> Counter[str]:
    return Counter(each.rule for one in found for each in one if each.found)


@pytest.mark.parametrize(
    ("seeds", "length"),
    [(4, 15), pytest.param(12, 25, marks=pytest.mark.long)],
)
def test_a_stream_that_does_not_change_alarms_in_fewer_than_one_of_100_windows(seeds: int, length: int) -> None:
    """L5: all five rules together, over streams of every kind."""
    windows, total = 0, Counter[str]()
    for world in QUIET.values():
        for seed in range(seeds):
            found = looks(world, length, seed)
            windows += len(found)
            total += alarms(found)
    assert windows >= 168
    assert total.total() < windows / 100, total


def test_a_quiet_fleet_with_several_groups_alarms_in_fewer_than_one_of_100_windows() -> None:
    """L5: the fleet and four groups of it, each looked at by all five rules with its part of the level."""
    config, world = (
        Drift(window_s=WINDOW_S, baseline_s=WINDOW_S, cycle_s=WINDOW_S),
        World(noise=0.02, day=0.3, places=4),
    )
    rules, windows, total = config.rules(5), 0, Counter[str]()
    assert rules.level == pytest.approx(0.005 / 25)
    for seed in range(10):
        blocks, verdicts = stream(world, 11, np.random.default_rng(seed), lambda world, _: world)
        for number in range(1, 11):
            now = (number + 1) * WINDOW_S
            for group in (None, *(f"d{place}/eye" for place in range(4))):
                its = [block for block in blocks if block.start < now and group in (None, block.place)]
                checked = [each for each in verdicts if each.at < now and group in (None, each.place)]
                total += alarms([look(its, checked, [], rules, now, number * WINDOW_S)])
            windows += 1
    assert windows == 100
    assert total.total() == 0, total


def test_l5_the_rules_on_streams_take_their_part_of_the_level_too() -> None:
    """More groups ask more of a change before it is one, by ADWIN as by the other rules."""
    world, change, rule, _ = PLANTED["15 points of accuracy, by ADWIN"]

    def found(rules: Rules) -> int:
        return sum(each.found for seed in range(3) for one in looks(world, 6, 40 + seed, change, rules=rules)
                   for each in one if each.rule == rule)  # fmt: skip

    assert found(EACH) == 3
    assert found(replace(EACH, false_alarms=EACH.false_alarms / 10**40)) == 0


@pytest.mark.parametrize(
    ("rule", "world"),
    [
        ("escalation_change", World(joins=3, theirs=(0.7, 0.93))),
        ("accuracy_change", World(joins=3, theirs=(0.1, 0.7))),
        ("accuracy", World(right=0.85, joins=3, theirs=(0.1, 0.99), items=80)),
    ],
)
def test_l5_who_comes_later_and_differs_is_no_drift(rule: str, world: World) -> None:
    total = Counter[str]()
    for seed in range(2):
        total += alarms(looks(world, 8, seed))
    assert total[rule] == 0, total


def test_looking_at_a_window_seven_times_does_not_alarm_more_often() -> None:
    windows, total = 0, Counter[str]()
    for seed in range(4):
        found = looks(World(noise=0.02, audit_share=0.03), 7, 100 + seed, each=7)
        windows += len(found) // 7
        total += alarms(found)
    assert windows >= 24
    assert total.total() == 0, total


def test_without_the_design_effect_items_that_are_alike_would_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the simulation would see a rule that takes frames of one camera for independent ones."""
    monkeypatch.setattr(drift, "design_effect", lambda _clusters: 1.0)
    total = Counter[str]()
    for seed in range(4):
        total += alarms(looks(World(noise=0.2), 10, seed))
    assert total["escalation_rate"] >= 4


PLANTED: dict[str, tuple[World, Change, str, int]] = {
    # what changes after four windows: which rule finds it in how many windows at most
    "half as many escalations again": (
        World(noise=0.01), lambda w, at: replace(w, rate=w.rate * 1.5) if at >= 4 else w, "escalation_rate", 1,
    ),
    "12 points of accuracy are lost, and nothing else shows it": (
        World(noise=0.01), lambda w, at: replace(w, right=w.right - 0.12) if at >= 4 else w, "accuracy", 1,
    ),
    "the confidences sink, and still suffice": (
        World(noise=0.01), lambda w, at: replace(w, sure=tuple(UNSURE)) if at >= 4 else w, "confidence", 1,
    ),
    "8 % more escalations in every window": (
        World(noise=0.01, items=80), lambda w, at: replace(w, rate=w.rate * (1 + 0.08 * at)), "escalation_rate", 2,
    ),
    "twice the escalations, by ADWIN": (
        World(items=80), lambda w, at: replace(w, rate=w.rate * 2) if at >= 4 else w, "escalation_change", 4,
    ),
    "15 points of accuracy, by ADWIN": (
        World(items=60), lambda w, at: replace(w, right=w.right - 0.15) if at >= 4 else w, "accuracy_change", 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_drift_is_found_within_so_many_windows(name: str) -> None:
    world, change, rule, within = PLANTED[name]
    late = 0
    for seed in range(6):
        found = looks(world, 4 + within, 40 + seed, change)
        hits = [one for one in found[3:] if any(each.found and each.rule == rule for each in one)]
        late += not hits
        for each in [each for one in hits for each in one if each.found and each.rule == rule]:
            assert each.text
            assert each.evidence, "a detection names what it rests on"
    assert late == 0


def test_a_detection_names_its_figures() -> None:
    world, change, _, _ = PLANTED["half as many escalations again"]
    (rate, right, shift, *_) = looks(world, 5, 1, change)[-1]
    assert [rate.rule, right.rule, shift.rule] == list(RULES[:3])
    told = rate.evidence
    assert told["ratio"] == pytest.approx(told["window"]["rate"] / told["baseline"]["rate"])
    assert told["p_value"] < told["level"] == 0.001
    assert told["window"]["items"] > 2000
    assert told["window"]["from"] == 4 * WINDOW_S
    assert told["baseline"]["from"] == 0.0
    assert set(right.evidence["baseline"]) >= {"audits", "escalations_answered", "accuracy", "items"}
    assert sum(shift.evidence["reference"]) == 200


def one(items: int, escalated: int, start: float = 0.0, place: str = "d/eye") -> Block:
    return Block(place, start, items, escalated, (0, 0, escalated, 0, 0, 0, 0, 0, 0, items - escalated))


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ((5000, 500), (5000, 560), False),  # 1.12 times as many, and chance does that now and then
        ((5000, 500), (5000, 650), True),
        ((10**6, 10**5), (10**6, 109_000), False),  # surely more, and not enough of it to matter
        ((10**6, 10**5), (10**6, 111_000), True),
        ((5000, 500), (99, 99), False),  # fewer than 100 predictions
        ((99, 0), (5000, 4000), False),
        ((5000, 0), (5000, 30), True),
        ((5000, 0), (5000, 2), False),
        ((5000, 650), (5000, 500), False),  # better is no drift
    ],
)
def test_the_rule_of_the_escalation_rate(before: tuple[int, int], after: tuple[int, int], found: bool) -> None:
    """L5: more than 1.1 times the baseline, and more than chance."""
    rules = Rules(window_s=10.0, baseline_s=10.0, cycle_s=10.0)
    assert look([one(*before), one(*after, 15.0)], [], [], rules, 20.0, 0.0)[0].found is found


def test_more_work_at_the_device_that_asks_more_is_no_drift() -> None:
    """The fleet's rate doubles because one camera runs day and night now; no camera is less sure than before."""
    before = [one(9000, 450, 0.0, "calm/eye"), one(1000, 300, 0.0, "busy/eye")]
    after = [one(5000, 250, 15.0, "calm/eye"), one(5000, 1500, 15.0, "busy/eye")]
    rules = Rules(window_s=10.0, baseline_s=10.0, cycle_s=10.0)
    found = look([*before, *after], [], [], rules, 20.0, 0.0)[0]
    assert not found.found
    assert found.evidence["ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("reference", "window", "found"),
    [
        ([0, 0, 20, 0, 0, 0, 0, 0, 0, 180], (10**7, 1_050_000), False),  # half a point, however surely
        ([0, 0, 20, 0, 0, 0, 0, 0, 0, 180], (10**7, 3_000_000), True),
        ([0, 0, 20_000, 0, 0, 0, 0, 0, 0, 180_000], (10**7, 1_500_000), False),  # five points, and no chance at all
        ([0, 0, 20, 0, 0, 0, 0, 0, 0, 180], (120, 24), False),  # twice as many, of a few
        ([0, 0, 2, 0, 0, 0, 0, 0, 0, 4], (10**6, 600_000), False),  # six items are no reference
        ([], (10**6, 600_000), False),
    ],
)
def test_the_rule_of_the_confidence(reference: list[int], window: tuple[int, int], found: bool) -> None:
    rules = Rules(window_s=10.0, baseline_s=10.0, cycle_s=10.0)
    blocks = [one(200, 20), one(*window, 15.0)]
    assert look(blocks, [], reference, rules, 20.0, 0.0)[2].found is found


@pytest.mark.parametrize(("points", "found"), [(4.5, False), (5.5, True)])
def test_l5_accuracy_has_to_fall_by_more_than_five_points_however_sure_it_is(points: float, found: bool) -> None:
    rules, audits = Rules(window_s=10.0, baseline_s=10.0, cycle_s=10.0), 50_000

    def checked(at: float, share: float) -> list[Verdict]:
        right = round(share * audits)
        return [Verdict("d/eye", at, Checked(number < right, 1.0, False)) for number in range(audits)]

    verdicts = [*checked(1.0, 0.9), *checked(16.0, 0.9 - points / 100)]
    seen = look([one(audits, 0), one(audits, 0, 15.0)], verdicts, [], rules, 20.0, 0.0)[1]
    assert seen.evidence["drop"] == pytest.approx(points / 100)
    assert seen.evidence["drop_low"] > 0  # it did fall
    assert seen.found is found


def test_accuracy_of_the_accepted_alone_where_escalations_are_not_answered() -> None:
    rules = Rules(window_s=10.0, baseline_s=10.0, cycle_s=10.0)
    blocks = [one(10_000, 500), one(10_000, 500, 15.0)]

    def audits(at: float, right: int, wrong: int) -> list[Verdict]:
        return [Verdict("d/eye", at, Checked(number < right, 0.05, False)) for number in range(right + wrong)]

    found = look(blocks, [*audits(1.0, 450, 25), *audits(16.0, 350, 125)], [], rules, 20.0, 0.0)[1]
    assert (found.found, found.evidence["of"]) == (True, "accepted")
    assert found.evidence["drop"] == pytest.approx(100 / 475)
    assert not look(blocks, audits(1.0, 450, 25), [], rules, 20.0, 0.0)[1].found


def test_each_place_has_its_own_baseline() -> None:
    """A rollout reaches the second device when the first one's baseline is over."""
    blocks = [one(100, 10, at, place) for place, first in (("a/eye", 0), ("b/eye", 20)) for at in range(first, 40, 5)]
    baseline, window = split(blocks, [], 10.0, 25.0)
    assert sorted((block.place, block.start) for block in baseline.blocks) == [
        ("a/eye", 0), ("a/eye", 5), ("b/eye", 20), ("b/eye", 25),
    ]  # fmt: skip
    assert {(block.place, block.start) for block in window.blocks} == {
        ("a/eye", 25), ("a/eye", 30), ("a/eye", 35), ("b/eye", 30), ("b/eye", 35),
    }  # fmt: skip
    assert (Period().items, Period().span) == (0, (0.0, 0.0))


@pytest.mark.parametrize(("together", "expected"), [(1, 1.0), (5, 5.0), (20, 20.0)])
def test_the_design_effect_is_how_many_items_come_as_one(together: int, expected: float) -> None:
    rng = np.random.default_rng(3)
    clusters = [
        (f"d{place}", 20, int(rng.binomial(20 // together, 0.2)) * together) for place in range(3) for _ in range(400)
    ]
    assert design_effect(clusters) == pytest.approx(expected, rel=0.15)
    assert design_effect(clusters[:5]) == 1.0, "too few to tell"


def test_a_change_is_found_where_it_is_and_once() -> None:
    rng = np.random.default_rng(0)
    values = [*rng.binomial(20, 0.1, 600) / 20, *rng.binomial(20, 0.2, 600) / 20]
    (found,) = changes([(float(index), float(value)) for index, value in enumerate(values)])
    assert abs(found.at - 600) < 10
    assert (found.before, found.after) == (pytest.approx(0.1, abs=0.01), pytest.approx(0.2, abs=0.02))
    assert changes([(float(index), float(value)) for index, value in enumerate(values[:600])]) == []


def test_day_and_night_are_no_change_and_another_day_is() -> None:
    day = [(float(hour), 0.1 if hour % 240 < 120 else 0.4) for hour in range(240 * 8)]
    assert changes(day) != [], "as it comes, every dusk is one"
    assert changes(evenly(day, 240.0, 1e9)) == []
    darker = [*day, *((at + 240 * 8, value + 0.15) for at, value in day[:480])]
    assert [change.after > change.before for change in changes(evenly(darker, 240.0, 1e9))] == [True]
    assert [at for at, _ in evenly(day, 240.0, 1e9)] == [at for at, _ in day]
    assert len(evenly(day, 240.0, 240 * 7.5)) == 240 * 7, "a cycle that is not over is left out"
    assert [cycle_end(at, 10.0) for at in (0.0, 9.9, 10.0)] == [10.0, 10.0, 20.0]
