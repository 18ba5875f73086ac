"""Schemas of agents: three forms, one meaning, and nothing that does not fit gets through."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field

from edged.agents import Agent, AgentRegistry, Tool
from edged.agents.schemas import BadSchema, compile_schema, faults, for_grammar, of_type
from edged.agents.steps import step_schema
from edged.engines.constrain import grammar
from tests.support.scripted import Scripted, ask, call, final

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
NAMES = ["A", "B"]  # of what a $ref may lead to
REFS = st.sampled_from(NAMES).map(lambda name: {"$ref": f"#/$defs/{name}"})
SCHEMAS = st.recursive(
    st.one_of(
        REFS,
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


PARTS = SCHEMAS.map(lambda each: {"type": "object", "properties": {"v": each, "d": {"description": "x", **each}}})


@st.composite
def whole(draw: st.DrawFn) -> dict[str, Any]:
    """A schema with references, also such that lead into themselves. What a name stands for is an object or an array, so
    that no reference leads round without a part in between."""
    root = draw(SCHEMAS)
    return {**root, "$defs": {name: draw(PARTS) for name in NAMES}}


@given(schema=whole(), data=st.data())
def test_the_grammars_schema_allows_all_that_the_schema_allows(schema: dict[str, Any], data: st.DataObject) -> None:
    """Looser it may be, never narrower in types: what a model is not allowed to say it could never answer."""
    assert compile_schema(schema, "output_schema") == schema
    looser = for_grammar(schema)
    grammar(looser)
    Draft202012Validator.check_schema(looser)
    value = data.draw(values(schema, schema["$defs"], 4))
    if not faults(value, schema):
        assert not faults(value, looser), (schema, looser, value)


@settings(max_examples=30)
@given(tools=st.lists(whole(), max_size=2), peers=st.lists(whole(), max_size=2), answer=whole(), data=st.data())
def test_every_step_fits_the_grammar_of_steps(
    tools: list[dict[str, Any]], peers: list[dict[str, Any]], answer: dict[str, Any], data: st.DataObject
) -> None:
    """A4. Whatever the schemas are that stand within the schema of a step, their references too."""
    made = {f"t{number}": Tool.described(f"t{number}", "", each, print) for number, each in enumerate(tools)}
    asked = {f"p{number}": compile_schema(each, "input_schema") for number, each in enumerate(peers)}
    steps = step_schema(made, asked, compile_schema(answer, "output_schema"))
    grammar(steps)
    for schema, step in (
        *((tool.parameters, lambda value, name=name: call(name) | given_to("arguments", name, value))
          for name, tool in made.items()),
        *((schema, lambda value, name=name: ask(name, value)) for name, schema in asked.items()),
        (answer, final),
    ):  # fmt: skip
        value = data.draw(values(schema or {}, (schema or {})["$defs"], 4))
        if not faults(value, schema):
            assert not faults(step(value), steps), (steps, step(value))


def given_to(key: str, name: str, value: Any) -> dict[str, Any]:
    return {"action_input": {"tool_name": name, key: value}}


def values(schema: dict[str, Any], names: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    """Values near a schema; `names`: what its references lead to, at most `depth` of them within one another."""
    if "$ref" in schema:
        return values(names[schema["$ref"].rpartition("/")[2]], names, depth - 1) if depth else st.just({})
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([values(each, names, depth) for each in schema["anyOf"]])
    match schema["type"]:
        case "object":
            inner = {name: values(each, names, depth) for name, each in schema["properties"].items()}
            return st.fixed_dictionaries(inner) if depth else st.just({})
        case "array":
            return st.lists(values(schema["items"], names, depth), max_size=3)
        case "string":
            return st.text("ab", max_size=4)
        case "integer":
            return st.integers(-5, 5)
        case "number":
            return st.sampled_from([0, 0.5, -1.5, 3])
        case "boolean":
            return st.booleans()
    return st.none()


class Box(BaseModel):
    """A place in a picture."""

    x: int = Field(ge=0)
    y: int = Field(ge=0)


class Part(BaseModel):
    """A part and its parts."""

    name: str
    box: Box = Field(description="where it is seen")
    parts: list[Part] = []
    grade: Literal["a", "b"] | None = None


PART = {"name": "bolt", "box": {"x": 1, "y": 2}, "parts": [{"name": "nut", "box": {"x": 1, "y": 2}}], "grade": "a"}
BAD_PART = PART | {"parts": [{"name": "nut", "box": {"x": -1, "y": 2}}]}


def test_a_pydantic_models_schema_works_for_requests_answers_tools_and_peers() -> None:
    """Its $refs stand within the schema of a step, and still lead somewhere."""
    schema = Part.model_json_schema()
    model = Scripted(call("keep", part=PART), ask("Teller", PART), final(BAD_PART), final(PART))
    tool = Tool.described(
        "keep", "", {"type": "object", "properties": {"part": schema}} | {"$defs": schema["$defs"]}, str
    )
    teller = Agent(Scripted(final("seen")), "t", agent_name="Teller", input_schema=schema)
    agent = Agent(model, "x", {"keep": tool}, allowed_peers=["Teller"], input_schema=schema, output_schema=schema)
    answer = asyncio.run(agent.auto_run(PART))
    assert answer.content == PART, answer
    asked = model.asked
    assert asked[2].messages[-1].content == "seen", "the peer was asked"
    assert "/parts/0/box/x: -1 is less than the minimum of 0" in asked[3].messages[-1].content
    response = (asked[0].schema or {})["anyOf"][-1]["properties"]["action_input"]["properties"]["response"]
    assert response["properties"]["box"]["required"] == ["x", "y"], "the grammar keeps to what stands behind a $ref"
    assert "$ref" not in json.dumps(asked[0].schema) and "$ref" not in asked[0].messages[0].content
    assert asked[0].messages[0].content.count("where it is seen") == 3, "the model is told what stands behind a $ref"
    assert asyncio.run(agent.auto_run(BAD_PART)).role == "error" and len(asked) == 4
    del teller


def test_a_schema_within_a_table_of_fields_keeps_its_references() -> None:
    schema = compile_schema(
        {"part": Part.model_json_schema(), "again": Box.model_json_schema(), "n": int}, "input_schema"
    )
    assert faults({"part": PART, "again": {"x": 1, "y": 1}, "n": 1}, schema) == ""
    assert "/part/parts/0/box/x" in faults({"part": BAD_PART, "again": {"x": 1, "y": 1}, "n": 1}, schema)
    grammar(step_schema({}, {}, schema))


def test_what_stands_beside_a_reference_counts_too() -> None:
    schema = {
        "$ref": "#/$defs/base", "properties": {"more": {"type": "integer"}}, "required": ["more"],
        "$defs": {"base": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}},
    }  # fmt: skip
    expected = {"properties": {"a": {"type": "string"}, "more": {"type": "integer"}}, "required": ["a", "more"]}
    assert for_grammar(schema) == {"type": "object"} | expected
    assert for_grammar({"allOf": [{"$ref": "#/$defs/base"}, {"required": ["a"]}], "$defs": schema["$defs"]}) == {
        "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"],
    }  # fmt: skip


def test_references_without_end_in_number_are_cut_short() -> None:
    """Each level doubles what is written out: 2 to the 40 schemas."""
    levels = {f"l{n}": {"type": "array", "items": {"anyOf": [{"$ref": f"#/$defs/l{n + 1}"}] * 2}} for n in range(40)}
    schema = {"$ref": "#/$defs/l0", "$defs": levels | {"l40": {"type": "string"}}}
    assert compile_schema(schema, "x") == schema
    grammar(step_schema({}, {"p": schema}, schema))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"$ref": "#/$defs/Box"}, "$ref '#/$defs/Box' leads to nothing in this schema"),
        ({"properties": {"a": {"$ref": "https://schemas.example/a"}}}, "'https://schemas.example/a' leads to nothing"),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, "leads to nothing in this schema"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "leads back to itself"),
        ({"$ref": "#/odd/a", "odd": {"a": {"type": "objekt"}}}, "'objekt' is not valid"),
        ({"$ref": "#/enum/0", "enum": [1]}, "1 is not of type"),
    ],
)
def test_a_reference_that_leads_nowhere_is_refused_and_nothing_is_fetched(
    schema: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("something was fetched"))
    with pytest.raises(BadSchema) as error:
        compile_schema(schema, "output_schema")
    assert said in str(error.value)


@pytest.mark.parametrize("ref", ["#/$defs/Box", "https://schemas.example/a", "#"])
def test_nothing_fits_a_reference_to_nowhere_that_was_never_compiled(ref: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("something was fetched"))
    assert faults({"a": 1}, {"$ref": ref}) != ""


def test_an_agent_with_more_than_a_step_can_hold_is_not_made() -> None:
    tools = {f"t{n}": Tool.described(f"t{n}", "", {"type": "object"}, print) for n in range(300)}
    with pytest.raises(BadSchema, match="300 tools and 0 peers are too much for one step"):
        Agent(Scripted(), "x", tools, agent_name="Laden")
    assert AgentRegistry.get("Laden") is None, "its name is free"


def test_schemas_that_are_too_much_together_are_left_open_in_the_grammar_and_still_hold() -> None:
    wide = {"type": "object", "properties": {"text": {"type": "string"}, "n": {"type": "integer"}}, "required": ["n"]}
    many = [{f"p{n}": {"type": "string", "maxLength": 1000 - 2 * n - k} for n in range(90)} for k in range(2)]
    tools = {f"t{k}": Tool.described(f"t{k}", "", {"type": "object", "properties": many[k]}, print) for k in range(2)}
    deep: dict[str, Any] = wide
    for _ in range(31):
        deep = {"type": "object", "properties": {"in": deep}, "required": ["in"]}
    for known, answer in ((tools, wide), ({}, deep)):
        for each in (*(tool.parameters for tool in known.values()), answer):
            assert for_grammar(each) == each, "alone it is not too much"
        grammar(step_schema(known, {}, answer))
    assert step_schema(tools, {}, wide)["anyOf"][2]["properties"]["action_input"]["properties"]["response"] == wide


def test_a_schema_too_large_for_a_grammar_still_gets_json() -> None:
    huge = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(150)}, "required": ["p1"]}
    assert for_grammar(huge) == {"type": "object"}
    assert json.dumps(for_grammar(None)) == '{"type": "string"}'
