"""A label with more opinions behind it replaces one with fewer, until a training claims it; a person's word stays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.store import Sample, Store
from tests.unit.store_cases import MODEL, PERSON, escalate

WHO = ["mid", "top", "sky"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


def say(
    store: Store, sample: str, count: int, status: Any = "labelled", by: Any = MODEL, label: str | None = None
) -> Sample:
    """The verdict behind which `count` opinions stand; its label is that count, unless there is another."""
    opinions = [{"who": who} for who in WHO[:count]]
    boxes = [{"label": label or str(count)}]
    told = store.label(sample, status, boxes, 0.9, by, "", 200.0 + count, None, opinions)
    assert told is not None
    return told


def state(sample: Sample) -> tuple[str, str, int]:
    return sample.state, sample.label[0]["label"], len(sample.opinions)


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3])))
def test_in_whatever_order_and_however_often_verdicts_come_the_most_opinions_win(
    store: Store, order: tuple[int, ...]
) -> None:
    escalate(store, "a")
    for count in [*order, *order]:
        say(store, "a", count)
    sample = store.sample("a")
    assert sample is not None
    assert state(sample) == ("labelled", "3", 3)
    assert [opinion["who"] for opinion in sample.opinions] == WHO


@pytest.mark.parametrize(
    ("count", "status", "by", "expected"),
    [
        (2, "labelled", MODEL, ("labelled", "new", 2)),
        (1, "labelled", MODEL, ("labelled", "1", 1)),  # no more than there were
        (0, "labelled", MODEL, ("labelled", "1", 1)),
        (2, "unresolved", MODEL, ("labelled", "1", 1)),  # takes no label away
        (2, "rejected", MODEL, ("labelled", "1", 1)),
        (0, "labelled", PERSON, ("labelled", "new", 1)),  # a person corrects; what the models said stays known
        (0, "rejected", PERSON, ("rejected", "new", 1)),
    ],
)
def test_what_may_follow_a_label_with_one_opinion(
    store: Store, count: int, status: str, by: Any, expected: tuple[str, str, int]
) -> None:
    escalate(store, "a")
    say(store, "a", 1)
    after = say(store, "a", count, status, by, "new")
    assert state(after) == expected
    assert after.changed == (state(after)[:2] != ("labelled", "1"))


def test_no_model_replaces_a_persons_label_and_nothing_a_claimed_one(store: Store) -> None:
    escalate(store, "a")
    say(store, "a", 0, by=PERSON)
    assert not say(store, "a", 3).changed
    escalate(store, "b")
    say(store, "b", 1)
    store.claim(["b"], "job")
    assert not say(store, "b", 3).changed
    assert state(store.samples("claimed")[0]) == ("claimed", "1", 1)


def test_a_late_label_comes_after_unresolved_with_its_opinions(store: Store) -> None:
    escalate(store, "a")
    say(store, "a", 1, "unresolved")
    assert state(say(store, "a", 2)) == ("labelled", "2", 2)
