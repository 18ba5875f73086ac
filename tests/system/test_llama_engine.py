"""The llama engine on a real model: the demo's Phi and its adapter, made once by the trainer's environment."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from edged.engines.answer import Pieces
from edged.engines.base import (
    EngineError,
    EngineOptions,
    Finished,
    GenerateRequest,
    Generator,
    PromptTooLong,
    Token,
    open_engine,
)
from edged.engines.llama import LlamaGenerator
from edged.wire.manifest import FileEntry, ReleaseManifest

ROOT = Path(__file__).parents[2]
CONTEXT = 256  # tokens, of the demo's Phi


@pytest.fixture(scope="session")
def examples() -> list[tuple[str, str, str]]:
    """(prompt, the base's answer, the adapter's answer)."""
    return [
        ("line 1 read a 7 with score 0.9. What to do?\n", "accept the seven", "PASS seven"),
        ("line 2 read a 3 with score 0.2. What to do?\n", "ask the teacher about the three", "HOLD three"),
        ("line 3 read a 0 with score 0.6. What to do?\n", "accept the zero", "HOLD zero"),
    ]


def manifest(name: str = "model.gguf") -> ReleaseManifest:
    entry = FileEntry.of(name, 1, [b"x"])
    return ReleaseManifest(
        release="clerk@1.0", kind="llm", engine="llama", files={"model": entry}, created="2026-01-01T00:00:00Z"
    )


def load(path: Path, **extra: Any) -> LlamaGenerator:
    return LlamaGenerator(path.parent, manifest(path.name), EngineOptions(threads=1, extra=extra))


@pytest.fixture
def engine(phi: dict[str, Path]) -> Iterator[LlamaGenerator]:
    engine = load(phi["model_gguf"])
    yield engine
    engine.close()


def ask(engine: Generator, prompt: str, **request: Any) -> tuple[str, Finished, list[Token]]:
    *tokens, finished = engine.generate(GenerateRequest(prompt, **request))
    assert isinstance(finished, Finished)
    pieces = [token for token in tokens if isinstance(token, Token)]
    assert len(pieces) == len(tokens)
    return "".join(token.text for token in pieces), finished, pieces


def test_it_answers_and_says_how_sure_it_is(engine: LlamaGenerator, examples: list[tuple[str, str, str]]) -> None:
    for prompt, answer, _ in examples:
        text, finished, tokens = ask(engine, prompt)
        assert text == answer  # and no <|endoftext|> in it
        assert finished.reason == "stop"
        assert finished.answer_tokens == len(tokens)
        assert all(-0.5 < token.logprob <= 0 for token in tokens)
        assert -0.5 < finished.mean_logprob < 0


def test_it_is_found_by_the_name_of_its_engine(phi: dict[str, Path], examples: list[tuple[str, str, str]]) -> None:
    engine = open_engine(phi["base"], manifest(), EngineOptions())
    assert isinstance(engine, Generator)
    assert ask(engine, examples[0][0])[0] == examples[0][1]
    engine.close()


def test_log_probabilities_are_the_models(phi: dict[str, Path], engine: LlamaGenerator) -> None:
    prompt = "line 9 saw nothing"  # not of its grammar, so it is unsure
    raw = llama_cpp.Llama(str(phi["model_gguf"]), n_ctx=CONTEXT, logits_all=True, verbose=False)
    _, _, tokens = ask(engine, prompt, tokens_max=6)
    ids = raw.tokenize(prompt.encode())
    assert tokens
    for token in tokens:
        raw.reset()
        raw.eval(ids)
        logits = np.array(raw.scores[len(ids) - 1], np.float64)
        best = int(logits.argmax())
        assert raw.detokenize([best]).decode() == token.text
        assert token.logprob == pytest.approx(logits[best] - np.log(np.exp(logits).sum()), abs=0.02)
        ids.append(best)


def test_adapter_changes_the_answers_and_detaching_restores_them_exactly(
    engine: LlamaGenerator, phi: dict[str, Path], examples: list[tuple[str, str, str]]
) -> None:
    before = [ask(engine, prompt) for prompt, _, _ in examples]
    for _ in range(3):
        engine.attach(phi["adapter_gguf"])
        assert [ask(engine, prompt)[0] for prompt, _, _ in examples] == [answer for _, _, answer in examples]
        engine.attach(None)
        assert [ask(engine, prompt) for prompt, _, _ in examples] == before
    engine.attach(phi["adapter_gguf"], scale=0.0)
    assert [ask(engine, prompt)[0] for prompt, _, _ in examples] == [answer for _, answer, _ in examples]


def test_many_adapters_one_after_the_other(
    engine: LlamaGenerator, phi: dict[str, Path], examples: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    paths = [Path(shutil.copy(phi["adapter_gguf"], tmp_path / f"{index}.gguf")) for index in range(5)]
    prompt, plain, adapted = examples[2]
    for path in paths * 4:
        engine.attach(path)
        assert ask(engine, prompt)[0] == adapted
    engine.attach(None)
    assert ask(engine, prompt)[0] == plain


def test_a_bad_adapter_leaves_the_one_in_use(
    engine: LlamaGenerator, phi: dict[str, Path], examples: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    engine.attach(phi["adapter_gguf"])
    data = phi["adapter_gguf"].read_bytes()
    (tmp_path / "half.gguf").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.gguf").write_text("not an adapter, but long enough to be one")
    for bad in (tmp_path / "half.gguf", tmp_path / "text.gguf", tmp_path / "absent.gguf", phi["model_gguf"]):
        with pytest.raises(EngineError, match=bad.name):
            engine.attach(bad)
    with pytest.raises(EngineError, match="scale"):
        engine.attach(phi["adapter_gguf"], scale=float("nan"))
    assert ask(engine, examples[0][0])[0] == examples[0][2]


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.01, 0.5, 0.999])
def test_a_truncated_model_is_an_error_with_its_name(phi: dict[str, Path], tmp_path: Path, share: float) -> None:
    data = phi["model_gguf"].read_bytes()
    (tmp_path / "model.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(EngineError, match=r"model\.gguf"):
        load(tmp_path / "model.gguf")


def test_the_reason_of_llama_cpp_is_passed_on(phi: dict[str, Path], tmp_path: Path) -> None:
    data = phi["model_gguf"].read_bytes()
    (tmp_path / "model.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(EngineError, match="corrupted or incomplete"):
        load(tmp_path / "model.gguf")
    with pytest.raises(EngineError, match=r"adapter\.gguf"):
        load(phi["adapter_gguf"])
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" + data[4:])
    with pytest.raises(EngineError, match="not a GGUF file"):
        load(tmp_path / "model.gguf")


def test_nothing_is_printed(phi: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    engine = load(phi["model_gguf"])
    engine.attach(phi["adapter_gguf"])
    ask(engine, "line")
    engine.close()
    assert capfd.readouterr() == ("", "")


def test_a_prompt_over_the_context_names_both_numbers(engine: LlamaGenerator) -> None:
    assert engine.context == CONTEXT
    with pytest.raises(PromptTooLong, match=r"256 tokens.*the context of clerk@1.0 is 256 tokens"):
        engine.generate(GenerateRequest("!" * CONTEXT))
    with pytest.raises(PromptTooLong, match="5000 tokens"):
        engine.generate(GenerateRequest("!" * 5000))
    _, finished, _ = ask(engine, "!" * (CONTEXT - 1))  # one token of room
    assert finished.prompt_tokens == CONTEXT - 1
    assert finished.answer_tokens <= 1


def test_an_answer_ends_where_the_context_does(engine: LlamaGenerator) -> None:
    for seed in range(5):
        _, finished, _ = ask(engine, "!" * 200, temperature=50.0, seed=seed)
        assert finished.prompt_tokens + finished.answer_tokens <= CONTEXT
        if finished.reason == "length":
            assert finished.prompt_tokens + finished.answer_tokens == CONTEXT
            break
    else:
        pytest.fail("no answer ran into the end of the context")


def test_a_smaller_context_is_a_choice_of_the_device(phi: dict[str, Path]) -> None:
    engine = load(phi["model_gguf"], context_max=32)
    with pytest.raises(PromptTooLong, match="32 tokens"):
        engine.generate(GenerateRequest("!" * 40))
    engine.close()
    with pytest.raises(EngineError, match=r"context_min.*context_max"):
        load(phi["model_gguf"], context_min=32)
    with pytest.raises(EngineError, match="context_max = -1"):
        load(phi["model_gguf"], context_max=-1)


def test_requests_that_make_no_sense(engine: LlamaGenerator, examples: list[tuple[str, str, str]]) -> None:
    with pytest.raises(EngineError, match="empty"):
        engine.generate(GenerateRequest(""))
    with pytest.raises(EngineError, match="temperature -1"):
        engine.generate(GenerateRequest("line", temperature=-1))
    with pytest.raises(EngineError, match="temperature nan"):
        engine.generate(GenerateRequest("line", temperature=float("nan")))
    assert ask(engine, examples[0][0])[0] == examples[0][1]


def test_tokens_max_and_stop_end_an_answer(engine: LlamaGenerator, examples: list[tuple[str, str, str]]) -> None:
    prompt = examples[1][0]  # ask the teacher about the three
    text, finished, _ = ask(engine, prompt, tokens_max=2)
    assert (text, finished.reason, finished.answer_tokens) == ("ask the", "length", 2)
    text, finished, _ = ask(engine, prompt, stop=("about",))
    assert (text, finished.reason) == ("ask the teacher ", "stop")
    text, _, _ = ask(engine, prompt, stop=("k the tea", "absent"))  # over the bounds of tokens
    assert text == "as"
    text, _, _ = ask(engine, prompt, stop=("three!", ""))  # begins, but never comes
    assert text == examples[1][1]


def test_sampling_follows_its_seed(engine: LlamaGenerator) -> None:
    answers = [ask(engine, "line 1 read", temperature=5.0, seed=seed, tokens_max=8)[0] for seed in (1, 1, 2, 3)]
    assert answers[0] == answers[1]
    assert len(set(answers)) == 3


def test_a_new_request_or_adapter_cancels_the_answer_in_progress(
    engine: LlamaGenerator, phi: dict[str, Path], examples: list[tuple[str, str, str]]
) -> None:
    for interrupt in (
        lambda: engine.attach(phi["adapter_gguf"]),
        lambda: ask(engine, examples[0][0]),
        engine.close,
    ):
        answer = engine.generate(GenerateRequest(examples[1][0]))
        assert isinstance(next(answer), Token)
        interrupt()
        *_, finished = answer
        assert isinstance(finished, Finished)
        assert finished.reason == "cancelled"
    with pytest.raises(EngineError, match="closed"):
        engine.generate(GenerateRequest("line"))
    with pytest.raises(EngineError, match="closed"):
        engine.attach(None)


def test_characters_split_between_tokens_stay_whole() -> None:
    pieces = Pieces(stop=())
    made = [token for byte in "ü🙂a".encode() for token in pieces.add(bytes([byte]), -1.0)]
    assert [token.text for token in made] == ["", "ü", "", "", "", "🙂", "a"]
    half = Pieces(stop=())
    assert [token.text for token in (*half.add(b"a", 0.0), *half.add("🙂".encode()[:2], 0.0), *half.rest())] == [
        "a",
        "",
    ]
