"""Whether a release's live stream has changed: rules with significance, each with the figures that it rests on. Pure.

Law of this file: a rule finds something only when the change is large enough to matter AND more than chance explains. Chance
is measured between blocks of one place (core.streams), the levels of all rules and of all looks at one window add up to
`Rules.false_alarms`, so that looking again and again finds nothing that is not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import chi2, hypergeom

from trainer.core.accuracy import Accuracy, exact, live_accuracy
from trainer.core.changes import DELTA, Change, Stream, changes, cycle_end, evenly
from trainer.core.streams import Block, Period, Verdict, design_effect, split

RULES = ("escalation_rate", "accuracy", "confidence", "escalation_change", "accuracy_change")
EXPECTED_MIN = 5.0  # of each bin in each histogram, for the chi-squared distribution to hold (Cochran 1954)
VALUES_MAX = 20_000  # of a stream that is looked at for changes; more are put together by time


@dataclass(frozen=True, slots=True)
class Rules:
    """`escalation_ratio`, `accuracy_drop`, `confidence_distance`: how large a change must be. `false_alarms`: of a stream
    that does not change, in one window, by all rules and looks together. `window_s`: what is compared with the baseline,
    each place's first `baseline_s` on the release; `looks`: how often one window is looked at. `cycle_s`: what repeats
    with this period is no change."""

    escalation_ratio: float = 1.1
    accuracy_drop: float = 0.05
    confidence_distance: float = 0.1
    items_min: int = 100
    false_alarms: float = 0.005
    window_s: float = 7 * 86400.0
    baseline_s: float = 7 * 86400.0
    cycle_s: float = 7 * 86400.0
    looks: int = 1

    @property
    def level(self) -> float:
        """Of one rule at one look (Bonferroni)."""
        return self.false_alarms / len(RULES) / max(1, self.looks)


@dataclass(frozen=True, slots=True)
class Look:
    """What one rule says of one stream now: whether it `found` drift, in words, and the figures (JSON-able)."""

    rule: str
    found: bool
    text: str
    evidence: dict[str, Any]


def look(
    blocks: Sequence[Block], verdicts: Sequence[Verdict], reference: Sequence[int], rules: Rules, now: float,
    looked_at: float, course: Sequence[Block] | None = None,
) -> list[Look]:  # fmt: skip
    """Every rule's look at one release's stream: `blocks` of the baseline and the window at least, in any order.

    `reference`: the confidence histogram that the release carries. `looked_at`: time of the last look. `course`: blocks of
    all of its life that is looked at for changes, which need no histograms; by default `blocks`.
    """
    baseline, window = split(blocks, verdicts, rules.baseline_s, now - rules.window_s)
    return [
        escalation_rate(baseline, window, rules),
        accuracy(baseline, window, rules),
        confidence(reference, window, rules),
        escalation_change(blocks if course is None else course, rules, looked_at, now),
        accuracy_change(verdicts, rules, looked_at, now),
    ]


def escalation_rate(baseline: Period, window: Period, rules: Rules) -> Look:
    """L5: the share of answers that the policy escalates, against the same places' baseline; Fisher's exact test, one-sided.

    The baseline's places are weighted as they answered in the window, so that a device that only works more is no change.
    """
    rule = "escalation_rate"
    there = baseline.by_place().keys() & window.by_place().keys()
    before, after = baseline.only(there), window.only(there)
    if min(before.items, after.items) < rules.items_min:
        return _too_few(rule, before.items, after.items, rules)
    old = {place: counts for place, counts in before.by_place().items() if counts[0]}
    new = {place: counts for place, counts in after.by_place().items() if place in old}
    items = sum(n for n, _ in new.values())
    part = {place: n / items for place, (n, _) in new.items()}
    was = sum(part[place] * old[place][1] / old[place][0] for place in new)
    rate = sum(x for _, x in new.values()) / items
    effects = [_effect(period.only(new)) for period in (before, after)]
    # Kish's effective size of the weighted baseline, then the design effect of each.
    sizes = 1 / sum(part[place] ** 2 / old[place][0] for place in new) / effects[0], items / effects[1]
    p_value = _fisher(was, sizes[0], rate, sizes[1])
    ratio = rate / was if was else math.inf if rate else 1.0
    found = ratio > rules.escalation_ratio and p_value < rules.level
    evidence = {
        "baseline": _told(before) | {"rate": was, "effective_items": sizes[0], "design_effect": effects[0]},
        "window": _told(after) | {"rate": rate, "effective_items": sizes[1], "design_effect": effects[1]},
        "ratio": ratio if math.isfinite(ratio) else None, "ratio_max": rules.escalation_ratio,
        "p_value": p_value, "level": rules.level,
    }  # fmt: skip
    return Look(
        rule, found, f"escalation rate {rate:.3f} against {was:.3f} in the baseline, p = {p_value:.2g}", evidence
    )


def accuracy(baseline: Period, window: Period, rules: Rules) -> Look:
    """L5: live accuracy against the same places' baseline, by the exact intervals of both, joined as by Newcombe (1998,
    method 10).

    Where escalations have no verdicts, of the accepted answers alone.
    """
    rule = "accuracy"
    there = baseline.by_place().keys() & window.by_place().keys()
    baseline, window = baseline.only(there), window.only(there)
    if min(baseline.items, window.items) < rules.items_min:
        return _too_few(rule, baseline.items, window.items, rules)
    before, after = (_accuracy(period, 1 - 2 * rules.level) for period in (baseline, window))
    whole = before.value is not None and after.value is not None
    old, new = (_share(each, whole) for each in (before, after))
    if old[0] is None or new[0] is None:
        return Look(rule, False, "no audit has a verdict yet", {"baseline": _told(baseline), "window": _told(window)})
    drop = old[0] - new[0]
    sure = drop - math.hypot(old[0] - old[1], new[2] - new[0])
    found = drop > rules.accuracy_drop and sure > 0
    evidence = {
        "of": "all" if whole else "accepted",
        "baseline": _told(baseline) | _checked(before) | {"accuracy": old[0]},
        "window": _told(window) | _checked(after) | {"accuracy": new[0]},
        "drop": drop, "drop_max": rules.accuracy_drop, "drop_low": sure, "level": rules.level,
    }  # fmt: skip
    text = f"accuracy {new[0]:.3f} against {old[0]:.3f} in the baseline, down by at least {max(0.0, sure):.3f}"
    return Look(rule, found, text, evidence)


def confidence(reference: Sequence[int], window: Period, rules: Rules) -> Look:
    """The window's calibrated confidence against the histogram that the release was calibrated with.

    Chi-squared test of homogeneity, the window's counts divided by their design effect (Rao and Scott 1984, first order);
    how much it matters is the total variation distance: the share of answers that would have to change their bin.
    """
    rule, size = "confidence", sum(reference)
    if not size or window.items < rules.items_min:
        missing = "the release carries no reference histogram" if not size else ""
        return Look(rule, False, missing or f"{window.items} items in the window", {"window": _told(window)})
    seen = window.confidence
    effect = _histogram_effect(window)
    left, right = _merged(reference, [count / effect for count in [*seen, *[0] * (len(reference) - len(seen))]])
    n, m = sum(left), sum(right)
    distance = sum(abs(a / n - b / m) for a, b in zip(left, right, strict=True)) / 2
    statistic = sum((a * m - b * n) ** 2 / (a + b) for a, b in zip(left, right, strict=True)) / (n * m)
    free = len(left) - 1
    p_value = float(chi2.sf(statistic, free)) if free else 1.0
    found = distance > rules.confidence_distance and p_value < rules.level
    evidence = {
        "window": _told(window) | {"histogram": seen, "design_effect": effect},
        "reference": list(reference), "bins": len(left), "chi2": statistic, "p_value": p_value, "level": rules.level,
        "distance": distance, "distance_max": rules.confidence_distance,
    }  # fmt: skip
    text = f"{distance:.0%} of the confidences lie in other bins than in the calibration, p = {p_value:.2g}"
    return Look(rule, found, text, evidence)


def escalation_change(blocks: Sequence[Block], rules: Rules, looked_at: float, now: float) -> Look:
    """ADWIN on the escalation rate of block after block, over the release's whole life, against each place's own mean."""
    ordered = sorted((block for block in blocks if block.items), key=lambda block: (block.start, block.place))
    off = _off((block.place, block.items, block.escalated) for block in ordered)
    step = max(1, math.ceil(len(ordered) / VALUES_MAX))
    parts = [ordered[first : first + step] for first in range(0, len(ordered), step)]
    stream = [
        (
            part[0].start,
            sum(block.escalated - block.items * off[block.place] for block in part)
            / sum(block.items for block in part),
        )
        for part in parts
    ]
    found = [each for each in _new(stream, rules, looked_at, now) if each.after > rules.escalation_ratio * each.before]
    return _changed("escalation_change", "escalation rate", found, len(stream))


def accuracy_change(verdicts: Sequence[Verdict], rules: Rules, looked_at: float, now: float) -> Look:
    """ADWIN on the audits' verdicts, one after the other, over the release's whole life, against each place's own mean."""
    audits = sorted((each for each in verdicts if not each.checked.escalated), key=lambda each: (each.at, each.place))
    audits = audits[-VALUES_MAX:]
    off = _off((each.place, 1, each.checked.right) for each in audits)
    stream = [(each.at, each.checked.right - off[each.place]) for each in audits]
    found = [each for each in _new(stream, rules, looked_at, now) if each.before - each.after > rules.accuracy_drop]
    return _changed("accuracy_change", "accuracy of audits", found, len(stream))


