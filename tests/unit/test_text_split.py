"""Which set a text falls into: row by row, and that no two sets have nearly the same question."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from hashlib import sha256

import pytest

from trainer.core.near_texts import alike, sketch
from trainer.core.split import SplitRules
from trainer.core.text_split import Asked, Seen, place

RULES = SplitRules(calibration=0.2, gate=0.3, test=0.1, block_s=60.0, guard_s=5.0)
QUESTION = "Which of the pumps in hall B was last looked at by the night shift?"
AGAIN = "which of the pumps in hall B was last looked at by the night-shift"
OTHER = "Who has the key to the cabinet with the spare belts and the oil?"


def asked(question: str, **more: object) -> Asked:
    values = {"identity": question, "words": sha256(question.encode()).hexdigest(), "sketch": sketch(question), **more}
    return Asked(**values)  # type: ignore[arg-type]


def seen(question: str, device: str = "", captured: float | None = None) -> Seen:
    return Seen(sketch(question), device, captured, question)


def on(side: str, question: str = QUESTION, **more: object) -> Asked:
    """A question whose words put it on a side."""
    draw = {"calibration": 0.1, "training": 0.4, "gate": 0.8, "test": 0.95}[side]
    return asked(question, words=f"{int(draw * 2**32):08x}", **more)


@pytest.mark.parametrize(
    ("item", "frozen", "trained", "expected"),
    [
        (on("training"), {}, [], "training"),
        (on("gate"), {}, [], "gate"),
        (on("calibration"), {}, [], "calibration"),
        (on("test"), {}, [], "test"),
        (on("gate", judges=False), {}, [], "training"),
        (on("gate", refused="own_prediction"), {}, [], "own_prediction"),
        (on("training"), {"gate": [seen(QUESTION)]}, [], "gate"),
        (on("test"), {"gate": [seen(QUESTION)]}, [seen(QUESTION)], "gate"),
        (on("training"), {"holdout": [seen(QUESTION)]}, [], "holdout"),
        (on("training"), {"gate": [seen(AGAIN)]}, [], "near_holdout"),
        (on("training"), {"calibration": [seen(AGAIN)]}, [], "near_holdout"),
        (on("training"), {}, [seen(AGAIN)], "training"),
        (on("gate"), {}, [seen(AGAIN)], "near_training"),
        (on("calibration"), {}, [seen(AGAIN)], "near_training"),
        (on("calibration"), {"gate": [seen(AGAIN)]}, [], "near_other_set"),
        (on("gate"), {"gate": [seen(AGAIN)]}, [], "gate"),
        (asked(QUESTION, device="d", captured=30.0), {"gate": [seen(OTHER, "d", 27.0)]}, [], "beside_holdout"),
        (asked(QUESTION, device="d", captured=30.0), {"gate": [seen(OTHER, "e", 27.0)]}, [], "training"),
    ],
)
def test_where_a_text_falls(
    item: Asked, frozen: Mapping[str, Sequence[Seen]], trained: Sequence[Seen], expected: str
) -> None:
    rules = RULES if not item.device else SplitRules(calibration=0.0)
    assert place([item], frozen, trained, rules) == [expected]


def test_of_new_texts_those_that_judge_come_first() -> None:
    rows = [on("training"), on("calibration", AGAIN), on("training", OTHER), on("training", OTHER)]
    assert place(rows, {}, [], RULES) == ["near_holdout", "calibration", "training", "duplicate"]
    rows = [on("calibration"), on("gate", AGAIN), on("test", AGAIN + " x")]
    assert place(rows, {}, [], RULES) == ["near_other_set", "near_other_set", "test"]


def test_what_a_device_was_asked_at_one_time_stays_together_and_trains_beside_no_judge() -> None:
    gate = next(block for block in range(100) if place([taken(block * 60.0 + 30)], {}, [], RULES) == ["gate"])
    rows = [taken(gate * 60.0 + at) for at in (20.0, 30.0, 40.0)]
    assert place(rows, {}, [], RULES) == ["gate"] * 3
    assert place([taken(gate * 60.0 + 30)], {}, [seen(OTHER, "dev", gate * 60.0 + 26)], RULES) == ["beside_training"]


def taken(captured: float) -> Asked:
    return asked(f"{OTHER} {captured}", device="dev", captured=captured)


@pytest.mark.parametrize("seed", range(4))
def test_no_two_sets_have_nearly_the_same_question_over_several_jobs(seed: int) -> None:
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(3, 6))) for _ in range(20)]
    frozen: dict[str, list[Seen]] = {}
    trained: list[Seen] = []
    for job in range(3):
        texts = [" ".join(chance.choices(words, k=chance.randint(4, 9))) for _ in range(60)]
        texts += [f"{text} {chance.choice(words)}" for text in texts[:40]]
        items = [
            asked(f"{text}", device=chance.choice(["", "d", "e"]), captured=chance.uniform(job * 600, job * 600 + 900))
            for text in texts
        ]
        for item, where in zip(items, place(items, frozen, trained, RULES), strict=True):
            row = Seen(item.sketch, item.device, item.captured, item.identity)
            if where == "training":
                trained.append(row)
            elif where in ("gate", "calibration", "test") and row.identity not in {
                e.identity for e in frozen.get(where, [])
            }:
                frozen.setdefault(where, []).append(row)
    sets = {"training": trained, **frozen}
    assert {"training", "gate", "calibration", "test"} == set(sets) and all(len(rows) > 5 for rows in sets.values())
    for name, rows in sets.items():
        for other in (each for key, values in sets.items() if key > name for each in values):
            assert not any(alike(each.sketch, other.sketch) for each in rows), (name, other.identity)
