"""The mask that keeps an ONNX model's answers to a schema, on vocabularies that spell bytes in both ways."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.engines import token_mask
from edged.engines.answer import draw
from edged.engines.base import Unsuitable
from edged.engines.constrain import grammar
from edged.engines.token_mask import TokenMask, TokenTrie, to_lark
from edged.engines.vocabulary import Vocabulary
from tests.support.json_schemas import SCHEMAS, schemas
from tests.support.vocabularies import CONTROL, byte_level, sentence_piece

SPARE = 7  # logits that a model has beyond its vocabulary


class Words:
    """A vocabulary with two tokens that end an answer, and its trie."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.pieces = [vocabulary.piece(token) for token in range(vocabulary.size)]
        self.control = {vocabulary.encode(text, whole=False)[-1] for text in CONTROL}
        self.trie = TokenTrie(self.pieces, frozenset(self.control))

    def write(self, schema: dict[str, Any], seed: int, temperature: float, tokens_max: int = 600) -> bytes | None:
        """What a model of random logits writes under `schema`, None where that is not whole in so many tokens."""
        mask, chance, said = TokenMask(self.trie, grammar(schema)), np.random.default_rng(seed), b""
        for _ in range(tokens_max):
            logits = chance.normal(0, 3, len(self.pieces) + SPARE).astype(np.float32)
            token = draw(mask.masked(logits), temperature, chance)
            if token in self.control:
                return said
            assert self.pieces[token]
            mask.accept(token)
            said += self.pieces[token]
            if mask.complete:
                return said
        return None


@pytest.fixture(scope="module", params=[byte_level, sentence_piece], ids=["byte level", "sentence piece"])
def words(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Words:
    made = request.param()
    made.add_special_tokens(CONTROL)
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    made.save(str(path))
    return Words(Vocabulary(path))


@settings(max_examples=120, deadline=None)
@given(schemas(), st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 4.0]))
def test_any_schema_is_kept_to(words: Words, schema: dict[str, Any], seed: int, temperature: float) -> None:
    said = words.write(schema, seed, temperature)
    if said is not None:
        jsonschema.validate(json.loads(said.decode()), schema)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_kind_of_schema_is_written_whole(words: Words, name: str) -> None:
    answers = [words.write(SCHEMAS[name], seed, 1.0, tokens_max=3000) for seed in range(8)]
    whole = [said for said in answers if said is not None]
    assert whole
    for said in whole:
        jsonschema.validate(json.loads(said.decode()), SCHEMAS[name])


# What each allows, spelled in every way that the grammar knows; and what it does not.
@pytest.mark.parametrize(
    ("schema", "allowed", "refused"),
    [
        ({"enum": [1, 10, 123, "a", "ab"]}, ["1", "10", "123", '"a"', '"ab"'], ["12", '"b"', "1.0", " 1", "1 "]),
        ({"anyOf": [{"const": 123}, {"type": "integer"}]}, ["123", "124", "12", "-5", "0"], ["01", "-0x", "1.5"]),
        ({"anyOf": [{"const": "abc"}, {"type": "string", "maxLength": 4}]}, ['"abc"', '"abd"', '""', '"日本"'],
         ['"abcde"', '"a\nb"', '"a\x00"', '"\\u0041"']),
        ({"type": "string", "maxLength": 0}, ['""'], ['"a"']),
        ({"type": "number", "minimum": -1, "maximum": 1}, ["-1", "0.25", "1.000"], ["1.1", "-2", "00"]),
        ({"type": "object", "properties": {"a/b": {"type": "null"}}}, ["{}", '{"a/b": null}', '{"a/b":null}'],
         ['{"a/b":  null}', '{"c": null}', '{ "a/b": null}']),
    ],
)  # fmt: skip
def test_what_is_allowed_and_what_is_not(
    words: Words, schema: dict[str, Any], allowed: list[str], refused: list[str]
) -> None:
    for text in allowed:
        assert _taken(words, schema, text.encode()), text
    for text in refused:
        assert not _taken(words, schema, text.encode()), text


