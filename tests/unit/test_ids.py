"""Identifiers: valid UUIDs of version 7 that sort by time."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.wire.ids import derived, uuid7

times = st.integers(0, (1 << 48) - 1)
entropies = st.binary(min_size=10, max_size=10)


@given(times, entropies)
def test_it_is_a_uuid_of_version_7_that_holds_its_time(unix_ms: int, entropy: bytes) -> None:
    value = uuid.UUID(uuid7(unix_ms, entropy))
    assert (value.version, value.variant) == (7, uuid.RFC_4122)
    assert value.int >> 80 == unix_ms


@given(times, times, entropies, entropies)
def test_it_sorts_by_time_as_text(a: int, b: int, first: bytes, second: bytes) -> None:
    if a != b:
        assert (uuid7(a, first) < uuid7(b, second)) == (a < b)


def test_the_example_of_the_rfc() -> None:
    # RFC 9562, appendix A.6: 0x017F22E279B0 ms, rand_a 0xCC3, rand_b 0x18C4DC0C0C07398F
    entropy = bytes.fromhex("0cc3" + "18c4dc0c0c07398f")
    assert uuid7(0x017F22E279B0, entropy) == "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"


@pytest.mark.parametrize(("unix_ms", "entropy"), [(-1, bytes(10)), (1 << 48, bytes(10)), (0, bytes(9)), (0, bytes(11))])
def test_what_does_not_fit_is_refused(unix_ms: int, entropy: bytes) -> None:
    with pytest.raises(ValueError, match="uuid7: "):
        uuid7(unix_ms, entropy)


@given(times, entropies, st.text(max_size=20), st.text(max_size=20))
def test_what_is_derived_is_the_same_every_time_and_as_old_as_its_source(
    unix_ms: int, entropy: bytes, what: str, other: str
) -> None:
    source = uuid7(unix_ms, entropy)
    found = uuid.UUID(derived(source, what))
    assert (found.version, found.int >> 80) == (7, unix_ms)
    assert str(found) == derived(source, what) != source
    assert (derived(source, other) == str(found)) == (what == other)


@given(st.text(max_size=40))
def test_anything_can_be_the_source(source: str) -> None:
    assert uuid.UUID(derived(source, "reply")).version == 7
