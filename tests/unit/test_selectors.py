"""Selectors of devices: what they mean, that they say themselves again, and that a wrong one names its place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.core.selectors import BadLabel, BadSelector, Selector, Term, parse, parse_label

WORDS = st.from_regex(r"\A[A-Za-z0-9_.~-]{1,12}\Z")
KEYS = st.sampled_from(["site", "line", "in", "notin", "a"])
VALUES = st.sampled_from(["a", "b", "in", "x-1"])
TERMS = st.builds(Term, KEYS | WORDS, st.lists(VALUES | WORDS, max_size=3, unique=True).map(tuple), st.booleans())
DEVICES = st.dictionaries(KEYS, VALUES)


@pytest.mark.parametrize(
    ("text", "labels", "meant"),
    [
        ("", {}, True),
        ("  ", {"a": "b"}, True),
        ("site=plant1", {"site": "plant1"}, True),
        ("site==plant1", {"site": "plant2"}, False),
        ("site=plant1", {}, False),
        ("profile!=pi4", {"profile": "pi5"}, True),
        ("profile!=pi4", {}, True),
        ("profile!=pi4", {"profile": "pi4"}, False),
        ("line in (a,b)", {"line": "b"}, True),
        ("line in ( a , b )", {"line": "c"}, False),
        ("line in (a)", {}, False),
        ("line notin (a,b)", {"line": "c"}, True),
        ("line notin (a,b)", {}, True),
        ("line notin (a,b)", {"line": "a"}, False),
        ("line", {"line": "x"}, True),
        ("line", {}, False),
        ("!line", {}, True),
        ("! line", {"line": "x"}, False),
        ("in in (in)", {"in": "in"}, True),
        (" site = plant1 , profile != pi4,line in (a,b)", {"site": "plant1", "line": "a"}, True),
        ("site=plant1,profile!=pi4,line in (a,b)", {"site": "plant1", "line": "a", "profile": "pi4"}, False),
    ],
)
def test_what_a_selector_means(text: str, labels: dict[str, str], meant: bool) -> None:
    assert parse(text).matches(labels) is meant


@pytest.mark.parametrize(
    ("text", "place", "expected", "found"),
    [
        ("site=", 6, "a value", "its end"),
        ("site===a", 7, "a value", "'=a'"),
        (",", 1, "a key", "','"),
        ("site=a,", 8, "a key", "its end"),
        ("site=a line=b", 8, "a comma", "'line=b'"),
        ("line in a", 9, "'('", "'a'"),
        ("line in ()", 10, "a value", "')'"),
        ("line in (a", 11, "')' or ','", "its end"),
        ("!=a", 1, "a key", "'!=a'"),
        ("site=plänt", 8, "letters, digits", "'änt'"),
        ("site='a'", 6, "letters, digits", "\"'a'\""),
        (f"a={'b' * 65}", 3, "letters, digits", f"'{'b' * 12}'"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_the_fix(text: str, place: int, expected: str, found: str) -> None:
    with pytest.raises(BadSelector) as caught:
        parse(text)
    said = str(caught.value)
    assert said.startswith(f"selector {text!r}: at character {place} {expected}")
    assert f"found {found}; write as in 'site=plant1,profile!=pi4,line in (a,b)'" in said


@given(st.lists(TERMS, max_size=5).map(tuple))
def test_a_selector_says_itself_again(terms: tuple[Term, ...]) -> None:
    assert parse(str(Selector(terms))) == Selector(terms)


@given(st.lists(TERMS, max_size=4).map(tuple), DEVICES)
def test_more_terms_never_mean_more_devices_and_a_term_or_its_reverse_holds(
    terms: tuple[Term, ...], labels: dict[str, str]
) -> None:
    for number, term in enumerate(terms):
        assert term.matches(labels) is not Term(term.key, term.values, not term.holds).matches(labels)
        assert Selector(terms[:number]).matches(labels) or not Selector(terms[: number + 1]).matches(labels)


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(["a", "=", "!=", "!", "(", ")", ",", " in ", " "]), max_size=9).map("".join)
)
def test_any_text_is_a_selector_or_says_why_not(text: str) -> None:
    try:
        found = parse(text)
    except BadSelector:
        return
    assert parse(str(found)) == found


def test_a_long_selector_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadSelector, match="shorten it"):
        parse("a=b," * 5000)
    with pytest.raises(BadSelector, match="more than 64 terms"):
        parse(",".join(["a=b"] * 65))


@pytest.mark.parametrize(
    ("text", "label"), [("line=a", ("line", "a")), ("line-", ("line", None)), ("a-b=c-", ("a-b", "c-"))]
)
def test_labels(text: str, label: tuple[str, str | None]) -> None:
    assert parse_label(text) == label


@pytest.mark.parametrize("text", ["", "line", "=a", "line=", "-", "li ne=a", "line=a b", "a=b=c", f"a={'b' * 65}"])
def test_what_is_no_label_is_named(text: str) -> None:
    with pytest.raises(BadLabel, match="use key=value"):
        parse_label(text)