def test_bytes_that_are_no_text_are_never_allowed(words: Words) -> None:
    for broken in (b'"\xff"', b'"\xc0\xaf"', b'"\xed\xa0\x80"', b'"\xe6"'):
        assert not _taken(words, {"type": "string"}, broken)
    assert _taken(words, {"type": "string"}, '"🙂ß"'.encode())


def _taken(words: Words, schema: dict[str, Any], text: bytes) -> bool:
    """Whether `text` can be written under `schema`, a byte a token."""
    alone = {piece: token for token, piece in enumerate(words.pieces) if len(piece) == 1}
    mask, zeros = TokenMask(words.trie, grammar(schema)), np.zeros(len(words.pieces), np.float32)
    for byte in text:
        token = alone[bytes([byte])]
        if mask.complete or np.isneginf(mask.masked(zeros)[token]):
            return False
        mask.accept(token)
    return mask.may_end


def test_an_end_is_allowed_where_the_text_is_whole_and_nowhere_else(words: Words) -> None:
    mask, zeros = TokenMask(words.trie, grammar({"type": "integer"})), np.zeros(len(words.pieces) + SPARE, np.float32)
    ends = sorted(words.control)
    assert np.isneginf(mask.masked(zeros)[ends]).all()
    mask.accept(words.pieces.index(b"7"))
    allowed = np.flatnonzero(np.isfinite(mask.masked(zeros)))
    assert set(ends) <= set(allowed)
    assert not mask.complete  # 7, or 71
    assert all(words.pieces[token].isdigit() for token in set(allowed) - set(ends))


def test_tokens_that_are_spelled_alike_are_all_allowed(words: Words) -> None:
    spaces = [token for token, piece in enumerate(words.pieces) if piece == b" "]
    mask = TokenMask(words.trie, 'root ::= " " "a"\n')
    assert len(spaces) == (
        2 if b"the" in words.pieces and len(words.pieces) < 300 else 1
    )  # SentencePiece: \u2581, <0x20>
    assert np.isfinite(mask.masked(np.zeros(len(words.pieces), np.float32))[spaces]).all()


def test_a_vocabulary_without_the_letters_is_told() -> None:
    trie = TokenTrie([b"a", b"", b"b"], frozenset({1}))
    with pytest.raises(Unsuitable, match="no token of the model goes on"):
        TokenMask(trie, grammar({"type": "boolean"})).masked(np.zeros(3, np.float32))


def test_a_grammar_that_is_refused_is_told() -> None:
    trie = TokenTrie([b"a", b""], frozenset({1}))
    with pytest.raises(Unsuitable, match="the grammar of the schema is refused"):
        TokenMask(trie, 'root ::= r1 "\n')


def test_large_schemas_are_taken(words: Words) -> None:
    for schema in (
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(100)}},
        {"enum": [f"value {n}" for n in range(256)]},
        {"type": "array", "items": {"type": "string", "maxLength": 100}, "minItems": 1000, "maxItems": 1000},
        {"anyOf": [{"type": "string", "minLength": n, "maxLength": n} for n in range(200)]},
        {"type": "array", "items": {"type": "number", "exclusiveMinimum": -999_999, "exclusiveMaximum": 999_999}},
    ):
        said = words.write(schema, 1, 1.0, tokens_max=200)
        assert said is None or jsonschema.validate(json.loads(said), schema) is None


def test_terminals_are_spelled_as_lark_wants_them() -> None:
    lark = to_lark('root ::= r1 t2{0,3} "t9 [a/b]"\nr1 ::= [^"/\\\\] | "\\"[t1]"\nt2 ::= [0-9]\n')
    assert lark.split("\n", 1)[1] == 'start: r1 T2{0,3} "t9 [a/b]"\nr1: /[^"\\/\\\\]/ | "\\"[t1]"\nT2: /[0-9]/'


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(Unsuitable, match=r"pip install edged\[agents\]"):
        TokenTrie([b"a"], frozenset())


def test_it_is_imported_only_when_it_is_needed() -> None:
    code = "import sys, edged.engines.onnx_phi; assert 'llguidance' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(token_mask.__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
