"""Work in a thread of its own, for which nobody waits longer than he wants.

Law of this file: whatever the work does, its caller's event loop is never held up and goes on when the time is over. A
thread cannot be stopped: one that is left behind is counted until it ends by itself, and beyond so many none is begun.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

STUCK_MAX = 4  # of one `Apart` that were left behind and still run
STUCK_ALL_MAX = 16  # of all of this process
R = TypeVar("R")
Wait = Callable[[Awaitable[Any]], Any]  # runs a coroutine to its end in an event loop of this thread, once
Work = Callable[[Wait], R]


class TooManyStuck(RuntimeError):
    """So much earlier work still runs, long after its time, that no more is begun."""


class Apart:
    """Does work of one kind; `name` is that of its threads."""

    _lock = threading.Lock()
    _all = 0  # what is stuck of all kinds

    def __init__(self, name: str) -> None:
        self._name, self._stuck = name, 0

    async def result(self, work: Work[R], seconds_max: float) -> R:
        """What the work answers. When nobody waits any more its coroutine is cancelled.

        Raises TimeoutError, TooManyStuck, and what the work raises (RuntimeError for what is no Exception).
        """
        with self._lock:
            stuck, where = (self._stuck, "") if self._stuck >= STUCK_MAX else (Apart._all, " of all tools")
            if self._stuck >= STUCK_MAX or Apart._all >= STUCK_ALL_MAX:
                raise TooManyStuck(f"{stuck} earlier calls{where} ran out of time and still run")
        one = _One(work, self._ended_late)
        threading.Thread(target=one.run, daemon=True, name=self._name).start()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(one.future), seconds_max)
        finally:
            with self._lock:
                if one.leave():
                    self._stuck += 1
                    Apart._all += 1

    def _ended_late(self) -> None:
        with self._lock:
            self._stuck -= 1
            Apart._all -= 1


class _One(Generic[R]):
    """One piece of work. Its caller leaves once, its thread ends once; who comes second knows that the other did."""

    def __init__(self, work: Work[R], ended_late: Callable[[], None]) -> None:
        self._work, self._ended_late = work, ended_late
        self._lock = threading.Lock()
        self._ended = self._left = False
        self._cancel: Callable[[], object] | None = None  # of the coroutine, while there is one; on any thread
        self.future: Future[R] = Future()

    def leave(self) -> bool:
        """Nobody waits any more. Answers whether the thread runs on."""
        with self._lock:
            self._left = True
            if self._cancel is not None:
                self._cancel()
            return not self._ended

    def run(self) -> None:
        try:
            result, error = self._work(self._wait), None
        except BaseException as raised:
            result, error = None, raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
        with self._lock:
            self._ended, late = True, self._left
        if late:
            self._ended_late()
        elif self.future.set_running_or_notify_cancel():
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(result)  # type: ignore[arg-type]

    def _wait(self, what: Awaitable[Any]) -> Any:
        return asyncio.run(self._awaited(what))

    async def _awaited(self, what: Awaitable[Any]) -> Any:
        task, loop = asyncio.ensure_future(what), asyncio.get_running_loop()
        with self._lock:
            if self._left:
                task.cancel()
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            return await task
        finally:
            with self._lock:
                self._cancel = None  # the loop is about to close
