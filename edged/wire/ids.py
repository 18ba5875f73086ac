"""Identifiers that sort by time."""

from __future__ import annotations

import uuid
from hashlib import sha256


def uuid7(unix_ms: int, entropy: bytes) -> str:
    """A version 7 UUID (RFC 9562, section 5.7) from milliseconds since the epoch and 10 random bytes."""
    if not 0 <= unix_ms < 1 << 48:
        raise ValueError(f"uuid7: {unix_ms} ms is outside the 48 bits that RFC 9562 leaves for the time")
    if len(entropy) != 10:
        raise ValueError(f"uuid7: needs 10 random bytes, got {len(entropy)}")
    value = unix_ms << 80 | int.from_bytes(entropy, "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


def derived(identifier: str, what: str) -> str:
    """The uuid7 of `what` was made of `identifier`: the same every time, as old as that is (where it is a uuid7)."""
    try:
        source = uuid.UUID(identifier)
        unix_ms = source.int >> 80 if source.version == 7 else 0
    except ValueError:
        unix_ms = 0
    return uuid7(unix_ms, sha256(f"{identifier}\0{what}".encode()).digest()[:10])
