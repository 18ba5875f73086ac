"""Work apart: whoever waits is let go in time, and what is left behind is counted until it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from edged.agents.apart import STUCK_ALL_MAX, STUCK_MAX, Apart, TooManyStuck, Wait
from tests.support.device import until


@pytest.fixture
def go_on() -> Iterator[threading.Event]:
    """Lets all work go on that waits for it; afterwards none is stuck."""
    event = threading.Event()
    yield event
    event.set()
    until("nothing is stuck", lambda: Apart._all == 0)


async def left_behind(apart: Apart, go_on: threading.Event, times: int) -> None:
    for _ in range(times):
        with pytest.raises(TimeoutError):
            await apart.result(lambda _: go_on.wait(20), 0.01)


def test_work_that_is_stuck_is_counted_until_it_ends(go_on: threading.Event) -> None:
    async def all_of_it() -> None:
        apart, other = Apart("one"), Apart("other")
        await left_behind(apart, go_on, STUCK_MAX)
        with pytest.raises(TooManyStuck, match=f"^{STUCK_MAX} earlier calls ran out of time"):
            await apart.result(lambda _: 1, 20)
        assert await other.result(lambda _: 1, 20) == 1, "another kind of work has its own count"
        go_on.set()
        await asyncio.to_thread(until, "its threads have ended", lambda: Apart._all == 0)
        assert await apart.result(lambda _: 2, 20) == 2

    asyncio.run(all_of_it())


def test_of_all_kinds_together_so_many_are_stuck_and_no_more(go_on: threading.Event) -> None:
    async def all_of_it() -> None:
        for number in range(STUCK_ALL_MAX // STUCK_MAX):
            await left_behind(Apart(f"{number}"), go_on, STUCK_MAX)
        with pytest.raises(TooManyStuck, match=f"^{STUCK_ALL_MAX} earlier calls of all tools"):
            await Apart("fresh").result(lambda _: 1, 20)

    asyncio.run(all_of_it())


def test_what_is_at_work_is_not_stuck(go_on: threading.Event) -> None:
    """However many there are."""
    count = STUCK_ALL_MAX + 5
    barrier = threading.Barrier(count)

    async def all_of_it() -> list[int]:
        apart = Apart("busy")
        return list(await asyncio.gather(*(apart.result(lambda _: barrier.wait(20), 20) for _ in range(count))))

    assert sorted(asyncio.run(all_of_it())) == list(range(count))


def test_a_coroutine_is_cancelled_when_nobody_waits_any_more() -> None:
    ended: list[str] = []

    async def sleeps() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(threading.current_thread().name)

    def work(wait: Wait) -> None:
        wait(sleeps())

    async def all_of_it() -> None:
        with pytest.raises(TimeoutError):
            await Apart("timed").result(work, 0.05)
        task = asyncio.create_task(Apart("cancelled").result(work, 3600))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(until, "both have ended", lambda: len(ended) == 2 and Apart._all == 0)

    asyncio.run(all_of_it())
    assert ended == ["timed", "cancelled"]


def test_what_is_raised_is_raised_here() -> None:
    def leaves(_: Wait) -> None:
        raise SystemExit(3)

    async def broken() -> None:
        raise KeyError("port")

    with pytest.raises(RuntimeError, match=r"SystemExit\(3\)"):
        asyncio.run(Apart("x").result(leaves, 20))
    with pytest.raises(KeyError, match="port"):
        asyncio.run(Apart("x").result(lambda wait: wait(broken()), 20))
