"""Answers under a JSON Schema: valid, or ended as `truncated`. The model is random, so it never means to write JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edged.engines.answer import draw
from edged.engines.base import EngineError, Finished, GenerateRequest, Token
from edged.engines.constrain import grammar
from edged.engines.llama import LlamaGenerator
from edged.engines.llama_grammar import Constraint, unfinished
from tests.support.chatty import ask, load, make_chatty
from tests.support.json_schemas import LONG_WINDED, SCHEMAS, schemas


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaGenerator]:
    engine = load(make_chatty(tmp_path_factory.mktemp("chatty")))
    yield engine
    engine.close()


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_is_valid_or_truncated(engine: LlamaGenerator, name: str) -> None:
    schema, complete = SCHEMAS[name], 0
    for seed in range(30):
        said, end = ask(
            engine, prompt="the line", schema=schema, seed=seed, temperature=(0.0, 1.0, 3.0)[seed % 3], tokens_max=250
        )
        if end.reason == "truncated":
            assert end.answer_tokens == 250
            continue
        assert end.reason in ("stop", "length")
        jsonschema.validate(json.loads(said), schema)
        assert np.isfinite(end.mean_logprob)
        assert "�" not in said
        complete += 1
    assert complete >= (10 if name in LONG_WINDED else 30)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schemas(), st.integers(0, 2**32), st.sampled_from([0.0, 0.8, 4.0]), st.sampled_from([6, 10, 400]))
def test_any_schema_is_kept_to(
    engine: LlamaGenerator, schema: dict[str, Any], seed: int, temperature: float, tokens_max: int
) -> None:
    """Also as far as an answer went that its tokens did not reach for."""
    said, end = ask(engine, prompt="the", schema=schema, seed=seed, temperature=temperature, tokens_max=tokens_max)
    if end.reason == "truncated":
        assert end.answer_tokens == tokens_max
        begun = closed(said)
        if begun is None:
            assert SCALAR_BEGUN.fullmatch(said.strip()), said
        else:
            jsonschema.validate(json.loads(begun), begun_of(schema))
    else:
        assert end.reason in ("stop", "length")
        jsonschema.validate(json.loads(said), schema)


# A number, a text or a word that is not at its end, or not begun.
SCALAR_BEGUN = re.compile(r'(-?\d*(\.\d*)?([eE][-+]?\d*)?|"([^"\\]|\\.)*\\?|[a-z]*)"?')


def closed(text: str) -> str | None:
    """The list or object that a cut-off text begins, with what is whole in it; None when it begins none."""
    stack, quoted, escaped = "", False, False
    whole = None
    for at, char in enumerate(text):
        if quoted:
            quoted, escaped = escaped or char != '"', char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "[{":
            stack += "]" if char == "[" else "}"
            whole = text[: at + 1] + stack[::-1]
        elif char in "]}":
            stack = stack[:-1]
            whole = text[: at + 1] + stack[::-1]
        elif char == ",":
            whole = text[:at] + stack[::-1]
    return whole


def begun_of(schema: Any) -> Any:
    """The schema without what only a whole value fulfils."""
    if isinstance(schema, list):
        return [begun_of(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "properties" in schema:
        named = {name: begun_of(each) for name, each in schema["properties"].items()}
        return {"type": "object", "properties": named, "additionalProperties": False}
    return {
        key: value if key in ("const", "enum") else begun_of(value)
        for key, value in schema.items()
        if key != "minItems"
    }


def test_what_was_cut_off_is_closed_where_it_was_whole() -> None:
    assert closed('{"a": [1, tru') == '{"a": [1]}'
    assert closed('{"a": {"b": 1}, "c') == '{"a": {"b": 1}}'
    assert closed('["]\\"[", ') == '["]\\"["]'
    assert closed("[[") == "[[]]" and closed('"[') is None and closed("1.") is None
    assert SCALAR_BEGUN.fullmatch("-1.5e") and SCALAR_BEGUN.fullmatch('"a\\') and not SCALAR_BEGUN.fullmatch("1x")
    wrong = {"anyOf": [{"items": {"type": "integer", "maximum": 4}, "minItems": 3}]}
    jsonschema.validate([4], begun_of(wrong))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([5], begun_of(wrong))


def test_both_ends_of_what_is_allowed_are_reached(engine: LlamaGenerator) -> None:
    for name, expected in (
        (
            "all optional",
            {"{}", '{"a":1}', '{"b":2}', '{"c":3}', '{"a":1,"b":2}', '{"a":1,"b":2,"c":3}', '{"a":1,"c":3}'},
        ),
        ("enum of a type", {'"on"', "1", "2.0"}),
    ):
        answers = {
            ask(engine, prompt="the line", schema=SCHEMAS[name], seed=seed, temperature=5.0)[0].replace(" ", "")
            for seed in range(300)
        }
        assert expected <= answers


def test_a_number_may_go_on_until_the_model_ends_it(engine: LlamaGenerator) -> None:
    request = {"prompt": "the line", "schema": {"type": "integer", "minimum": 0}, "temperature": 3.0}
    answers = {ask(engine, seed=seed, **request)[0] for seed in range(200)}
    assert max(len(answer) for answer in answers) > 5  # more digits than a token of this model has
    assert min(len(answer) for answer in answers) == 1
    assert all(answer == str(int(answer)) for answer in answers)


@pytest.mark.parametrize("tokens_max", [1, 2, 5, 9])
def test_too_few_tokens_end_as_truncated(engine: LlamaGenerator, tokens_max: int) -> None:
    _, end = ask(engine, prompt="the", schema=SCHEMAS["refs"], tokens_max=tokens_max)
    assert (end.reason, end.answer_tokens) == ("truncated", tokens_max)


def test_the_end_of_the_context_and_stop_sequences_truncate_too(engine: LlamaGenerator) -> None:
    _, end = ask(engine, prompt="!" * (engine.context - 4), schema=SCHEMAS["refs"])
    assert (end.reason, end.answer_tokens) == ("truncated", 4)
    said, end = ask(engine, prompt="the", schema=SCHEMAS["refs"], stop=('"x"',))
    assert (said.replace(" ", ""), end.reason) == ('{"from":{', "truncated")


def test_halted_answers_say_why_and_the_next_one_is_whole(engine: LlamaGenerator) -> None:
    halts = iter(["", "", "", "deadline"])
    _, end = ask(engine, prompt="the", schema=SCHEMAS["refs"], halt=lambda: next(halts))
    assert (end.reason, end.answer_tokens) == ("deadline", 3)
    said, end = ask(engine, prompt="the", schema=SCHEMAS["keys"])
    jsonschema.validate(json.loads(said), SCHEMAS["keys"])
    assert end.reason == "stop"


def test_closing_the_engine_ends_an_answer_that_is_being_made(phi: dict[str, Path]) -> None:
    engine = load(phi["model_gguf"])
    answer = engine.generate(GenerateRequest("the", schema=SCHEMAS["refs"]))
    never = engine.generate(GenerateRequest("the", schema=SCHEMAS["refs"]))
    assert isinstance(next(never), Token)
    engine.close()
    for events in (answer, never):
        *_, end = events
        assert isinstance(end, Finished)
        assert end.reason == "cancelled"


def test_the_same_seed_gives_the_same_answer(engine: LlamaGenerator) -> None:
    answers = [
        ask(engine, prompt="the", schema=SCHEMAS["string"], seed=seed, temperature=1.0)[0] for seed in (1, 1, 2, 3)
    ]
    assert answers[0] == answers[1]
    assert len(set(answers)) == 3


def test_log_probabilities_are_the_models_own(engine: LlamaGenerator) -> None:
    schema = {"const": "zzz"}
    said, end = ask(engine, prompt="the line reads", schema=schema)
    assert said == '"zzz"'
    assert end.mean_logprob < -3  # under the schema nothing else was possible; the model would not have said that


def test_a_model_that_writes_what_it_must_is_not_disturbed(phi: dict[str, Path]) -> None:
    engine = load(phi["model_gguf"])
    prompt = "line 1 read a 7 with score 0.9. What to do?\n"
    free, end_free = ask(engine, prompt=prompt)
    with Constraint(engine._tokens(), f'root ::= "{free}"\n') as constraint:
        assert _follow(engine, constraint, prompt) == free
    said, end = ask(engine, prompt=prompt, schema={"enum": ["yes", "no"]})
    assert said in ('"yes"', '"no"')
    assert end.mean_logprob < end_free.mean_logprob
    engine.close()


def _follow(engine: LlamaGenerator, constraint: Constraint, prompt: str) -> str:
    """Greedy, by hand: the model's first choice at every step must be what the grammar allows."""
    tokens = engine._prompt(GenerateRequest(prompt))
    text = b""
    engine.attach(None)
    while not constraint.complete:
        assert engine._decode(tokens, GenerateRequest(), engine._turn) == ""
        logits = engine._logits()
        token = constraint.choose(logits, 0.0, np.random.default_rng(0))
        assert token == draw(logits, 0.0, np.random.default_rng(0))
        constraint.accept(token)
        text += engine._piece(token)
        tokens = [token]
    return text.decode()


