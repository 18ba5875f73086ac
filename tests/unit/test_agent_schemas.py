"""Schemas of agents: three forms, one meaning, and nothing that does not fit gets through."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from edged.agents.schemas import BadSchema, compile_schema, faults, for_grammar, of_type
from edged.engines.constrain import grammar

JSON_SCHEMA = {
    "type": "object",
    "properties": {
        "summary": {"type": "string", "minLength": 5},
        "key_points": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    },
    "required": ["summary", "key_points"],
}


@pytest.mark.parametrize(
    ("form", "fits", "does_not"),
    [
        (["sub_question"], {"sub_question": "What?"}, {"wrong_field": "value"}),
        (["sub_question"], {"sub_question": ""}, {"sub_question": 7}),
        (["a", "b"], {"a": "1", "b": "2"}, {"a": "1"}),
        (["a"], {"a": "1", "more": 2}, "a"),
        ({"report": str, "confidence": float}, {"report": "r", "confidence": 1}, {"report": "r", "confidence": "high"}),
        ({"data": list, "n": int}, {"data": [], "n": 2}, {"data": [], "n": 2.5}),
        ({"ok": bool}, {"ok": True}, {"ok": 1}),
        ({"names": list[str]}, {"names": ["a"]}, {"names": [1]}),
        ({"type": str, "what": int}, {"type": "x", "what": 1}, {"type": 5, "what": 1}),
        ({"box": {"x": int}}, {"box": {"x": 1}}, {"box": {}}),
        (JSON_SCHEMA, {"summary": "long enough", "key_points": ["a"]}, {"summary": "no", "key_points": ["a"]}),
        (JSON_SCHEMA, {"summary": "long enough", "key_points": ["a"]}, {"summary": "long enough", "key_points": []}),
        ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}}, {"a1": 1}, {"a1": "1"}),
    ],
)
def test_the_forms_of_a_schema(form: Any, fits: Any, does_not: Any) -> None:
    """A4."""
    schema = compile_schema(form, "input_schema")
    assert faults(fits, schema) == ""
    assert faults(does_not, schema) != ""


def test_no_schema_takes_anything() -> None:
    assert compile_schema(None, "input_schema") is None
    assert faults({"anything": 1}, None) == ""


def test_what_is_wrong_is_named_with_its_place() -> None:
    schema = compile_schema({"boxes": list[int], "name": str}, "output_schema")
    said = faults({"boxes": [1, "two"]}, schema)
    assert "'name' is a required property" in said and "/boxes/1: 'two' is not of type 'integer'" in said
    assert faults({"boxes": ["x"] * 10, "name": ""}, schema).endswith("and 7 more")


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("answer", 'write a list, ["answer"]'),
        ([], "0 fields"),
        ([1], "1 in the list is no name"),
        ({"x": object}, "field 'x': <class 'object'> is no type of a JSON value"),
        ({"x": dict[int, str]}, "keys of a JSON object are strings"),
        ({"type": "objekt"}, "'objekt' is not valid"),
        ({"type": "object", "required": "name"}, "/required"),
        ({"const": float("nan")}, "a schema must be JSON"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(form: Any, said: str) -> None:
    with pytest.raises(BadSchema, match="output_schema") as error:
        compile_schema(form, "output_schema")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (Optional[str], {"anyOf": [{"type": "string"}, {"type": "null"}]}),  # noqa: UP045 - as people write it
        (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        (Literal["a", "b"], {"enum": ["a", "b"]}),
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
        (list[list[bool]], {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}}),
        (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
        (Annotated[int, "in mm"], {"type": "integer", "description": "in mm"}),
        (Any, {}),
        (None, {"type": "null"}),
    ],
)
def test_types_of_python_as_schemas(hint: Any, schema: dict[str, Any]) -> None:
    assert of_type(hint, "x") == schema


SCALARS = st.sampled_from(["string", "integer", "number", "boolean", "null"])
SCHEMAS = st.recursive(
    st.one_of(
        SCALARS.map(lambda name: {"type": name}),
        st.just({"type": "string", "pattern": "^a"}),
        st.just({"type": "number", "multipleOf": 0.5}),
        st.just({"type": "array", "uniqueItems": True, "items": {"type": "integer"}}),
        st.lists(st.one_of(st.integers(), st.text(max_size=5)), min_size=1, max_size=3).map(lambda xs: {"enum": xs}),
    ),
    lambda inner: st.one_of(
        inner.map(lambda each: {"type": "array", "items": each, "maxItems": 3}),
        st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, min_size=1, max_size=3).map(
            lambda found: {"type": "object", "properties": found, "required": list(found)}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
    ),
    max_leaves=6,
)


@given(schema=SCHEMAS, data=st.data())
def test_the_grammars_schema_allows_all_that_the_schema_allows(schema: dict[str, Any], data: st.DataObject) -> None:
    """Looser it may be, never narrower in types: what a model is not allowed to say it could never answer."""
    looser = for_grammar(schema)
    grammar(looser)
    Draft202012Validator.check_schema(looser)
    value = data.draw(values(schema))
    if not faults(value, schema):
        assert not faults(value, looser), (schema, looser, value)


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values near a schema."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([values(each) for each in schema["anyOf"]])
    match schema["type"]:
        case "object":
            return st.fixed_dictionaries({name: values(each) for name, each in schema["properties"].items()})
        case "array":
            return st.lists(values(schema["items"]), max_size=3)
        case "string":
            return st.text("ab", max_size=4)
        case "integer":
            return st.integers(-5, 5)
        case "number":
            return st.sampled_from([0, 0.5, -1.5, 3])
        case "boolean":
            return st.booleans()
    return st.none()


def test_a_schema_too_large_for_a_grammar_still_gets_json() -> None:
    huge = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(150)}, "required": ["p1"]}
    assert for_grammar(huge) == {"type": "object"}
    assert json.dumps(for_grammar(None)) == '{"type": "string"}'
