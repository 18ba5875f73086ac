"""Keeps an answer of llama.cpp within a grammar, token by token. Besides `llama`, the only file that imports llama_cpp.

llama.cpp ends the process when a grammar is told of a token that it does not allow, and its grammars take a control
token for the text that spells it, and bytes for characters without checking them. So no token reaches `accept` here
that was not checked first, and none is allowed that adds no text or breaks UTF-8 (RFC 3629).
"""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edged.engines.answer import draw
from edged.engines.base import Unsuitable

_ROW = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])  # llama_token_data
_CLOSING = (b"}", b"]", b'"', b"e", b"l")  # a JSON value that ends with these (true, false, null) cannot go on


class TokenTable:
    """What each token of a vocabulary adds to an answer's text. Takes a call a token to make: once for a loaded model."""

    def __init__(self, vocab: Any, size: int, piece: Callable[[int], bytes]) -> None:
        self.vocab = vocab
        self.pieces = [piece(token) for token in range(size)]
        self.ends = frozenset(token for token in range(size) if llama_cpp.llama_vocab_is_eog(vocab, token))
        starts = [token for token in range(size) if token in self.ends or unfinished(self.pieces[token]) is not None]
        self.starts = np.array(starts, np.int32)  # tokens that may stand where a character begins
        # Tokens that begin inside a character: few, also in vocabularies that know every byte.
        self.inside = [
            token for token in range(size) if self.pieces[token][:1] and 0x80 <= self.pieces[token][0] < 0xC0
        ]


def unfinished(data: bytes) -> bytes | None:
    """The bytes at the end of `data` that still wait for the rest of their character; None where it is no UTF-8 text.

    Nothing at all and NUL, which ends texts in C, are no text either.
    """
    if not data or 0 in data:
        return None
    try:
        _, used = codecs.utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return None
    rest = data[used:]
    # Python's decoder waits for the last byte of a surrogate before it refuses it, and then nothing else could follow.
    return None if rest[:1] == b"\xed" and rest[1:2] >= b"\xa0" else rest


class Constraint:
    """One answer's way through a grammar whose sentences are JSON texts. Use as a context: it holds native memory."""

    def __init__(self, table: TokenTable, grammar: str) -> None:
        """Raises Unsuitable when llama.cpp refuses the grammar."""
        self.complete = False
        self._table = table
        self._partial = b""  # of a character that the next token must go on with
        self._sampler = llama_cpp.llama_sampler_init_grammar(table.vocab, grammar.encode(), b"root")
        if not self._sampler:
            raise Unsuitable("llama.cpp refuses the grammar of the schema; use fewer or simpler keywords")

    def __enter__(self) -> Constraint:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_sampler_free(self._sampler)

    def choose(self, logits: NDArray[np.float32], temperature: float, chance: np.random.Generator) -> int:
        """One allowed token of softmax(`logits` / `temperature`), as if only the allowed ones were there.

        A model that knows the format mostly hits an allowed one: only when it does not is the whole vocabulary checked.
        Raises Unsuitable when no token goes on.
        """
        token = draw(logits, temperature, chance)
        if self._fits(token) and len(self._allowed(np.array([token], np.int32))):
            return token
        if self._partial:
            candidates = np.array([token for token in self._table.inside if self._fits(token)], np.int32)
        else:
            candidates = self._table.starts
        allowed = self._allowed(candidates)
        if not len(allowed):
            raise Unsuitable("no token of the model goes on with what the schema demands; use another schema or model")
        return int(allowed[draw(logits[allowed], temperature, chance)])

    def accept(self, token: int) -> None:
        """Note that `token`, which `choose` gave, is part of the answer; `complete` says whether nothing may follow."""
        if token in self._table.ends:
            self.complete = True
            return
        llama_cpp.llama_sampler_accept(self._sampler, token)
        piece = self._table.pieces[token]
        rest = unfinished(self._partial + piece)
        assert rest is not None  # `choose` saw to it
        self._partial = rest
        self.complete = piece.endswith(_CLOSING) and self.may_end()

    def may_end(self) -> bool:
        """Whether what is there is a whole sentence, though more may follow: after 1 comes the end, or 12."""
        return self.complete or len(self._allowed(np.array([*self._table.ends], np.int32))) > 0

    def _fits(self, token: int) -> bool:
        if token in self._table.ends:
            return not self._partial
        piece = self._table.pieces[token]
        return bool(piece) and unfinished(self._partial + piece) is not None

    def _allowed(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """Those of `tokens` that the grammar allows next."""
        rows = np.zeros(len(tokens), _ROW)
        rows["id"] = tokens
        pointer = rows.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        array = llama_cpp.llama_token_data_array(pointer, len(rows), -1, False)
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(array))
        allowed: NDArray[np.int32] = tokens[np.isfinite(rows["logit"])]
        return allowed
