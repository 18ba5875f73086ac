"""What the ONNX engine and transformers answer, for the tests to compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edged.engines.base import (
    EngineOptions,
    Finished,
    GenerateRequest,
    Generator,
    Token,
    open_engine,
)
from edged.engines.onnx_phi import OnnxPhiGenerator
from trainer.releases import build_manifest, read_manifest

CONTEXT = 256  # tokens
LONG = {"max_position_embeddings": CONTEXT, "original_max_position_embeddings": CONTEXT}
TEXT = "the line reads a seven, größer als ½? ask the teacher 日本語 don't! 12345 + 678 naïve \n\n x=1\t; "


@contextmanager
def one_thread() -> Iterator[None]:
    """So small a network gains nothing from a second thread, and several of them spin while they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load(folder: Path, roles: dict[str, str] | None = None, **extra: Any) -> OnnxPhiGenerator:
    """The engine on the release in `folder`, or on files that are no whole release."""
    if roles is None:
        manifest = read_manifest(folder)
    else:
        manifest = build_manifest(folder, "tiny@1.0", kind="llm", engine="onnx_phi", roles=roles)
    engine = open_engine(folder, manifest, EngineOptions(extra=extra))
    assert isinstance(engine, Generator)
    assert isinstance(engine, OnnxPhiGenerator)
    return engine


def ask(engine: OnnxPhiGenerator, prompt: str = "", **request: Any) -> tuple[str, Finished, list[Token]]:
    *tokens, finished = engine.generate(GenerateRequest(prompt, **request))
    assert isinstance(finished, Finished)
    pieces = [token for token in tokens if isinstance(token, Token)]
    assert len(pieces) == len(tokens)
    return "".join(token.text for token in pieces), finished, pieces


def prompt_of(words: Any, tokens: int) -> str:
    """A text of so many tokens."""
    text = ""
    for letter in TEXT * tokens:
        if len(words(text + letter)["input_ids"]) > tokens:
            break
        text += letter
    text += "!" * (tokens - len(words(text)["input_ids"]))  # the letter that was too much has several tokens
    assert len(words(text)["input_ids"]) == tokens
    return text


@torch.no_grad()
def expected(model: Any, words: Any, prompt: list[int], tokens_max: int) -> tuple[str, list[float], bool]:
    """What transformers answers greedily: text, log-probabilities of all tokens, whether it ended by itself."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens_max, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    answer = out.sequences[0, ids.shape[1] :].tolist()
    logprobs = [
        float(torch.log_softmax(logits[0].double(), -1)[token])
        for logits, token in zip(out.logits, answer, strict=True)
    ]
    return words.decode(answer, skip_special_tokens=True), logprobs, answer[-1] == words.eos_token_id


def assert_same(engine: OnnxPhiGenerator, model: Any, words: Any, prompt: str, tokens_max: int) -> None:
    ids = words(prompt)["input_ids"]
    text, logprobs, ended = expected(model, words, ids, tokens_max)
    answer, finished, tokens = ask(engine, prompt, tokens_max=tokens_max)
    assert finished.prompt_tokens == len(ids)
    assert answer.rstrip("\ufffd") == text.rstrip("\ufffd")  # transformers shows bytes that never became a character
    assert finished.reason == ("stop" if ended else "length")
    assert [token.logprob for token in tokens] == pytest.approx(logprobs[: len(tokens)], abs=1e-3)
    assert finished.answer_tokens == len(logprobs) - ended
    assert finished.mean_logprob == pytest.approx(np.mean(logprobs), abs=1e-3)
