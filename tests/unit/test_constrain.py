"""Schemas become grammars, or an error that names the keyword. That answers keep to them: system/test_llama_json.py."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.engines.base import EngineError
from edged.engines.constrain import SCHEMA_BYTES_MAX, grammar
from edged.engines.numerals import INTEGER_MAX, RANGE_MAX, free_integer, free_number, integers, numbers

NEAR = st.integers(-1200, 1200)
WIDE = st.integers(-INTEGER_MAX, INTEGER_MAX)


def matches(rule: str, text: str) -> bool:
    """Whether `rule`, a grammar without references, allows `text`; such a grammar is a regular expression with quotes."""
    parts = re.findall(r'"[^"]*"|\[[^\]]*\]|[^\s"\[]+', rule)
    return re.fullmatch("".join(re.escape(p[1:-1]) if p[0] == '"' else p for p in parts), text) is not None


@given(NEAR, NEAR, NEAR)
def test_whole_numbers_within_bounds(one: int, other: int, value: int) -> None:
    low, high = min(one, other), max(one, other)
    rule = integers(low, high)
    assert matches(rule, str(value)) == (low <= value <= high)
    assert matches(rule, str(low))
    assert matches(rule, str(high))
    for text in ("-0", f"0{abs(value)}", f"{value}.0", "", "-", f"+{abs(value)}"):
        assert not matches(rule, text)


@given(WIDE, WIDE, WIDE)
def test_whole_numbers_within_wide_bounds(one: int, other: int, value: int) -> None:
    low, high = min(one, other), max(one, other)
    assert matches(integers(low, high), str(value)) == (low <= value <= high)


@given(
    st.integers(-30, 30), st.integers(1, 20), st.booleans(), st.booleans(),
    st.integers(-32_000, 52_000).map(lambda n: n / 1000),
)  # fmt: skip
def test_numbers_within_bounds(low: int, span: int, low_open: bool, high_open: bool, value: float) -> None:
    high = low + span
    rule = numbers(low, high, low_open, high_open)
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    texts = {f"{value:.3f}", f"{value:.9f}", str(int(value)) if value == int(value) else f"{value:.4f}"}
    for text in texts:
        expected = above and below and not (value == 0 and text.startswith("-"))
        assert matches(rule, text) == expected, (rule, text)


def test_a_number_between_bounds_that_touch() -> None:
    assert matches(numbers(3, 3, False, False), "3.000")
    assert not matches(numbers(3, 3, False, False), "3.001")
    assert not matches(numbers(0, 1, True, True), "0.000")
    assert matches(numbers(0, 1, True, True), "0.000000001")
    assert matches(numbers(-1, 0, False, True), "-0.5")
    assert not matches(numbers(-1, 0, False, True), "0")
    # What a float64 would round to the bound has too many digits to be written.
    assert not matches(numbers(0, RANGE_MAX, False, True), f"{RANGE_MAX - 1}.9999999999")


@given(st.integers(-(10**18), 10**18))
def test_free_numbers_have_a_limit(value: int) -> None:
    assert matches(free_integer(), str(value)) == (abs(value) <= INTEGER_MAX)
    assert matches(free_number(), str(value)) == (abs(value) <= INTEGER_MAX)


@pytest.mark.parametrize("text", ["0", "-1.5", "12e5", "1E-07", "3.141592653", "0.5e+99"])
def test_free_numbers(text: str) -> None:
    assert matches(free_number(), text)


@pytest.mark.parametrize("text", ["01", "1.", ".5", "1e", "1e999", "--1", "1.5.2", "0x1", "NaN"])
def test_what_is_no_number(text: str) -> None:
    assert not matches(free_number(), text)


DEEP: dict[str, Any] = {}
for _ in range(40):
    DEEP = {"type": "array", "items": DEEP}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}},
}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (7, "the schema is 7; send an object"),
        (None, "send an object"),
        ([{"type": "string"}], "send an object"),
        (True, "send an object"),
        ({"type": "string", "pattern": "^a+$"}, "#: keyword 'pattern' is not supported; supported:"),
        ({"type": "array", "items": {"type": "string", "format": "date"}}, "#/items: keyword 'format'"),
        ({"type": "object", "properties": {"a": {"oneOf": [{}]}}}, "#/properties/a: keyword 'oneOf'"),
        ({"type": "object", "properties": {"a": {}}, "patternProperties": {}}, "'patternProperties'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "integer", "multipleOf": 5}, "'multipleOf'"),
        ({"not": {}}, "'not'"),
        ({"allOf": [{}]}, "'allOf'"),
        ({"type": "strnig"}, 'type "strnig" is unknown; known: object'),
        ({"type": []}, "allows nothing"),
        ({"type": {"a": 1}}, "is unknown"),
        ({"type": "object", "properties": {"a": False}}, "#/properties/a: false is no schema"),
        ({"type": "object", "properties": []}, "properties must be an object"),
        ({"type": "object", "required": "a"}, "required must be a list"),
        ({"type": "object", "required": ["b"], "additionalProperties": False}, "'b' is required"),
        ({"type": "object", "properties": {str(n): {} for n in range(101)}}, "101 properties, at most 100"),
        ({"enum": []}, "enum must be a list of 1 to 256"),
        ({"enum": list(range(257))}, "enum must be a list of 1 to 256"),
        ({"enum": "abc"}, "enum must be a list"),
        ({"enum": ["a"], "type": "integer"}, "no value of enum is of type integer"),
        ({"enum": ["abc"], "maxLength": 2}, "'maxLength' beside 'enum'"),
        ({"const": True, "type": "integer"}, "no value of const is of type integer"),
        ({"anyOf": [{"type": "string"}], "required": ["a"]}, "'required' beside 'anyOf'"),
        ({"anyOf": [{"type": "string"}, {"minContains": 1}]}, "#/anyOf/1: keyword 'minContains'"),
        ({"type": "string", "minLength": 5, "maxLength": 4}, "minLength 5 is more than maxLength 4"),
        ({"type": "string", "maxLength": 100_000}, "maxLength 100000: use a whole number from 0 to 1000"),
        ({"type": "string", "maxLength": -1}, "maxLength -1"),
        ({"type": "string", "maxLength": "3"}, 'maxLength "3"'),
        ({"type": "array", "minItems": 2.5}, "minItems 2.5"),
        ({"type": "array", "minItems": True}, "minItems true"),
        ({"type": "integer", "minimum": 2.1, "maximum": 2.9}, "no whole number"),
        ({"type": "integer", "minimum": 5, "exclusiveMaximum": 5}, "no whole number"),
        ({"type": "integer", "minimum": "5"}, 'minimum "5"'),
        ({"type": "integer", "maximum": 1e300}, "maximum 1e+300"),
        ({"type": "number", "minimum": 0.5}, "only whole numbers are supported as bounds"),
        ({"type": "number", "minimum": 1, "exclusiveMaximum": 1}, "no number lies within"),
        ({"$ref": "https://example.org/schema"}, "only places within the schema"),
        ({"$ref": "#/$defs/absent", "$defs": {}}, "points to nothing"),
        ({"$ref": 5}, "only places within"),
        ({"$ref": "#"}, "only places within"),
        (TREE, "'#/$defs/node' is recursive"),
        (DEEP, "deeper than 32"),
        ({"title": "x" * SCHEMA_BYTES_MAX}, f"bytes, at most {SCHEMA_BYTES_MAX}"),
        ({"const": float("nan")}, "not JSON"),
        ({"const": "\ud800"}, "not JSON"),
        ({"const": {1, 2}}, "not JSON"),
        ({"anyOf": [{"type": "string", "maxLength": n} for n in range(600, 800)]}, "characters and items in all"),
    ],
)
def test_what_cannot_be_kept_to_is_an_error_with_its_place(schema: Any, said: str) -> None:
    with pytest.raises(EngineError, match=re.escape(said)):
        grammar(schema)


def test_a_schema_in_a_circle_is_an_error() -> None:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    with pytest.raises(EngineError, match="not JSON"):
        grammar(schema)
