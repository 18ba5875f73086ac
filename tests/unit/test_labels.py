"""What a label may say, and whose word counts: rows of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from trainer.core.labels import Task, canonical, check, choose

SIZE = (100, 50)
SQUARE = [10.0, 10.0, 20.0, 10.0, 20.0, 20.0, 10.0, 20.0]


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("detect", {"label": "a", "box": [1, 2, 1, 9]}, "has no area"),
        ("detect", {"label": "a", "box": [9, 2, 1, 9]}, "has no area"),
        ("detect", {"label": "a", "box": [9, 9, 1, 1]}, "has no area"),
        ("detect", {"label": "a", "box": [120, 2, 130, 9]}, "outside of the image of 100x50"),
        ("detect", {"label": "a", "box": [1, -9, 5, 0]}, "outside of the image"),
        ("detect", {"label": "a", "box": [1, 2, float("nan"), 9]}, "not finite"),
        ("detect", {"label": "a", "box": [1, 2, 10**400, 9]}, "too large"),
        ("detect", {"label": "a", "box": [1, 2, True, 9]}, "box True is no number"),
        ("detect", {"label": "a", "box": [1, 2, 3]}, "3 numbers"),
        ("detect", {"label": "a"}, "box None is no list"),
        ("detect", {"label": "z", "box": [1, 2, 3, 4]}, "'z' is none of a, b"),
        ("detect", {"label": 7, "box": [1, 2, 3, 4]}, "label 7 is no name"),
        ("detect", {"label": "a", "box": [1, 2, 3, 4], "score": 1.5}, "score 1.5 is no share"),
        ("segment", {"label": "a", "box": [1, 2, 3, 4]}, "no polygon"),
        ("segment", {"label": "a", "polygons": [[1, 1, 5, 5]]}, "at least 3 points"),
        ("segment", {"label": "a", "polygons": [[1, 1, 5, 5, 9, 9]]}, "polygon has no area"),
        ("segment", {"label": "a", "polygons": [[200, 1, 205, 5, 209, 1]]}, "outside of the image"),
        ("classify", {"label": "z"}, "'z' is none of"),
        ("text", {"text": " "}, "missing or empty"),
    ],
)
def test_a_row_that_cannot_be_used_says_why_and_the_others_stay(task: Task, row: dict[str, Any], said: str) -> None:
    good = {
        "detect": {"label": "b", "box": [1, 2, 3, 4]}, "segment": {"label": "b", "polygons": [SQUARE]},
        "classify": {"label": "b"}, "text": {"text": "b"},
    }[task]  # fmt: skip
    found = check(task, [row, good], SIZE, {"a", "b"})
    assert [(bad.number, said in bad.reason) for bad in found.bad] == [(1, True)], found.bad
    assert len(found.rows) == 1


def test_what_reaches_over_the_border_is_cut_and_counted() -> None:
    found = check(
        "detect", [{"label": "a", "box": [-5, 10, 10, 60]}, {"label": "a", "box": [0, 0, 100, 50]}], SIZE, None
    )
    assert [row["box"] for row in found.rows] == [[0, 10, 10, 50], [0, 0, 100, 50]]
    assert (found.clipped, found.bad) == (1, [])
    found = check("segment", [{"label": "a", "polygons": [[90, 10, 110, 10, 110, 20, 90, 20], SQUARE]}], SIZE, None)
    assert found.rows[0]["box"] == [10, 10, 100, 20]
    assert found.clipped == 1


def test_the_same_label_is_the_same_whatever_the_order_the_scores_and_the_last_digits() -> None:
    a, b = {"label": "a", "box": [1.0, 2.0, 3.0, 4.0]}, {"label": "b", "box": [5, 6, 7, 8], "score": 0.5}
    assert canonical([a, b]) == canonical([{**b, "score": 0.9}, {**a, "box": [1.0000001, 2, 3, 4]}])
    for other in ([a], [a, a, b], [a, {**b, "label": "c"}], [a, {**b, "box": [5, 6, 7, 8.1]}], []):
        assert canonical([a, b]) != canonical(other)


@dataclass(frozen=True)
class Said:
    label: list[dict[str, Any]]
    kind: str = "model"
    confidence: float = 0.9
    said: float = 1.0
    release: str = "teacher@1.0"
    verdict: str = "labelled"
    who: str = "big1"
    device: str = "cam1"


A, B, C = ([{"label": name}] for name in "abc")


@pytest.mark.parametrize(
    ("opinions", "counts"),
    [
        ([], "none"),
        ([Said(A, confidence=0.6), Said(B, confidence=0.8)], 1),
        ([Said(A, "person"), Said(B, confidence=0.99, said=9)], 0),
        ([Said(A, "person", said=1), Said(B, "person", said=2), Said(C)], 1),
        ([Said(A), Said(A, "person", said=2, verdict="rejected")], "rejected"),
        ([Said(A), Said(A, "person", said=2, verdict="rejected"), Said(B, confidence=0.1)], 2),
        ([Said(A, "person", said=3), Said(A, "person", said=2, verdict="rejected")], 0),  # accepted again
        ([Said(A, "person", said=2), Said(A, "person", said=2, verdict="rejected")], "rejected"),
        ([Said(A, release="eye@1.3")], "own_prediction"),
        ([Said(A, release="eyes@1.3")], 0),
        ([Said(A, release="", who="cam1")], "own_prediction"),
        ([Said(A, release="")], 0),
        ([Said(A, confidence=0.4)], "below_label_confidence"),
    ],
)
def test_whose_word_counts(opinions: list[Said], counts: int | str) -> None:
    index, reason = choose(opinions, "eye", 0.05 if len(opinions) == 3 else 0.5)
    assert (index if index is not None else reason) == counts