@pytest.mark.parametrize(
    "schema", [7, [], {"type": "string", "pattern": "a"}, {"$ref": "#/$defs/a"}, {"x" * 70_000: 1}]
)
def test_a_bad_schema_is_an_error_and_the_engine_goes_on(engine: LlamaGenerator, schema: Any) -> None:
    with pytest.raises(EngineError, match="schema"):
        engine.generate(GenerateRequest("the", schema=schema))
    assert ask(engine, prompt="the", schema={"type": "boolean"})[0] in ("true", "false")


def test_every_schema_that_is_converted_is_taken_by_llama_cpp(engine: LlamaGenerator, capfd: Any) -> None:
    large = [
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(100)}},
        {"enum": [f"value {n}" for n in range(256)]},
        {"type": "array", "items": {"type": "string", "maxLength": 1000}, "minItems": 1000, "maxItems": 1000},
        {
            "type": "array",
            "items": {"type": "integer", "minimum": -(10**15) + 2, "maximum": 10**15 - 2},
            "maxItems": 1000,
        },
        {"anyOf": [{"type": "string", "minLength": n, "maxLength": n} for n in range(200)]},
        {"type": "array", "items": {"type": "number", "exclusiveMinimum": -999_999, "exclusiveMaximum": 999_999}},
    ]
    for schema in (*SCHEMAS.values(), *large):
        with Constraint(engine._tokens(), grammar(schema)):
            pass
    assert capfd.readouterr() == ("", "")
    with pytest.raises(EngineError, match="refuses the grammar"):
        Constraint(engine._tokens(), 'root ::= root "a"\n')


def test_bytes_that_begin_a_text() -> None:
    """What may stand at the end of an answer can always become whole characters: no dead ends."""
    for lead in range(256):
        for second in (None, *range(256)):
            data = bytes([lead]) if second is None else bytes([lead, second])
            rest = unfinished(data)
            tails = [bytes([one, two, three])[:length] for length in (0, 1, 2, 3)
                     for one in (0x80, 0x90, 0xBF) for two in (0x80,) for three in (0x80,)]  # fmt: skip
            becomes = any(_is_text(data + tail) for tail in tails)
            assert (rest is not None) == (becomes and 0 not in data), data
    assert unfinished(b"") is None
    assert unfinished("aß🙂".encode()[:-1]) == "🙂".encode()[:-1]


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
