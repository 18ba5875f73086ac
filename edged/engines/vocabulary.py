"""The `tokenizer.json` of a language model: text to token ids, token ids to bytes. The only file that imports tokenizers.

Tokens are turned back one by one, into bytes, because an answer is passed on while it is made and a character may be
split between tokens. Two ways of spelling bytes exist in the vocabularies of Phi models: every byte as a letter of its
own (byte-level BPE of GPT-2: Phi-2, Phi-4), or text with `▁` for a space and `<0x0A>` for single bytes (SentencePiece:
Phi-3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edged.engines.base import EngineError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for themselves, the others follow from U+0100 on. GPT-2 (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_LETTERS = _byte_letters()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_LETTERS[letter] for letter in token)
    except KeyError:  # put in later, as plain text
        return token.encode()


def _sentence_piece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


_SPELLINGS: dict[str, Callable[[str], bytes]] = {"ByteLevel": _byte_level, "ByteFallback": _sentence_piece}


class Vocabulary:
    """A tokenizer as the model was trained with."""

    def __init__(self, path: Path) -> None:
        """Load the `tokenizer.json` at `path`; raises EngineError naming it."""
        try:
            text = path.read_text(encoding="utf-8")
            decoder = json.loads(text)["decoder"] or {}
            self._tokenizer = Tokenizer.from_str(text)
        except OSError as error:
            raise EngineError(f"{path}: cannot be read ({error.strerror}); fetch the release again") from None
        except Exception as error:  # tokenizers raises nothing more exact
            raise EngineError(f"{path}: not a whole tokenizer ({str(error)[:200]}); fetch the release again") from None
        self._spell = _spelling(path, decoder)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._added = self._tokenizer.get_added_tokens_decoder()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.size = max(ids, default=-1) + 1
        self.control = tuple(token.content for token in self._added.values() if token.special)

    def encode(self, text: str, *, whole: bool = True) -> list[int]:
        """The tokens of `text`, control tokens that it spells out included.

        `whole`: with what the model wants around a text, such as a token for its beginning.
        """
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate is no text
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=whole).ids
        return ids

    def piece(self, token: int) -> bytes:
        """The bytes of a token; none for a control token, and for one that only fills the model's vocabulary up."""
        added = self._added.get(token)
        if added is not None:
            return b"" if added.special else str(added.content).encode()
        name = self._tokenizer.id_to_token(token)
        return b"" if name is None else self._spell(name)


def _spelling(path: Path, decoder: dict[str, Any]) -> Callable[[str], bytes]:
    kinds = [decoder.get("type"), *(step.get("type") for step in decoder.get("decoders", ()))]
    for kind, spell in _SPELLINGS.items():
        if kind in kinds:
            return spell
    raise EngineError(
        f"{path}: decoder {kinds[0]!r} is unknown; known: {', '.join(_SPELLINGS)} (alone or in a Sequence)"
    )
