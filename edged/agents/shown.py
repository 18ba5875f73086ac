"""What strangers' code gives back, as text that can be kept, sent and shown: of a limited length, and always Unicode.

Half of a surrogate pair can stand in a Python string (a file name that is no UTF-8, a server's `"\\ud800"`), and in nothing
that a database, a broker or a model takes. It becomes U+FFFD, as in every text that is decoded.
"""

from __future__ import annotations

import json
import re
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def shown(result: Any, chars_max: int) -> str:
    """A result as text: JSON where it is none, at most `chars_max` characters of it, and a note where there is more. A large
    result is not written out whole for that. Raises what the result's own `__str__` raises."""
    if isinstance(result, str):
        return _cut(result, chars_max, f"{len(result)} characters")
    text = ""
    try:
        for piece in _ENCODER.iterencode(result):
            text += piece
            if len(text) > chars_max:
                return _cut(text, chars_max, "more")
    except (TypeError, ValueError, RecursionError):
        text = str(result)
    return _cut(text, chars_max, f"{len(text)} characters")


def raised(error: BaseException) -> str:
    """An exception as text, also one that cannot say what it is."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__}, whose text cannot be had"


def whole(value: Any) -> Any:
    """A JSON-able value without halves of surrogate pairs, its keys too, as a value of its own."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, dict):
        return {whole(key): whole(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [whole(each) for each in value]
    return value


def _cut(text: str, chars_max: int, length: str) -> str:
    if len(text) > chars_max:
        text = f"{text[:chars_max]} [cut: {length}, {chars_max} shown]"
    return whole(text)  # type: ignore[no-any-return]
