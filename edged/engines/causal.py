"""A causal language model on ONNX Runtime: logits for tokens, given the keys and values of all tokens before them.

It takes what `optimum` exports with past: inputs `input_ids`, `attention_mask`, `position_ids`, `past_key_values.N.key`
and `.value`, outputs `logits`, `present.N.key` and `.value`; and its merged form, whose input `use_cache_branch` says
whether there is a past. Number, heads, size and type of the keys and values are read from the file's inputs.

The cache goes in and out as NumPy arrays, which ONNX Runtime neither copies on its way in nor out on a CPU: binding its
own values instead took 0.96 to 1.01 of the processor time (82 M parameters, 100 and 1000 tokens of past).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edged.engines.base import EngineError
from edged.engines.ort import Session, Value
from edged.engines.token_loop import STEP_TOKENS_MAX

_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
_REQUIRED = {"input_ids", "attention_mask"}
_OPTIONAL = {"position_ids", "use_cache_branch"}


@dataclass(frozen=True, slots=True)
class _Graph:
    """How a model's inputs and outputs are called, and where the cache is among them."""

    types: dict[str, Any]  # of every input by name
    empty: dict[str, NDArray[Any]]  # the cache before the first token, (1, heads, 0, size) each, by the input's name
    present: tuple[int, ...]  # which output is the next cache for each input of `empty`
    logits: int  # which output

    @classmethod
    def of(cls, inputs: Sequence[Value], outputs: Sequence[Value]) -> _Graph:
        """Raises ValueError naming what does not fit."""
        past = [value for value in inputs if _PAST.fullmatch(value.name)]
        others = {value.name for value in inputs} - {value.name for value in past}
        if not past or not others >= _REQUIRED or others - _REQUIRED - _OPTIONAL:
            raise ValueError(
                f"inputs {[value.name for value in inputs]} are not those of a language model with past: expected "
                f"{', '.join(sorted(_REQUIRED))} and past_key_values.N.key and .value; export it with its cache"
            )
        names = [value.name for value in outputs]
        wanted = [value.name.replace("past_key_values", "present") for value in past]
        if lost := [name for name in ("logits", *wanted) if name not in names]:
            raise ValueError(f"outputs {names} lack {', '.join(lost)}; export it with its cache")
        if unknown := [value.name for value in inputs if value.type not in _TYPES]:
            raise ValueError(f"inputs {', '.join(unknown)} are not of the types {', '.join(_TYPES)}")
        return cls(
            types={value.name: _TYPES[value.type] for value in inputs},
            empty={value.name: _empty(value) for value in past},
            present=tuple(names.index(name) for name in wanted),
            logits=names.index("logits"),
        )


def _empty(past: Value) -> NDArray[Any]:
    if len(past.shape) != 4 or not isinstance(past.shape[1], int) or not isinstance(past.shape[3], int):
        raise ValueError(
            f"input {past.name} is {past}, expected [batch, heads, tokens, size] with fixed heads and size"
        )
    return np.zeros((1, past.shape[1], 0, past.shape[3]), _TYPES[past.type])


class CausalModel:
    """A loaded model and the cache of the tokens that it was given last. Used by one thread at a time.

    What a token computes can depend on how many are given at once (dynamic quantisation shares a scale among them). So
    prompts go in steps of STEP_TOKENS_MAX, and only whole steps are used again: an answer never depends on what was
    asked before.
    """

    def __init__(self, session: Session, name: str) -> None:
        """`name` of the release is for errors. Raises EngineError for a model that is no language model."""
        self._session = session
        self._name = name
        try:
            self._graph = _Graph.of(session.inputs, session.outputs)
        except ValueError as error:
            raise EngineError(f"release {name}: {error}") from None
        self._tokens: list[int] = []  # what the cache holds
        self._whole = 0  # how many of them, from the first on, were computed in whole steps
        self._cache = list(self._graph.empty.values())

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the logits are of; None where the file does not say."""
        size = self._session.outputs[self._graph.logits].shape[-1]
        return size if isinstance(size, int) else None

    def rewind(self, tokens: Sequence[int]) -> int:
        """Keep of the cache what `tokens` begin with, at most all but the last of them; returns how many tokens."""
        kept = _common(self._tokens[: self._whole], tokens[:-1]) // STEP_TOKENS_MAX * STEP_TOKENS_MAX
        self._tokens = self._tokens[:kept]
        self._whole = kept
        # Copies, because a view would keep the whole array alive.
        self._cache = [part[:, :, :kept].copy() for part in self._cache]
        return kept

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits (vocabulary,) after `tokens` (at most STEP_TOKENS_MAX), which follow those of the cache.

        Raises EngineError, also for logits that are not finite; the cache is then as it was.
        """
        outputs = self._session.feed(self._feeds(tokens))
        logits = np.asarray(outputs[self._graph.logits][0, -1], np.float32)
        if not np.isfinite(logits).all():
            raise EngineError(
                f"release {self._name}: the model computes numbers that are not finite; its file is damaged"
            )
        if self._whole == len(self._tokens) and len(tokens) == STEP_TOKENS_MAX:
            self._whole += len(tokens)
        self._tokens = [*self._tokens, *tokens]
        self._cache = [outputs[index] for index in self._graph.present]
        return logits

    def close(self) -> None:
        """Free the model and the cache."""
        self._tokens, self._whole = [], 0
        self._cache = list(self._graph.empty.values())
        self._session.close()

    def _feeds(self, tokens: Sequence[int]) -> dict[str, NDArray[Any]]:
        past, total = len(self._tokens), len(self._tokens) + len(tokens)
        known: dict[str, Any] = {
            "input_ids": [tokens],
            "attention_mask": np.ones((1, total)),
            "position_ids": [range(past, total)],
            "use_cache_branch": [past > 0],
        }
        types = self._graph.types
        feeds = {name: np.asarray(value, types[name]) for name, value in known.items() if name in types}
        return feeds | dict(zip(self._graph.empty, self._cache, strict=True))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