def _off(counts: Iterable[tuple[str, int, int]]) -> dict[str, float]:
    """Place -> how far its mean is above that of all, of (place, items, those counted). Without it who comes later, and is
    another camera at another place, would look like a step."""
    sums: dict[str, tuple[int, int]] = {}
    for place, items, counted in counts:
        n, x = sums.get(place, (0, 0))
        sums[place] = n + items, x + counted
    mean = sum(x for _, x in sums.values()) / max(1, sum(n for n, _ in sums.values()))
    return {place: x / n - mean for place, (n, x) in sums.items()}


def _new(stream: Stream, rules: Rules, looked_at: float, now: float) -> list[Change]:
    """The changes in cycles that have ended since the last look: each is reported by exactly one look."""
    found = changes(evenly(stream, rules.cycle_s, now), min(DELTA, rules.level))
    return [each for each in found if cycle_end(each.seen, rules.cycle_s) > looked_at]


def _changed(rule: str, what: str, found: Sequence[Change], values: int) -> Look:
    if not found:
        return Look(rule, False, f"no change in {values} values", {"values": values})
    last = found[-1]
    text = f"{what} {last.before:.3f} became {last.after:.3f}"
    return Look(rule, True, text, {"values": values, **asdict(last)})


def _too_few(rule: str, before: int, after: int, rules: Rules) -> Look:
    text = f"{after} items in the window and {before} in the baseline: {rules.items_min} of each are needed"
    return Look(rule, False, text, {"baseline": {"items": before}, "window": {"items": after}})


