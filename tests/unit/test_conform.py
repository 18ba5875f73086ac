"""Whether an answer keeps to a schema: as jsonschema says, and with the place of what does not."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.engines.base import Unsuitable
from edged.engines.conform import fault
from edged.engines.constrain import grammar

NAMES = st.sampled_from(["a", "b", "c~/d"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([0.0, 1.0, 2.5, -1.5, 1e300])
    | st.text("xyß", max_size=4)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8
)
TYPES = st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null"])
COUNTS = st.integers(0, 3)
NUMBERS = st.integers(-2, 2)
LIMITED: dict[str, Any] = {
    "minLength": COUNTS, "maxLength": COUNTS, "minItems": COUNTS, "maxItems": COUNTS, "minimum": NUMBERS,
    "maximum": NUMBERS, "exclusiveMinimum": NUMBERS, "exclusiveMaximum": NUMBERS, "type": TYPES | st.lists(TYPES),
    "required": st.lists(NAMES, max_size=2),
}  # fmt: skip


def _around(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    nested = {
        "properties": st.dictionaries(NAMES, inner, max_size=3), "items": inner | st.booleans(),
        "additionalProperties": inner | st.booleans(),
    }  # fmt: skip
    return (
        st.fixed_dictionaries({}, optional=LIMITED | nested)
        | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3))
        | st.builds(lambda options: {"enum": options}, st.lists(VALUES, min_size=1, max_size=3))
        | st.builds(lambda option: {"const": option}, VALUES)
        | st.just({"$ref": "#/$defs/c~0~1d"})
    )


SCHEMAS = st.recursive(st.fixed_dictionaries({}, optional=LIMITED), _around, max_leaves=6)


@given(SCHEMAS, st.fixed_dictionaries({}, optional=LIMITED), VALUES)
def test_it_says_what_jsonschema_says(schema: dict[str, Any], defined: dict[str, Any], value: Any) -> None:
    schema = {**schema, "$defs": {"c~/d": defined}}
    try:
        grammar(schema)
    except Unsuitable:
        return  # never asked
    valid = jsonschema.Draft202012Validator(schema).is_valid(value)
    assert (fault(json.dumps(value), schema) == "") == valid


PLAIN: list[dict[str, Any]] = [
    *({"type": name} for name in ("object", "array", "string", "number", "integer", "boolean", "null")),
    {"type": ["string", "null"], "maxLength": 1}, {"maxLength": 1}, {"minLength": 2}, {"minItems": 2}, {"maxItems": 1},
    {"minimum": 1}, {"maximum": 1}, {"exclusiveMinimum": 1}, {"exclusiveMaximum": 1}, {"const": 1}, {"const": True},
    {"const": [1, {"a": True}]}, {"enum": [0, "xy", None]}, {"enum": [1, 2, "x"], "type": "integer"},
    {"items": {"type": "integer"}}, {"items": False}, {"properties": {"a": {"const": 1}}}, {"required": ["a", "b"]},
    {"properties": {"a": {}}, "additionalProperties": False}, {"additionalProperties": {"type": "boolean"}},
    {"anyOf": [{"type": "string"}, {"minimum": 2}]}, {"$ref": "#/$defs/one", "$defs": {"one": {"type": "integer"}}}, {},
]  # fmt: skip
SAID: list[Any] = [
    None, True, False, 0, 1, 1.0, 2, 1.5, 0.5, "", "x", "xy", "ß", [], [1], [1, 2], [1.5], [1, {"a": True}], [1, {"a": 1}],
    [True, {"a": True}], {}, {"a": 1}, {"a": True}, {"a": 1, "b": 2}, {"b": True}, [0], ["x", "y"],
]  # fmt: skip


@pytest.mark.parametrize("schema", PLAIN, ids=json.dumps)
def test_each_keyword_says_what_jsonschema_says(schema: dict[str, Any]) -> None:
    grammar(schema)
    valid = [value for value in SAID if jsonschema.Draft202012Validator(schema).is_valid(value)]
    found = [value for value in SAID if not fault(json.dumps(value), schema)]
    assert json.dumps(found) == json.dumps(valid)


VERDICT = {
    "type": "object",
    "properties": {"verdict": {"enum": ["accept", "reject"]}, "sure": {"type": "number", "maximum": 1}},
    "required": ["verdict"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"verdict": "accept", "sure": 0.5}', ""),
        (' {"verdict":"reject"}\n', ""),
        ('{"verdict": "maybe"}', '#/verdict: "maybe" is none of the values allowed'),
        ('{"verdict": "accept", "sure": 2}', "#/sure: 2 breaks maximum 1"),
        ('{"verdict": "accept", "sure": true}', "#/sure: true is not of type number"),
        ('{"verdict": "accept", "why": 1}', '#: "why" is not allowed'),
        ("{}", "#: 'verdict' is missing"),
        ("[]", "#: [] is not of type object"),
        ('```json\n{"verdict": "accept"}\n```', "it is no JSON"),
        ('{"verdict": "acc', "it is no JSON"),
        ('{"verdict": NaN}', "NaN is no number of JSON"),
        ("", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
    ],
)
def test_the_reason_names_the_place(text: str, said: str) -> None:
    found = fault(text, VERDICT)
    assert said in found
    assert (found == "") == (said == "")
