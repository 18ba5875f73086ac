"""Blocks: the arithmetic, and a transfer over a network that loses, repeats, reorders and forges, on a virtual clock."""

from __future__ import annotations

import hashlib
import heapq
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from edged.wire.blocks import (
    BLOCK_BYTES,
    BLOCKS_MAX,
    OVERTAKEN,
    REFILL,
    TIMEOUT_S,
    TIMEOUT_S_MAX,
    TIMEOUT_S_MIN,
    WINDOW,
    Transfer,
    block_bytes,
    block_count,
    runs,
    span,
)
from edged.wire.manifest import FileEntry

MIB = 1 << 20


@given(st.integers(0, 64 << 30))
def test_the_blocks_of_a_file_are_its_bytes_each_once(size: int) -> None:
    count = block_count(size)
    assert count <= BLOCKS_MAX
    numbers = {0, 1, count // 2, count - 2, count - 1} & set(range(count))
    for number in numbers:
        start, end = span(number, size)
        assert start == number * block_bytes(size)
        assert 0 < end - start <= block_bytes(size)
        assert end == (size if number == count - 1 else span(number + 1, size)[0])
    assert count or not size


@pytest.mark.parametrize(
    ("size", "length"), [(0, 1), (1, 1), (64 * MIB, 1), (64 * MIB + 1, 2), (512 * MIB, 8), (4 << 30, 64)]
)
def test_blocks_are_64_kib_up_to_64_mib_and_larger_for_larger_files(size: int, length: int) -> None:
    assert block_bytes(size) == length * BLOCK_BYTES


def test_what_a_release_says_of_a_file_must_fit_its_size() -> None:
    content = random.Random(1).randbytes(3 * BLOCK_BYTES - 1)
    parts = [content[n : n + BLOCK_BYTES] for n in range(0, len(content), BLOCK_BYTES)]
    entry = FileEntry.of("m.onnx", len(content), parts)
    assert entry.sha256 == hashlib.sha256(content).hexdigest()
    assert entry.blocks == [hashlib.sha256(part).hexdigest() for part in parts]
    for change in ({"bytes": 3 * BLOCK_BYTES + 1}, {"blocks": entry.blocks[:2]}, {"block_bytes": 4096}):
        with pytest.raises(ValidationError, match=r"m\.onnx: a file of \d+ bytes has \d blocks of 65536 bytes, not"):
            FileEntry.model_validate(entry.model_dump() | change)


@given(st.sets(st.integers(0, 60)))
def test_runs_are_the_same_numbers(numbers: set[int]) -> None:
    found = runs(numbers)
    assert [n for first, end in found for n in range(first, end)] == sorted(numbers)
    assert all(before[1] < after[0] for before, after in pairwise(found))


class Net:
    """Answers requests late, twice, in another order, wrongly, or not at all."""

    def __init__(self, rng: random.Random, loss: float, twice: float, forged: float, delay_s: float) -> None:
        self._rng, self._loss, self._twice, self._forged, self._delay_s = rng, loss, twice, forged, delay_s
        self._coming: list[tuple[float, int, int, bool]] = []
        self._order = 0

    def ask(self, numbers: list[int], now: float) -> None:
        for number in numbers:
            for _ in range(2 if self._rng.random() < self._twice else 1):
                if self._rng.random() >= self._loss:
                    self._order += 1
                    at = now + self._rng.uniform(0, self._delay_s)
                    heapq.heappush(self._coming, (at, self._order, number, self._rng.random() >= self._forged))

    def next(self, until: float) -> tuple[float, int, bool] | None:
        if not self._coming or self._coming[0][0] > until:
            return None
        at, _, number, right = heapq.heappop(self._coming)
        return at, number, right


@settings(max_examples=300, deadline=None)
@given(
    count=st.integers(0, 60), seed=st.integers(0, 1 << 30), loss=st.floats(0, 0.6), twice=st.floats(0, 0.5),
    forged=st.floats(0, 0.4), delay_s=st.floats(0.001, 20), kill=st.floats(0, 0.05),
)  # fmt: skip
def test_every_block_arrives_whatever_the_network_does(
    count: int, seed: int, loss: float, twice: float, forged: float, delay_s: float, kill: float
) -> None:
    rng = random.Random(seed)
    net, now, have = Net(rng, loss, twice, forged, delay_s), 0.0, set[int]()
    transfer = Transfer(range(count), now)
    for _ in range(20_000):
        if transfer.done:
            break
        asked = transfer.ask(now)
        assert len(asked) <= WINDOW
        assert len(set(asked)) == len(asked)
        assert len(transfer.outstanding) <= WINDOW
        assert set(asked) <= transfer.missing
        net.ask(asked, now)
        assert transfer.outstanding, "something is always on its way, or there is nothing to do"
        wait = transfer.patience_s(now)
        assert 0 < wait <= TIMEOUT_S_MAX + 1e-6
        came = net.next(now + wait)
        if came is None:
            now += wait
            continue
        at, number, right = came
        now = max(now, at)
        if right:
            assert transfer.arrived(number, now) == (number not in have)
            have.add(number)
        if rng.random() < kill:  # a restart: what was verified is on the disk, what was asked for is forgotten
            transfer = Transfer(set(range(count)) - have, now)
        elif rng.random() < kill:  # another connection
            transfer.unasked()
    assert transfer.done
    assert have == set(range(count))


def test_without_faults_every_block_is_asked_for_once_in_order_also_over_a_slow_link() -> None:
    for pace in (0.01, 0.5, 4.0):  # seconds a block
        transfer, now, asked = Transfer(range(50), 0.0), 0.0, list[int]()
        coming: list[int] = []
        while not transfer.done:
            more = transfer.ask(now)
            asked += more
            coming += more
            now += pace
            assert transfer.arrived(coming.pop(0), now)
        assert asked == list(range(50))
        assert transfer.asked_again == 0


def test_it_asks_in_lots_of_half_a_window() -> None:
    transfer = Transfer(range(100), 0.0)
    assert transfer.ask(0.0) == list(range(WINDOW))
    for number in range(REFILL - 1):
        transfer.arrived(number, 1.0)
        assert transfer.ask(1.0) == []
    transfer.arrived(REFILL - 1, 1.0)
    assert transfer.ask(1.0) == list(range(WINDOW, WINDOW + REFILL))


def test_a_lost_block_is_asked_for_again_while_others_come() -> None:
    transfer = Transfer(range(1000), 0.0)
    lost, *rest = transfer.ask(0.0)
    now, asked = 0.0, list[tuple[float, int]]()
    while now < 1.5 * TIMEOUT_S_MIN:
        now += 0.5
        for number in rest:
            transfer.arrived(number, now)
        more = transfer.ask(now)
        asked += [(now, n) for n in more if n == lost]
        rest = [n for n in more if n != lost]
    assert asked == [(TIMEOUT_S_MIN, lost)]  # held back for others it may be, for a while
    assert transfer.asked_again == 1


def test_a_block_that_only_comes_late_is_not_asked_for_again() -> None:
    transfer = Transfer(range(100), 0.0)
    late, *rest = transfer.ask(0.0)
    for now in range(OVERTAKEN + 2):
        for number in rest:
            transfer.arrived(number, float(now))
        rest = transfer.ask(float(now))
        assert late not in rest
    assert transfer.arrived(late, 5.0)


def test_silence_is_met_with_patience_that_grows_up_to_a_limit_and_ends_with_the_first_block() -> None:
    transfer, now, waits = Transfer(range(3), 0.0), 0.0, list[float]()
    assert transfer.ask(now) == [0, 1, 2]
    for _ in range(6):
        waits.append(transfer.patience_s(now))
        now += waits[-1]
        assert transfer.ask(now) == [0, 1, 2]
    assert waits == [TIMEOUT_S, 2 * TIMEOUT_S, 4 * TIMEOUT_S, *[TIMEOUT_S_MAX] * 3]
    assert transfer.silent_s(now) == now
    transfer.arrived(0, now)
    assert transfer.silent_s(now) == 0
    assert transfer.ask(now + 0.5) == []


def test_after_another_connection_everything_outstanding_is_asked_for_at_once() -> None:
    transfer = Transfer(range(3), 0.0)
    transfer.ask(0.0)
    assert transfer.ask(0.1) == []
    transfer.unasked()
    assert transfer.patience_s(0.1) == 0
    assert transfer.ask(0.1) == [0, 1, 2]
