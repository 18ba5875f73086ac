"""Keeps an answer within a grammar by a mask over the vocabulary, whoever computes the logits. Only file with llguidance.

The grammar is that of `engines.constrain`, so that every engine keeps to a schema in the same way. llguidance reads bytes:
a token is what it adds to the answer's text, a control token adds nothing and is never allowed, and a token that ends the
answer is allowed where the text is whole. It never leaves UTF-8 (RFC 3629): its letters are characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edged.engines.base import Unsuitable

MISSING = "llguidance, which keeps the answers of ONNX models to a schema, is not installed: pip install edged[agents]"

# The model spells what it must write as it likes: llguidance would ask a tokenizer how, which may put spaces before texts.
_OPTIONS = '%llguidance {"no_forcing": true}'
# GBNF: a text in quotes, a class of characters, or the name of a terminal.
_ATOM = re.compile(r'("(?:\\.|[^"\\])*")|(\[(?:\\.|[^\]\\])*\])|\bt(\d+)\b')


def installed() -> bool:
    """Whether llguidance is there; it is not imported by this."""
    return find_spec("llguidance") is not None


def library() -> ModuleType:
    """llguidance; raises Unsuitable where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise Unsuitable(MISSING) from None
    return llguidance


def to_lark(grammar: str) -> str:
    """A grammar of `constrain.grammar` in llguidance's dialect of Lark, where terminals are spelled in capitals."""
    rules = [line.replace(" ::= ", ": ", 1) for line in grammar.replace("root ", "start ", 1).splitlines()]
    return "\n".join([_OPTIONS, *(_ATOM.sub(_atom, rule) for rule in rules)])


def _atom(found: re.Match[str]) -> str:
    text, characters, terminal = found.groups()
    if characters:
        return "/" + characters.replace("/", r"\/") + "/"
    return str(text) if text else f"T{terminal}"


class TokenTrie:
    """A vocabulary as llguidance walks through it. Takes a tenth of a second and more: made once for a loaded model."""

    def __init__(self, pieces: Sequence[bytes], ends: frozenset[int]) -> None:
        """`pieces`: the bytes of each token; `ends`: the tokens that end an answer. Raises Unsuitable (no library)."""
        guide = library()
        self.size = len(pieces)
        self.ends = np.array([token for token in ends if token < self.size], np.int64)
        # Its own end stands behind the vocabulary: the model's ends may be several.
        self.native = guide.LLTokenizer(guide.TokenizerWrapper(_Words([*pieces, b"<end>"])))


class _Words:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens, self.eos_token_id = tokens, len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("asked only by grammars that force tokens")


class TokenMask:
    """One answer's way through a grammar whose sentences are JSON texts."""

    def __init__(self, trie: TokenTrie, grammar: str) -> None:
        """Raises Unsuitable when llguidance refuses the grammar."""
        guide = library()
        self._trie = trie
        limits = guide.LLParserLimits(verbose_errors=False)
        lark = guide.LLMatcher.grammar_from_lark(to_lark(grammar))
        self._matcher: Any = guide.LLMatcher(trie.native, lark, log_level=0, limits=limits)
        self._check("the grammar of the schema is refused")

    @property
    def complete(self) -> bool:
        """Whether the text is whole and nothing may follow it."""
        return bool(self._matcher.is_stopped()) and self.may_end

    @property
    def may_end(self) -> bool:
        """Whether what is there is a whole text, though more may follow: after 1 comes the end, or 12."""
        return bool(self._matcher.is_accepting())

    def masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """`logits` (vocabulary,) with -inf for every token that may not come next. Raises Unsuitable when none may."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.zeros(len(logits), bool)
        allowed[: self._trie.size] = np.unpackbits(bits, bitorder="little")[: self._trie.size]
        allowed[self._trie.ends] = self.may_end
        if not allowed.any():
            self._check("the schema is too much for this model's vocabulary")
            raise Unsuitable("no token of the model goes on with what the schema demands; use another schema or model")
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Note that `token`, one that `masked` allowed and no end, is part of the answer."""
        self._matcher.consume_token(token)
        self._check("the answer left its grammar")

    def _check(self, what: str) -> None:
        if self._matcher.is_error() and "NoExtension" not in (why := self._matcher.get_error()):
            raise Unsuitable(f"{what} ({why.strip().splitlines()[0][:200]}); use fewer or simpler keywords")