def _told(period: Period) -> dict[str, Any]:
    start, end = period.span
    totals = period.totals
    return {"from": start, "last": end, "items": totals.items, "escalated": totals.escalated,
            "places": len(period.by_place())}  # fmt: skip


def _effect(period: Period) -> float:
    return design_effect((block.place, block.items, block.escalated) for block in period.blocks)


def _histogram_effect(window: Period) -> float:
    """The bins' design effects, each weighted with what it adds to the degrees of freedom."""
    total, items = window.confidence, window.items
    parts = [
        (1 - count / items, design_effect((b.place, b.items, _at(b.confidence, bin_)) for b in window.blocks))
        for bin_, count in enumerate(total)
        if count
    ]
    weight = sum(part for part, _ in parts)
    return sum(part * effect for part, effect in parts) / weight if weight > 0 else 1.0


def _at(counts: Sequence[int], index: int) -> int:
    return counts[index] if index < len(counts) else 0


def _merged(first: Sequence[float], second: Sequence[float]) -> tuple[list[float], list[float]]:
    """Neighbouring bins put together until each is expected to hold EXPECTED_MIN of both histograms."""
    n, m = sum(first), sum(second)
    scale = min(n, m) / (n + m) if n + m else 0.0
    left, right = [0.0], [0.0]
    for a, b in zip(first, second, strict=True):
        if (left[-1] + right[-1]) * scale >= EXPECTED_MIN:
            left.append(0.0)
            right.append(0.0)
        left[-1], right[-1] = left[-1] + a, right[-1] + b
    if len(left) > 1 and (left[-1] + right[-1]) * scale < EXPECTED_MIN:
        a, b = left.pop(), right.pop()
        left[-1], right[-1] = left[-1] + a, right[-1] + b
    return left, right


def _fisher(was: float, was_size: float, rate: float, size: float) -> float:
    """One-sided p-value of a rate above another one; effective counts are rounded against the finding."""
    n, m = max(1, int(was_size)), max(1, int(size))
    x, y = min(n, math.ceil(was * n - 1e-9)), math.floor(rate * m + 1e-9)
    return float(hypergeom.sf(y - 1, n + m, x + y, m))


def _accuracy(period: Period, sure: float) -> Accuracy:
    audits = [each for each in period.verdicts if not each.checked.escalated]
    effect = design_effect(_places(audits))
    return live_accuracy(
        [each.checked for each in period.verdicts], period.totals, sure, of_stream=True, interval=exact, effect=effect
    )


def _places(verdicts: Sequence[Verdict], block_s: float = 3600.0) -> list[tuple[str, int, int]]:
    counts: dict[tuple[str, int], tuple[int, int]] = {}
    for each in verdicts:
        key = each.place, int(each.at // block_s)
        n, x = counts.get(key, (0, 0))
        counts[key] = n + 1, x + each.checked.right
    return [(place, n, x) for (place, _), (n, x) in counts.items()]


def _share(found: Accuracy, whole: bool) -> tuple[float | None, float, float]:
    if whole:
        return found.value, found.low, found.high
    return found.accepted.share, found.accepted.low, found.accepted.high


def _checked(found: Accuracy) -> dict[str, Any]:
    return {"audits": found.accepted.checked, "escalations_answered": found.escalated.checked}
