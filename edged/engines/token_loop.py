"""From a model that computes logits to a `Generator`: prompts to tokens, tokens to an answer, one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edged.engines.answer import Pieces, draw, log_probability
from edged.engines.base import EngineError, Finished, GenerateRequest, NoTemplate, PromptTooLong, Token, Unsuitable
from edged.engines.chat import ChatTemplate, Markers
from edged.engines.constrain import grammar
from edged.engines.token_mask import TokenMask, TokenTrie
from edged.engines.vocabulary import Vocabulary

STEP_TOKENS_MAX = 64  # in one run: more are hardly faster a token, and nothing can be halted while it runs


class Causal(Protocol):
    """A causal language model and the cache of the tokens that it was given last."""

    def rewind(self, tokens: Sequence[int]) -> int:
        """Keep of the cache what `tokens` begin with, at most all but the last of them; returns how many tokens."""
        ...

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits (vocabulary,) after `tokens` (at most STEP_TOKENS_MAX), which follow those of the cache."""
        ...

    def close(self) -> None: ...


class TokenGenerator:
    """A language model as a `Generator`. One worker thread at a time."""

    def __init__(
        self, name: str, model: Causal, vocabulary: Vocabulary, template: ChatTemplate | None, context: int,
        ends: frozenset[int],
    ) -> None:  # fmt: skip
        """`name` is for errors; `ends`: tokens that end an answer."""
        self._name, self._vocabulary, self._template, self._ends = name, vocabulary, template, ends
        self._model: Causal | None = model
        self._trie: TokenTrie | None = None  # made for the first answer under a schema
        self._turn = 0
        self.context = context

    def generate(self, request: GenerateRequest) -> Iterator[Token | Finished]:
        """Yield the answer's tokens, then one Finished.

        Greedy when `temperature` is 0, else sampled from the whole tempered distribution with `seed`. Log-probabilities
        are the model's own, before temperature and before a schema rules tokens out; their mean covers the end-of-text
        token too, so that an empty answer has a probability as well. Control tokens are never part of the text. Another
        `generate`, `attach` or `close` ends an answer that is still being made with the reason `cancelled`.
        Raises PromptTooLong (prompt and at least one token must fit `context`) or EngineError at the call.
        """
        if self._model is None:
            raise EngineError(f"{self._name}: the engine is closed")
        if not request.temperature >= 0:
            raise Unsuitable(f"temperature {request.temperature}: use 0 (greedy) or more")
        prompt = self._tokens(request)
        if not prompt:
            raise Unsuitable("the prompt is empty; send at least one character")
        if len(prompt) >= self.context:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, the context of {self._name} is {self.context} tokens for "
                f"prompt and answer together; send at most {self.context - 1}"
            )
        mask = None if request.schema is None else TokenMask(self._known(), grammar(request.schema))
        self._turn += 1
        return self._answer(self._model, request, prompt, mask, self._turn)

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None:
        """As `Generator`."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the model and its cache; an answer in progress ends as `cancelled`. May be repeated."""
        self._turn += 1
        if self._model is not None:
            self._model.close()
            self._model = None

    def _tokens(self, request: GenerateRequest) -> list[int]:
        if not request.messages:
            if request.literal:
                return Markers(self._vocabulary.control).literal(request.prompt, self._vocabulary.encode)
            return self._vocabulary.encode(request.prompt)
        if self._template is None:
            raise NoTemplate(f"{self._name}: the model has no chat template; send a prompt instead of messages")
        parts = self._template.render(request.messages)
        return [token for part in parts for token in self._vocabulary.encode(part, whole=False)]

    def _known(self) -> TokenTrie:
        if self._trie is None:
            vocabulary = self._vocabulary
            self._trie = TokenTrie([vocabulary.piece(token) for token in range(vocabulary.size)], self._ends)
        return self._trie

    def _answer(
        self, model: Causal, request: GenerateRequest, prompt: list[int], mask: TokenMask | None, turn: int
    ) -> Iterator[Token | Finished]:
        """The answer to `prompt`, within `mask` if there is one, as long as `turn` is the engine's."""
        room = self.context - len(prompt)
        limit = min(request.tokens_max, room) if request.tokens_max > 0 else room
        chance = np.random.default_rng(request.seed)
        pieces = Pieces(request.stop)
        logprobs: list[float] = []
        made = 0
        reused = model.rewind(prompt) if turn == self._turn else 0
        steps = deque(prompt[at : at + STEP_TOKENS_MAX] for at in range(reused, len(prompt), STEP_TOKENS_MAX))
        while True:
            # Somebody else's turn comes first: the cache is theirs.
            reason = "cancelled" if turn != self._turn else request.halt()
            if reason:
                break
            logits = model.step(steps.popleft())
            if steps:
                continue
            token = draw(mask.masked(logits) if mask else logits, request.temperature, chance)
            logprobs.append(log_probability(logits, token))
            if token in self._ends:
                reason = "stop"
                break
            made += 1
            if mask:
                mask.accept(token)
            said = pieces.add(self._vocabulary.piece(token), logprobs[-1])
            reason = _ended(pieces, mask, made == limit)
            yield from said
            if reason:
                break
            steps.append([token])
        yield from pieces.rest()
        mean = float(np.mean(logprobs)) if logprobs else 0.0
        yield Finished(reason, len(prompt), made, mean, reused_tokens=reused)


def _ended(pieces: Pieces, mask: TokenMask | None, full: bool) -> str:
    """Why an answer ends behind its newest token, "": it goes on. `full`: there is no room for another token."""
    if mask and (pieces.stopped or (full and not mask.may_end)):
        return "truncated"
    if pieces.stopped or (mask and mask.complete):
        return "stop"
    return "length" if full else ""
