"""Texts without the secrets of the addresses in them."""

from __future__ import annotations

import re

# All of it: a camera's password stands before its host, or in its path, or in its query.
STREAM = re.compile(r"(rtsps?://)\S+", re.IGNORECASE)


def redact(text: str) -> str:
    """`text` with rtsp://*** in place of every address of a stream."""
    return STREAM.sub(r"\1***", text)
