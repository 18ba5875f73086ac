"""Bundles that were made earlier stay readable: they may lie in a drawer for a year."""

from __future__ import annotations

from pathlib import Path

import pytest

from edged.wire.bundle import BUNDLE_BYTES_MAX, BadBundle, decode, encode

GOLDEN = Path(__file__).parent / "bundles" / "v1.json"


def test_a_bundle_of_version_1_is_read_as_it_was_written() -> None:
    data = GOLDEN.read_bytes()
    bundle = decode(data)
    assert (bundle.device, bundle.site, bundle.group) == ("cam-07", "plant", "line-a")
    assert (bundle.broker_host, bundle.broker_port) == ("mq.plant.example", 8883)
    assert bundle.root is not None and "TEST KEY" in bundle.bulk.key
    assert encode(bundle) == data


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (b'"v":', b'"w":', "w: Extra inputs are not permitted"),
        (b'"v": 1', b'"v": 2', "v: Input should be 1"),
        (b"cam-07", b"../07", "device: String should match pattern"),
        (b"mq.plant", b"mq\\nx", "broker_host: String should match pattern"),
        (b"MAA=", "ß".encode(), "ca: String should match pattern"),
    ],
)
def test_what_is_not_of_this_version_is_named_and_no_key_is_shown(before: bytes, after: bytes, why: str) -> None:
    data = GOLDEN.read_bytes()
    assert before in data
    with pytest.raises(BadBundle, match=why) as raised:
        decode(data.replace(before, after))
    assert "TEST KEY" not in str(raised.value)


def test_a_file_of_any_size_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(BadBundle, match=f"a bundle has at most {BUNDLE_BYTES_MAX}"):
        decode(b'"' + b"x" * BUNDLE_BYTES_MAX + b'"')
