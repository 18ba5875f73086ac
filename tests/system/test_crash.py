"""A shorter `make crash`: a real device is killed again and again, and afterwards everything is there, once."""

from __future__ import annotations

import pytest

from bench.crash import run
from bench.measure import to_stderr

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("part", "kills"), [("kills", 25), ("full", 8), ("clock", 8)])
def test_nothing_is_lost_doubled_or_damaged(part: str, kills: int) -> None:
    found = run({part: kills}, 11, to_stderr)["parts"][part]
    if "not_run" in found:
        pytest.skip(found["not_run"])
    assert found["failures"] == []
    assert sum(found["by_phase"].values()) == kills
    assert found["came_out"]["samples labelled"] > 0
