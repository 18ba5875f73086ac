"""Wants of a fleet: published once for all who ask together, and never held up for long."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.wire.blocks import WINDOW, Transfer
from trainer.core.asked import FETCHING_S, WAITING_MAX, Asked

SHA = "a" * 64
WINDOW_S, PATIENCE_S = 0.1, 5.0


def served(*devices: str) -> Asked:
    """Blob SHA is under way to these devices at 0.0; they have had block 0."""
    asked = Asked(WINDOW_S, PATIENCE_S)
    for device in devices:
        asked.want(device, SHA, [0], -1.0)
    assert asked.due(0.0) == (SHA, 0)
    assert asked.published((SHA, 0)) == len(devices)
    return asked


def test_a_device_alone_waits_for_the_window() -> None:
    asked = served("d1")
    assert asked.want("d1", SHA, [1, 2], 10.0) == 0
    assert asked.wait_s(10.0) == pytest.approx(WINDOW_S)
    assert asked.due(10.0) is None
    for number in (1, 2):
        assert asked.due(10.0 + WINDOW_S) == (SHA, number)
        assert asked.published((SHA, number)) == 1
    assert asked.due(20.0) is None


def test_who_asks_within_the_window_gets_the_same_publication() -> None:
    asked = served("d1", "d2")
    asked.want("d1", SHA, [1], 0.0)
    assert asked.due(WINDOW_S) is None
    asked.want("d2", SHA, [1], 0.5)
    assert asked.due(0.5) == (SHA, 1)
    assert asked.published((SHA, 1)) == 2


def test_a_slow_device_is_waited_for_with_patience_and_no_longer() -> None:
    asked = served("d1", "slow")
    asked.want("slow", SHA, [5], 0.0)
    asked.want("d1", SHA, [1], 0.1)
    assert asked.wait_s(0.1) == pytest.approx(PATIENCE_S - 0.1)
    assert asked.due(PATIENCE_S - 0.01) is None
    assert asked.due(PATIENCE_S) == (SHA, 5)
    asked.published((SHA, 5))
    assert asked.due(PATIENCE_S) is None
    assert asked.due(PATIENCE_S + 0.1) == (SHA, 1)


def test_who_is_behind_is_served_soon_and_nobody_else_gets_it_again() -> None:
    asked = served("d1")
    asked.want("d1", SHA, [1], 0.0)
    asked.want("d2", SHA, [0], 0.0)
    assert asked.due(WINDOW_S) == (SHA, 0)  # the first has had it
    assert asked.published((SHA, 0)) == 1
    assert asked.due(WINDOW_S) == (SHA, 1)  # asked for before the second was here
    asked.published((SHA, 1))
    asked.want("d1", SHA, [2], 0.5)
    assert asked.due(0.5 + WINDOW_S) is None
    asked.want("d2", SHA, [1], 0.6)
    assert asked.due(0.6 + WINDOW_S) == (SHA, 1)


def test_who_has_stopped_fetching_is_not_waited_for() -> None:
    asked = served("d1", "d2")
    asked.want("d1", SHA, [1], FETCHING_S - 2)
    asked.published((SHA, 1))
    now = FETCHING_S + 1
    asked.want("d1", SHA, [9], now)
    assert asked.due(now + WINDOW_S) == (SHA, 9)


def test_those_who_are_told_together_begin_together() -> None:
    asked = Asked(WINDOW_S, PATIENCE_S, gather_s=1.0)
    asked.want("d1", SHA, [0, 1], 0.0)
    assert asked.wait_s(0.0) == 1.0
    assert asked.due(0.9) is None
    asked.want("d2", SHA, [0, 1], 0.9)
    assert asked.due(1.0) == (SHA, 0)
    assert asked.published((SHA, 0)) == 2
    asked.published((SHA, 1))
    asked.want("d1", "b" * 64, [0], 1.1)  # the next file: they are together already
    assert asked.due(1.1 + WINDOW_S) == ("b" * 64, 0)


def test_one_device_waits_for_a_window_of_blocks_and_all_together_for_a_bounded_number() -> None:
    asked = Asked(WINDOW_S, PATIENCE_S)
    assert asked.want("greedy", SHA, list(range(WINDOW + 3)), 0.0) == 3
    assert asked.want("greedy", "b" * 64, [0], 0.0) == 1
    full = Asked(WINDOW_S, PATIENCE_S)
    refused = sum(full.want(f"d{n}", SHA, list(range(8 * n, 8 * n + 8)), 0.0) for n in range(WAITING_MAX // 8 + 1))
    assert refused == 8
    assert full.want("late", SHA, [0], 0.0) == 0  # what somebody waits for anyway costs nothing


def test_a_block_that_was_lost_is_published_again() -> None:
    asked = served("d1")
    for now in (0.0, 20.0, 40.0):
        asked.want("d1", SHA, [0], now)
        assert asked.due(now + WINDOW_S) == (SHA, 0)
        asked.published((SHA, 0))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(20, 80), st.floats(0, 0.3), st.integers(0, 1 << 20))
def test_devices_that_begin_at_different_times_come_together(
    devices: int, blocks: int, late_s: float, seed: int
) -> None:
    """Each round trip takes some milliseconds; the publications are few more than the blocks, whoever comes late."""
    rng, asked = random.Random(seed), Asked(0.02, 2.0)
    begins = {f"d{n}": rng.uniform(0, late_s) for n in range(devices)}
    transfers: dict[str, Transfer] = {}
    now, published, early = 0.0, 0, 0
    while len(transfers) < devices or not all(t.done for t in transfers.values()):
        now += 0.005
        early = published if len(transfers) < devices else early
        for name, begin in begins.items():
            if begin <= now:
                if rng.random() >= 0.7:
                    continue  # it is not its turn
                transfer = transfers.setdefault(name, Transfer(range(blocks), now))
                if transfer.patience_s(now) == 0:
                    asked.want(name, SHA, transfer.ask(now), now)
        while (block := asked.due(now)) is not None:
            asked.published(block)
            published += 1
            for transfer in transfers.values():
                if block[1] in transfer.outstanding:
                    transfer.arrived(block[1], now)
        assert now < 120
    # What went out before the last came goes out once more for those who lacked it, and everything else once.
    assert published <= blocks + early + WINDOW
