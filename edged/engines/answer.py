"""From a language model's numbers to its answer: which token comes next, and how the bytes of tokens become text."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edged.engines.base import Token


def draw(logits: NDArray[np.float32], temperature: float, chance: np.random.Generator) -> int:
    """One token of softmax(`logits` / `temperature`); the likeliest at temperature 0.

    `logits` (vocabulary,); -inf: never this one. At least one must be finite, and none NaN.
    """
    if temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    sums = np.cumsum(weights)
    token = int(np.searchsorted(sums, chance.random() * sums[-1], side="right"))
    # Rounding may reach the very end of the sum; what is there may be a token of no weight.
    return token if token < len(sums) else int(np.flatnonzero(weights)[-1])


def log_probability(logits: NDArray[np.float32], token: int) -> float:
    """Natural logarithm of the probability of `token` under softmax(`logits`)."""
    shifted = logits - logits.max()
    return float(shifted[token] - np.log(np.exp(shifted).sum(dtype=np.float64)))


@dataclass(slots=True)
class Pieces:
    """Turns bytes of tokens into text: characters split between tokens, stop sequences held back until ruled out."""

    stop: tuple[str, ...]
    stopped: bool = False
    _held: list[Token] = field(default_factory=list)
    _utf8: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def __post_init__(self) -> None:
        self.stop = tuple(text for text in self.stop if text)

    def add(self, piece: bytes, logprob: float) -> list[Token]:
        """Tokens whose text is now certain to be part of the answer."""
        self._held.append(Token(self._utf8.decode(piece), logprob))
        text = "".join(token.text for token in self._held)
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._cut(min(ends))
            return self.rest()
        if any(text.endswith(stop[:length]) for stop in self.stop for length in range(1, len(stop))):
            return []
        return self.rest()

    def rest(self) -> list[Token]:
        """What is still held back. Bytes that never became a character are left out."""
        tokens, self._held = self._held, []
        return tokens

    def _cut(self, length: int) -> None:
        kept: list[Token] = []
        for token in self._held:
            if length <= 0:
                break
            kept.append(Token(token.text[:length], token.logprob))
            length -= len(token.text)
        self._held = kept
