"""Engines in a process of their own answer as those in the daemon do, and requests to them can be given up."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from edged.engines.base import (
    ChatMessage,
    EngineError,
    EngineOptions,
    Finished,
    GenerateRequest,
    Generator,
    PromptTooLong,
    open_engine,
)
from edged.engines.host import Patience, ProcessGenerator
from edged.releases import read_manifest, reference
from edged.slot import load
from tests.support.device import until
from tests.support.hosted import (
    ADAPTED,
    LONG,
    PLAIN,
    PROMPT,
    Start,
    ask,
    clerk,
    gone,
    halting,
    manifest,
    serving,
    stop,
)

# It answers as an engine in the daemon does.


def test_the_same_answers_token_by_token(start: Start, phi: dict[str, Path]) -> None:
    requests = [
        GenerateRequest(PROMPT),
        GenerateRequest(PROMPT, tokens_max=2),
        GenerateRequest(PROMPT, stop=("the", "absent")),
        GenerateRequest("größer \ud800 als 🙂", temperature=5.0, seed=2**40, tokens_max=40),
        GenerateRequest(messages=(ChatMessage("user", "What to do?"), ChatMessage("assistant", "ask")), tokens_max=4),
        GenerateRequest(PROMPT, schema={"enum": ["PASS", "HOLD"]}),
    ]
    here = open_engine(phi["base"], manifest(phi["model_gguf"]), EngineOptions())
    assert isinstance(here, Generator)
    there = start()
    assert isinstance(there, Generator)
    assert there.context == here.context == 256

    def outcome(engine: Generator, request: GenerateRequest) -> Any:
        try:
            return list(engine.generate(request))
        except EngineError as error:
            return type(error), str(error)

    for request in requests:
        assert outcome(there, request) == outcome(here, request)
    for engine in (here, there):
        engine.attach(phi["adapter_gguf"])
        assert ask(engine) == ADAPTED
        engine.attach(phi["adapter_gguf"], 0.0)
        assert ask(engine) == PLAIN
    here.close()


def test_errors_keep_their_class_and_words_and_cost_nothing(start: Start, phi: dict[str, Path], tmp_path: Path) -> None:
    engine = start()
    pid = engine.pid
    with pytest.raises(PromptTooLong, match=r"256 tokens.*the context of clerk@1.0 is 256 tokens"):
        engine.generate(GenerateRequest("!" * 256))
    with pytest.raises(PromptTooLong, match=r"clerk@1.0: the request is too long: 1677.... bytes are more than"):
        engine.generate(GenerateRequest("!" * (16 << 20)))
    with pytest.raises(EngineError, match="temperature -1"):
        engine.generate(GenerateRequest("line", temperature=-1))
    engine.attach(phi["adapter_gguf"])
    with pytest.raises(EngineError, match=r"absent\.gguf"):
        engine.attach(tmp_path / "absent.gguf")
    with pytest.raises(EngineError, match="scale nan"):
        engine.attach(phi["adapter_gguf"], float("nan"))
    assert ask(engine) == ADAPTED, "the adapter before a bad one stays"
    assert engine.pid == pid, "it is the same process all the time"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.unlink(), r"model\.gguf: cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:20000]), r"model\.gguf: llama.cpp cannot load it"),
    ],
)
def test_what_does_not_load_says_why_and_leaves_nothing(
    start: Start, phi: dict[str, Path], tmp_path: Path, change: Callable[[Path], Any], reason: str
) -> None:
    path = Path(shutil.copy(phi["model_gguf"], tmp_path / "model.gguf"))
    change(path)
    with pytest.raises(EngineError, match=reason):
        start(path)
    with pytest.raises(EngineError, match="unknown to llama"):
        start(extra={"context_min": 3})
    assert not psutil.Process().children()


# Requests that are given up.


def test_a_prompt_can_be_halted(start: Start, slow: Path) -> None:
    engine = start(slow)
    *tokens, finished = engine.generate(GenerateRequest(LONG, halt=halting(4, "deadline")))
    assert not tokens, "it was halted before its first token"
    assert isinstance(finished, Finished)
    assert finished.reason == "deadline"
    pid = engine.pid
    assert ask(engine, "the line", tokens_max=3)
    assert engine.pid == pid, "nothing had to be killed"


def test_an_answer_can_be_halted_or_dropped(start: Start, slow: Path) -> None:
    engine = start(slow)
    pid = engine.pid
    *tokens, finished = engine.generate(GenerateRequest("the line", halt=halting(10)))
    assert isinstance(finished, Finished)
    assert finished.reason == "cancelled"
    assert 0 < len(tokens) < 2000
    for drop in (lambda answer: answer.close(), lambda answer: None):
        answer: Any = engine.generate(GenerateRequest("the line"))
        next(answer)
        drop(answer)
        assert ask(engine, "the line", tokens_max=3), "it does not wait for thousands of tokens that nobody reads"
    *_, finished = answer
    assert finished.reason == "cancelled", "the one that was left lying ends too"
    assert engine.pid == pid


def test_who_waits_for_the_process_can_be_halted(start: Start) -> None:
    engine = start(patience=Patience(backoff_s=600.0, backoff_s_max=600.0, restart_s_max=6000.0))
    os.kill(serving(engine), signal.SIGKILL)
    until("its end is noticed", lambda: engine.pid is None)
    assert list(engine.generate(GenerateRequest(PROMPT, halt=halting(3, "deadline")))) == [
        Finished("deadline", prompt_tokens=0, answer_tokens=0, mean_logprob=0.0)
    ]


def test_nobody_waits_for_a_process_that_comes_too_late(start: Start) -> None:
    engine = start(patience=Patience(backoff_s=600.0, backoff_s_max=600.0, restart_s_max=300.0))
    os.kill(serving(engine), signal.SIGKILL)
    until("its end is noticed", lambda: engine.pid is None)
    with pytest.raises(EngineError, match=r"SIGKILL .*; the engine is started again in [56]\d\d\.\d s"):
        ask(engine)


def test_an_engine_that_does_not_heed_is_killed(start: Start) -> None:
    patience = Patience(ping_s=0.05, answer_s_max=600.0, backoff_s=0.05, halt_s_max=0.2)
    engine = start(patience=patience)
    pid = serving(engine)
    stop(pid)
    with pytest.raises(
        EngineError, match=r"did not end within 0.2 s of a request that was halted \(deadline\), and was k"
    ):
        engine.generate(GenerateRequest(PROMPT, halt=halting(2, "deadline")))
    assert ask(engine) == PLAIN
    assert gone(pid)


# In the daemon.


@pytest.fixture
def base(tmp_path: Path, phi: dict[str, Path]) -> Path:
    return clerk(tmp_path / "base", phi["model_gguf"])


def test_where_an_engine_lives_is_the_slots_choice(base: Path, toy: Path) -> None:
    def loaded_in_a_process(folder: Path, isolation: str | None) -> bool:
        loaded = load(reference(folder), folder, read_manifest(folder), EngineOptions(), isolation)
        loaded.engine.close()
        return isinstance(loaded.engine, ProcessGenerator)

    assert loaded_in_a_process(base, None)
    assert loaded_in_a_process(base, "process")
    assert not loaded_in_a_process(base, "daemon")
    assert not loaded_in_a_process(toy, None)
    assert not loaded_in_a_process(toy, "daemon")
    with pytest.raises(EngineError, match=r"toy@1.0 is of kind detect, .*take isolation = \"process\" out"):
        loaded_in_a_process(toy, "process")


def test_a_wrong_golden_answer_leaves_no_process(base: Path) -> None:
    golden = base / read_manifest(base).files["golden_prompts"].path
    golden.write_text(json.dumps([{"prompt": PROMPT, "answer": "something else"}]))
    with pytest.raises(EngineError, match="expected 'something else'"):
        load(reference(base), base, read_manifest(base), EngineOptions())
    assert not psutil.Process().children()
