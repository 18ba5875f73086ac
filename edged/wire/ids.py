"""Identifiers that sort by time."""

from __future__ import annotations

import uuid


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
