"""Which set each text of a job falls into, with nothing near it in another one.

By device and time, as images (`core.split`); a text without them by its own words, so that the same question falls on the
same side in every job. Only a labelled text may judge or calibrate; every other one trains. What has once been frozen in
a set stays there, and what is nearly the same trains no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainer.core.near_texts import RESEMBLANCE, Known, Sketch
from trainer.core.split import SplitRules, Times, side

TRAINING = "training"
# What decides a release comes first: where two new texts of two sets are nearly the same, the later set goes without.
JUDGING = ("test", "gate", "calibration")


@dataclass(frozen=True, slots=True)
class Asked:
    """A text as the split sees it. `identity`: of what is asked and answered; `words`: a hash of the question alone, in
    plain form. `refused`: why it may be in no set; "" when it may. `judges`: whether its label is the truth for a gate."""

    identity: str
    words: str
    sketch: Sketch
    device: str = ""
    captured: float | None = None
    refused: str = ""
    judges: bool = True


@dataclass(frozen=True, slots=True)
class Seen:
    """Texts that are known already: what they look like, and which device took them when."""

    sketch: Sketch
    device: str = ""
    captured: float | None = None
    identity: str = ""


def place(
    items: Sequence[Asked], frozen: Mapping[str, Sequence[Seen]], trained: Sequence[Seen], rules: SplitRules,
    least: float = RESEMBLANCE,
) -> list[str]:  # fmt: skip
    """For each item its set (`training`, one of JUDGING, or the name in `frozen` under which it is frozen), or why it is
    left out. `trained`: what any training of the model has had before; `least`: the resemblance of near-duplicates.

    Reasons: `refused` of the item; `duplicate`; `between_sides`; of what would judge or calibrate `near_training`,
    `beside_training` and `near_other_set`; of what would train `near_holdout` and `beside_holdout`.
    """
    found = _sides(items, frozen, rules)
    learned, learned_times = Known((each.sketch for each in trained), least), _times(trained)
    taken: dict[str, list[Seen]] = {name: list(each) for name, each in frozen.items()}
    for name in JUDGING:
        others = Known((each.sketch for other, rows in taken.items() if other != name for each in rows), least)
        for number, item in enumerate(items):
            if found[number] != f"new {name}":
                continue
            found[number] = (
                "near_training" if learned.near(item.sketch) >= 0
                else "beside_training" if learned_times.beside(item.device, item.captured, rules.guard_s)
                else "near_other_set" if others.near(item.sketch) >= 0
                else name
            )  # fmt: skip
            if found[number] == name:
                taken.setdefault(name, []).append(Seen(item.sketch, item.device, item.captured, item.identity))
    apart = [each for rows in taken.values() for each in rows]
    judging, times = Known((each.sketch for each in apart), least), _times(apart)
    for number, item in enumerate(items):
        if found[number] == TRAINING and judging.near(item.sketch) >= 0:
            found[number] = "near_holdout"
        elif found[number] == TRAINING and times.beside(item.device, item.captured, rules.guard_s):
            found[number] = "beside_holdout"
    return found


def _sides(items: Sequence[Asked], frozen: Mapping[str, Sequence[Seen]], rules: SplitRules) -> list[str]:
    """The set that each is frozen in, `training`, `new SET` of what is about to be frozen, or why it is left out."""
    known = {each.identity: name for name, rows in frozen.items() for each in rows}
    found: list[str] = []
    seen: set[str] = set()
    for item in items:
        if item.refused:
            found.append(item.refused)
        elif item.identity in seen:
            found.append("duplicate")
        elif item.identity in known:
            found.append(known[item.identity])
        elif not item.judges:
            found.append(TRAINING)
        else:
            falls = side(rules, item.words, item.device, item.captured)
            found.append("between_sides" if falls is None else TRAINING if falls == TRAINING else f"new {falls}")
        if not item.refused:
            seen.add(item.identity)
    return found


def _times(rows: Iterable[Seen]) -> Times:
    return Times((each.device, each.captured) for each in rows)
