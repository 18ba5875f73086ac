"""What must not leave the device in a log line or an archive for support: credentials. Errs on the side of hiding."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from edged.core import redact

HIDDEN = "***"
LITERAL_MIN = 4  # characters: hiding every occurrence of a shorter secret would hide half of the text

# `mqtt://user:password@broker:1883`: all between // and the last @ of the authority.
# The scheme is bounded, as every pattern here must be linear in a text of any kind.
_URL = re.compile(r"(?i)\b([a-z][a-z0-9+.-]{0,20}://)[^\s/?#'\"<>]*@")
_AUTHORIZATION = re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer|digest)\s+)[^\s,;'\"]+")
_PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY)-----.*?(?:-----END \1-----|\Z)", re.DOTALL)
# `password=...`, `"api_key": "..."`, `?token=...`: a name that ends in one of these words, and its value.
_WORDS = r"(?:passw(?:or)?d|passphrase|pwd|secret|token|credentials?|api_?key|access_?key|private_?key)"
_PAIR = re.compile(rf"(?i)({_WORDS}['\"]?\s*[:=]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&'\"}})\]]+)")
_NAME = re.compile(rf"(?i){_WORDS}$")


def hide(text: str) -> str:
    """`text` without passwords in addresses, without addresses of cameras, authorisation headers, private keys, and the
    values of names such as password."""
    if "PRIVATE KEY" in text:
        text = _PEM.sub(rf"-----BEGIN \1----- {HIDDEN}", text)
    if "://" in text:
        text = _URL.sub(rf"\1{HIDDEN}@", redact.redact(text))
    text = _AUTHORIZATION.sub(rf"\1{HIDDEN}", text)
    return _PAIR.sub(rf"\1{HIDDEN}", text)


def is_secret(name: str) -> bool:
    """Whether the value of a key of this name is a secret."""
    return _NAME.search(name) is not None


def cleaned(value: Any, name: str = "") -> Any:
    """A JSON-like value without the values of secret keys, and with every text gone over by `hide`."""
    if isinstance(value, dict):
        return {str(key): cleaned(inner, str(key)) for key, inner in value.items()}
    if is_secret(name) and isinstance(value, str | int | float) and value not in ("", True, False):
        return HIDDEN
    if isinstance(value, list | tuple):
        return [cleaned(inner, name) for inner in value]
    return hide(value) if isinstance(value, str) else value


def secrets_in(value: Any, name: str = "") -> set[str]:
    """The secrets themselves that a JSON-like configuration holds, to look for wherever else they may have got to."""
    if isinstance(value, dict):
        return {secret for key, inner in value.items() for secret in secrets_in(inner, str(key))}
    if isinstance(value, list | tuple):
        return {secret for inner in value for secret in secrets_in(inner, name)}
    if not isinstance(value, str):
        return set()
    found = {value} if is_secret(name) else set()
    for match in _URL.finditer(value):
        credentials = match[0].partition("://")[2][:-1]
        found |= {credentials, credentials.partition(":")[2]}
    return {secret for secret in found if len(secret) >= LITERAL_MIN}


def without(text: str, secrets: Iterable[str]) -> str:
    """`text` with every occurrence of these secrets hidden, the longest first."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text
