"""Texts to tokens and back to bytes, in both ways that vocabularies spell bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from edged.engines.base import EngineError
from edged.engines.vocabulary import Vocabulary
from tests.support.vocabularies import CONTROL, TEXT, byte_level, sentence_piece


@pytest.fixture(scope="module", params=[byte_level, sentence_piece], ids=["byte level", "sentence piece"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    made: Tokenizer = request.param()
    made.add_special_tokens(CONTROL)
    made.enable_truncation(4)  # tokenizer.json may carry what a training run had set
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    made.save(str(path))
    return Vocabulary(path)


def text_of(vocabulary: Vocabulary, tokens: list[int]) -> str:
    return b"".join(vocabulary.piece(token) for token in tokens).decode()


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_a_text_comes_back_as_it_went_in(vocabulary: Vocabulary, text: str) -> None:
    text = text.replace("▁", "")  # is a space in one of them
    back = text_of(vocabulary, vocabulary.encode(text))
    assert back in (text, f" {text}")  # SentencePiece puts a space before a text


@pytest.mark.parametrize("text", [*TEXT, "line\n        teacher"])
def test_known_words_come_back_too(vocabulary: Vocabulary, text: str) -> None:
    tokens = vocabulary.encode(text)
    assert len(tokens) > 4
    assert text_of(vocabulary, tokens).lstrip() == text


def test_control_tokens_are_no_text(vocabulary: Vocabulary) -> None:
    tokens = vocabulary.encode("<|user|>the seven<|endoftext|>")
    assert text_of(vocabulary, tokens).strip() == "the seven"
    assert set(CONTROL) <= set(vocabulary.control)
    assert "    " not in vocabulary.control


def test_tokens_that_only_fill_the_model_up_are_no_text(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode(CONTROL[-1], whole=False) == [vocabulary.size - 1]
    assert vocabulary.piece(vocabulary.size) == b""


def test_a_lone_surrogate_is_no_reason_to_fail(vocabulary: Vocabulary) -> None:
    assert text_of(vocabulary, vocabulary.encode("a\ud83d")).strip() == "a?"


def test_what_the_model_wants_around_a_text_is_put_around_whole_texts_only(tmp_path: Path) -> None:
    made = byte_level()
    made.add_special_tokens(["<s>"])
    begin = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    made.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary(tmp_path / "tokenizer.json")
    assert vocabulary.encode("seven") == [begin, *vocabulary.encode("seven", whole=False)]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = json.loads(byte_level().to_str())
    texts = {
        "not a whole tokenizer": ["", "{", "[]", "{}", json.dumps(whole)[:-500], json.dumps({**whole, "model": 1})],
        "unknown; known: ByteLevel, ByteFallback": [json.dumps({**whole, "decoder": None})],
    }
    path = tmp_path / "tokenizer.json"
    with pytest.raises(EngineError, match=r"tokenizer\.json: cannot be read"):
        Vocabulary(path)
    for message, contents in texts.items():
        for content in contents:
            path.write_text(content)
            with pytest.raises(EngineError, match=rf"tokenizer\.json: .*{message}"):
                Vocabulary(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EngineError, match=r"tokenizer\.json"):
        Vocabulary(path)
