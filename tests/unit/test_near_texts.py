"""Near-duplicates of texts: the same question in other clothes, and questions that only look alike."""

from __future__ import annotations

import random
import string

import pytest

from trainer.core.near_texts import RUNS_MAX, Known, alike, plain, resemblance, sketch

QUESTION = "The pump in hall B makes a grinding noise since this morning. Which part should be looked at first?"


@pytest.mark.parametrize(
    "other",
    [
        QUESTION,
        QUESTION.upper(),
        "  " + QUESTION.replace(" ", "\n ") + "\t",
        QUESTION.replace(".", "").replace("?", " ?!"),
        QUESTION.replace("grinding", "grindng"),
        QUESTION.replace("morning", "mornin").replace("looked", "loked"),
        "Please: " + QUESTION,
        QUESTION.replace("this morning", "the morning"),
        QUESTION.replace("fi", "\ufb01"),
    ],
)
def test_the_same_question_in_other_clothes_is_found(other: str) -> None:
    assert alike(sketch(QUESTION), sketch(other))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (QUESTION, "The belt in hall C is worn out and slips when it starts. Who may stop the line to change it?"),
        ("line 1 read a 7 with score 0.9. What to do?", "line 1 read a 7 with score 0.8. What to do?"),
        ("line 1 read a 7 with score 0.9. What to do?", "line 7 read a 1 with score 0.9. What to do?"),
        ("What is a + b?", "What is a - b?"),
        ("shelf a holds a hammer. Who came?", "shelf a holds a river. Who came?"),
        ("", ""),
        ("?", "!"),
    ],
)
def test_another_question_is_not(first: str, second: str) -> None:
    assert not alike(sketch(first), sketch(second))


def test_resemblance_is_the_share_of_common_runs() -> None:
    first, second = sketch("abcdefgh"), sketch("abcdefxy")  # abcde bcdef | cdefg defgh | cdefx defxy
    assert resemblance(first, second) == pytest.approx(2 / 6)
    assert resemblance(first, first) == 1.0
    assert plain(" Où,  ça?! ") == "où ça"


def test_long_texts_are_estimated() -> None:
    chance = random.Random(1)
    words = ["".join(chance.choices(string.ascii_lowercase, k=6)) for _ in range(1500)]
    long, changed = " ".join(words), " ".join([*words[:750], *words[:-751:-1]])
    first, second = sketch(long), sketch(changed)
    assert first.cut and len(first.runs) == RUNS_MAX
    runs = [{text[at : at + 5] for at in range(len(text) - 4)} for text in (long, changed)]
    exact = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
    assert resemblance(first, second) == pytest.approx(exact, abs=0.04)
    assert Known([sketch(QUESTION), first]).near(sketch(long + " and a word")) == 1


def test_the_search_finds_what_comparing_all_pairs_finds() -> None:
    chance = random.Random(3)
    vocabulary = ["".join(chance.choices("abcdef", k=chance.randint(2, 7))) for _ in range(40)]
    texts = [" ".join(chance.choices(vocabulary, k=chance.randint(1, 12))) for _ in range(120)]
    texts += [" ".join([*text.split()[:-1], chance.choice(vocabulary)]) for text in texts]
    texts += [f"line {number % 7} {text}" for number, text in enumerate(texts[:60])]
    sketches = [sketch(text) for text in texts]
    half, rest = sketches[:120], sketches[120:]
    known = Known(half)
    expected = [next((place for place, each in enumerate(half) if alike(each, other)), -1) for other in rest]
    assert [known.near(other) for other in rest] == expected
    assert sum(place >= 0 for place in expected) > 10
    assert Known().near(sketch(QUESTION)) == -1


def test_a_set_of_questions_that_differ_in_one_word_asks_for_a_higher_resemblance() -> None:
    rows = [
        sketch(f"Is the {thing} in stock, and when can it be delivered to our shop in the old town?")
        for thing in ("pump", "lamp", "oven")
    ]
    assert [Known(rows[:1]).near(each) for each in rows] == [0, 0, 0]
    assert [Known(rows[:1], 0.95).near(each) for each in rows] == [0, -1, -1]
