"""How probable a language model finds an answer: of the files that ship, by the engine that devices run, and of the
checkpoint that was trained, by torch. Heavy libraries are imported when they are used."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edged.engines.base import ChatMessage, EngineError, EngineOptions, GenerateRequest
from edged.wire.manifest import ReleaseManifest


@dataclass(frozen=True, slots=True)
class Said:
    """What was asked, and an answer to it. `messages` (role, content): the same as a conversation, for a model with a chat
    template."""

    prompt: str
    answer: str
    messages: tuple[tuple[str, str], ...] = ()


Loss = tuple[float, int]  # nats of the whole answer with its end of text, and how many tokens that is


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores answers with one model: `one` gives an answer's loss; `fits`: whether it can."""

    one: Callable[[Said], Loss]
    fits: Callable[[Said], bool]

    def score(self, said: Sequence[Said]) -> list[Loss]:
        """The loss of each answer; raises EngineError."""
        return [self.one(each) for each in said]


@contextmanager
def shipped(folder: Path, manifest: ReleaseManifest, adapter: Path | None) -> Iterator[Scorer]:
    """Scores answers with a release of kind llm for llama.cpp, `adapter` (GGUF) attached; raises EngineError."""
    from edged.engines.llama import LlamaGenerator

    engine = LlamaGenerator(folder, manifest, EngineOptions(threads=os.cpu_count() or 1))
    try:
        engine.attach(adapter)
        yield Scorer(lambda said: _llama_loss(engine, said), lambda said: llama_fits(engine, said))
    finally:
        engine.close()


def _llama_tokens(engine: Any, said: Said) -> tuple[list[int], list[int]]:
    """What was asked, and the answer with its end, as the engine cuts them; raises EngineError."""
    import llama_cpp

    asked = engine._prompt(request_of(engine, said))
    wanted = engine._tokenize(_completion(engine, said), whole=False)
    ended = (n for n, token in enumerate(wanted) if llama_cpp.llama_vocab_is_eog(engine._vocab, token))
    place = next(ended, None)
    if place is not None:
        return asked, wanted[: place + 1]
    return asked, [*wanted, llama_cpp.llama_vocab_eos(engine._vocab)]


def _completion(engine: Any, said: Said) -> str:
    """The answer with the mark that ends a turn, as the model's chat template writes it. What llama.cpp takes for that mark
    is any one of those that it knows by name: of Phi-3, which has two, not always the one that its answers end with."""
    if not _chats(engine, said):
        return said.answer
    template, turns = engine._chat, [ChatMessage(role, content) for role, content in said.messages]
    asked = "".join(template.render(turns))
    whole = "".join(template.render([*turns, ChatMessage("assistant", said.answer)], asks=False))
    # As in training: some templates write an answer differently from where they ask for one.
    return whole[len(asked) :] if whole.startswith(asked) and len(whole) > len(asked) else said.answer


def llama_fits(engine: Any, said: Said) -> bool:
    """Whether a question and its answer fit the context of the engine, a `LlamaGenerator`."""
    asked, wanted = _llama_tokens(engine, said)
    return len(asked) + len(wanted) <= int(engine.context)


def _llama_loss(engine: Any, said: Said) -> Loss:
    """The loss of an answer as the engine cuts and computes it; raises EngineError when it does not fit the context."""
    import llama_cpp
    import numpy as np

    from edged.engines.answer import log_probability
    from edged.engines.llama import BATCH_TOKENS

    asked, wanted = _llama_tokens(engine, said)
    tokens = [*asked, *wanted]
    if len(tokens) > engine.context:
        raise EngineError(
            f"an example of {len(tokens)} tokens does not fit the context of {engine.context}: leave it out"
        )
    engine._forget()
    losses = []
    for start in range(0, len(tokens) - 1, BATCH_TOKENS):
        part = tokens[start : min(start + BATCH_TOKENS, len(tokens) - 1)]
        batch = llama_cpp.llama_batch_init(len(part), 0, 1)
        try:
            batch.n_tokens = len(part)
            for place, token in enumerate(part):
                batch.token[place], batch.pos[place] = token, start + place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = start + place >= len(asked) - 1  # it foretells a token of the answer
            code = llama_cpp.llama_decode(engine._context, batch)
            if code != 0:
                raise EngineError(f"llama.cpp failed with code {code} while scoring an answer")
            for place in range(len(part)):
                if batch.logits[place]:
                    pointer = llama_cpp.llama_get_logits_ith(engine._context, place)
                    logits = np.ctypeslib.as_array(pointer, shape=(engine._vocab_size,))
                    losses.append(-log_probability(logits, tokens[start + place + 1]))
        finally:
            llama_cpp.llama_batch_free(batch)
    engine._forget()
    return math.fsum(losses), len(losses)


def _chats(engine: Any, said: Said) -> bool:
    import llama_cpp

    return bool(said.messages) and llama_cpp.llama_model_chat_template(engine._model, None) is not None


def request_of(engine: Any, said: Said, tokens_max: int = 0) -> GenerateRequest:
    """What was asked, as a device asks llama.cpp: a conversation by the model's own chat template, where it has one."""
    if _chats(engine, said):
        turns = tuple(ChatMessage(role, content) for role, content in said.messages)
        return GenerateRequest(messages=turns, tokens_max=tokens_max)
    return GenerateRequest(said.prompt, tokens_max=tokens_max)


@contextmanager
def checkpoint(folder: Path, adapter: Path | None) -> Iterator[Scorer]:
    """Scores answers with the Hugging Face checkpoint in `folder`, the PEFT adapter in `adapter` on it, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    model = model.to(device).eval()

    def loss(said: Said) -> Loss:
        asked, wanted = _tokens(tokenizer, said, ends)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*asked, *wanted]], device=device)).logits[0, len(asked) - 1 : -1]
        chosen = torch.log_softmax(logits.double(), -1)[range(len(wanted)), wanted]
        return float(-chosen.sum()), len(wanted)

    ends = {tokenizer.eos_token_id}
    yield Scorer(loss, lambda _said: True)


def _tokens(tokenizer: Any, said: Said, ends: set[int]) -> tuple[list[int], list[int]]:
    """What was asked and the answer with its end, apart, because that is how a device meets them."""
    answer = said.answer
    if said.messages and tokenizer.chat_template:
        turns = [{"role": role, "content": content} for role, content in said.messages]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
        prompt = list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True))
        answer = whole[len(asked) :] if whole.startswith(asked) else answer
    else:
        prompt = list(tokenizer(said.prompt)["input_ids"])
    wanted = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    specials = ends | (set(tokenizer.all_special_ids) if answer != said.answer else set())
    place = next((place for place, token in enumerate(wanted) if token in specials), None)
    return prompt, wanted[: place + 1] if place is not None else [*wanted, tokenizer.eos_token_id]
