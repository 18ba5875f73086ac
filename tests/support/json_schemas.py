"""JSON Schemas that every engine must keep to, whatever its model would rather say."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x", "y"]}
SCHEMAS: dict[str, dict[str, Any]] = {
    "keys": {
        "type": "object",
        "properties": {
            "a": {"type": "boolean"}, "b": {"type": "null"}, "c": {"const": "ja"}, "d": {"type": "boolean"},
        },
        "required": ["b", "d"],
        "additionalProperties": False,
    },
    "all optional": {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}},
    "required without properties": {"type": "object", "required": ["id"], "additionalProperties": {"type": "boolean"}},
    "no keys at all": {"type": "object", "additionalProperties": False},
    "enum": {"enum": ["accept", 'say "no"', "a\\b", "tab\there", "größer", "日本", 7, 1.5, None, True, {"k": [1, "x"]}, []]},
    "enum of a type": {"type": ["string", "integer"], "enum": ["on", 1, 2.0, None, False]},
    "nested arrays": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        "minItems": 2,
        "maxItems": 3,
    },
    "empty array": {"type": "array", "maxItems": 0},
    "array of few": {"type": "array", "items": {"type": "null"}, "minItems": 3, "maxItems": 3},
    "integer range": {"type": "array", "items": {"type": "integer", "minimum": -17, "exclusiveMaximum": 205}, "maxItems": 5},
    "number range": {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "maxItems": 5},
    "bare integer": {"type": "integer", "minimum": 5},
    "bare number": {"type": "number"},
    "string": {"type": "string", "minLength": 3, "maxLength": 6},
    "string of some length": {"type": "string"},
    "anyOf": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "array", "items": {"type": "integer"}, "maxItems": 2}]},
    "refs": {
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point", "description": "where to"}},
        "required": ["from", "to"],
        "$defs": {"point": POINT},
    },
    "map": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "null"}}},
    "odd names": {"type": "object", "properties": {'"\\\n': {"const": 0}, "ß{}|": {}}, "required": ['"\\\n', "ß{}|"]},
    "several types": {"type": ["object", "null", "string"], "maxLength": 3, "properties": {"a": {}}},
    "no type": {"properties": {"a": {"maxLength": 2}}, "required": ["a"]},
    "anything": {},
}  # fmt: skip

# Their values may be longer than the tokens of the test.
LONG_WINDED = {"map", "odd names", "several types", "string of some length", "anything"}


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Any schema that the engines take."""
    counts = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(sorted)
    numbers = st.tuples(st.integers(-300, 300), st.integers(2, 300)).map(lambda pair: (pair[0], sum(pair)))
    names = st.sampled_from(["a", "b", "long name", "ß", '"'])
    leaves = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": 'x"y'}, {"enum": [1, "1", None]}]),
        counts.map(lambda n: {"type": "string", "minLength": n[0], "maxLength": n[1]}),
        numbers.map(lambda n: {"type": "integer", "minimum": n[0], "maximum": n[1]}),
        numbers.map(lambda n: {"type": "integer", "exclusiveMinimum": n[0], "exclusiveMaximum": n[1]}),
        numbers.map(lambda n: {"type": "number", "minimum": n[0], "exclusiveMaximum": n[1]}),
        numbers.map(lambda n: {"type": ["null", "number"], "exclusiveMinimum": n[0], "maximum": n[1]}),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.tuples(inner, counts).map(lambda p: {"items": p[0], "minItems": p[1][0], "maxItems": p[1][1]}),
            st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
            st.tuples(st.dictionaries(names, inner, max_size=4), st.lists(names, max_size=2, unique=True)).map(
                lambda p: {"type": "object", "properties": p[0], "required": [name for name in p[1] if name in p[0]]}
            ),
        ),
        max_leaves=8,
    )
