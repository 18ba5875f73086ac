"""A world in one thread: a virtual clock, what happens when, chance by seed, and the power that may go at any change.

Law: the same seed gives the same run. The garbage collector too comes when the seed says (`Disk.power_on`), because files
are closed by it; by itself it comes sooner or later, depending on where objects lie in memory. Whoever acts on the world
(a message, a request, the clock) asks for power first, so that code which goes on after its power was cut changes nothing
but the disk that is about to be forgotten.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime, timezone
from random import Random
from types import SimpleNamespace
from typing import Any

from sqlite_utils import migrations

from tests.support.sim.disk import Disk

START = 1_800_000_000.0
TURN_S = 1.0  # of virtual time that a loop waits for the next event, instead of its quarter of a second


class PowerCut(BaseException):
    """The power is gone. No `except Exception` of the product stops it."""


class Violation(AssertionError):
    """Something happened that must never happen."""


class Clock:
    """The wall may jump; `monotonic` does not."""

    def __init__(self) -> None:
        self.elapsed, self.offset = 1000.0, START

    def now(self) -> float:
        return self.offset + self.elapsed

    def monotonic(self) -> float:
        return self.elapsed

    def real(self, seconds: float) -> float:
        return max(seconds, TURN_S)


class World:
    """What happens, in the order of the virtual clock."""

    def __init__(self, name: str, disk: Disk) -> None:
        self.name, self.disk = name, disk
        self.dice = Random(name)
        self.clock = Clock()
        self.told: list[str] = []  # what happened, for a person and for the comparison of two runs
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.ended = False

    def say(self, text: str) -> None:
        self.told.append(f"{self.clock.elapsed - 1000:8.2f} {self.disk.operations:5d} {text}")

    def maybe(self, probability: float) -> bool:
        return self.dice.random() < probability

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Do this later."""
        heapq.heappush(self._events, (self.clock.elapsed + seconds, next(self._numbers), act))

    def need_power(self) -> None:
        """Raise PowerCut when there is none."""
        if not self.disk.on:
            raise PowerCut

    def pass_time(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Let the clock run, and happen what is due, until that much time has passed or `until` says so."""
        end = self.clock.elapsed + seconds
        while not until():
            self.need_power()
            if not self._events or self._events[0][0] > end:
                self.clock.elapsed = end
                return
            at, _, act = heapq.heappop(self._events)
            self.clock.elapsed = max(self.clock.elapsed, at)
            act()


class Inbox:
    """The inbox of a control loop: while it waits for something, the world goes on."""

    def __init__(self, world: World, at_rest: Callable[[], None], turn_s: float = TURN_S) -> None:
        self._world, self._waiting, self._at_rest, self._turn_s = world, deque[Any](), at_rest, turn_s

    def put(self, event: Any) -> None:
        self._waiting.append(event)

    def qsize(self) -> int:
        return len(self._waiting)

    def get(self, timeout: float | None = None) -> Any:
        self._world.need_power()
        if not self._waiting:
            self._at_rest()
            self._world.pass_time(max(timeout or 0.0, self._turn_s), lambda: bool(self._waiting))
        return self.get_nowait()

    def get_nowait(self) -> Any:
        self._world.need_power()
        if not self._waiting:
            raise queue.Empty
        return self._waiting.popleft()


class Worker:
    """An executor with one thread, as the world sees it: a job begins some time after it was asked for, in order."""

    def __init__(self, world: World) -> None:
        self._world, self._jobs, self._ended = world, deque[tuple[Callable[..., None], tuple[Any, ...]]](), False

    @property
    def idle(self) -> bool:
        return not self._jobs

    def submit(self, act: Callable[..., None], *values: Any) -> Future[None]:
        self._jobs.append((act, values))
        self._world.after(self._world.dice.choice((0.0, 0.0, 0.01, 0.5, 2.0)), self._work)
        return Future()

    def _work(self) -> None:
        if self._jobs and not self._ended:
            act, values = self._jobs.popleft()
            act(*values)

    def shutdown(self, **_: object) -> None:
        self._ended = True
        self._jobs.clear()


class NotAlone(BaseException):
    """A second thread or process in a world: it would act when the machine lets it, not when the seed says."""


def _alone(*values: object, **_: object) -> None:
    raise NotAlone(values)


class Here:
    """This process lives in a world: its clock, its randomness and its process id are the world's."""

    def __init__(self, world: World) -> None:
        self.move_to(world)
        gc.disable()
        threading.Thread.start = _alone  # type: ignore[method-assign]
        subprocess.Popen.__init__ = _alone  # type: ignore[method-assign]
        time.time = lambda: self.world.clock.now()
        time.monotonic = lambda: self.world.clock.monotonic()
        os.urandom = lambda n: self.dice.randbytes(n)
        os.getpid = lambda: 4242
        migrations.datetime = SimpleNamespace(  # type: ignore[attr-defined, assignment]
            datetime=SimpleNamespace(now=lambda zone: datetime.fromtimestamp(self.world.clock.now(), zone)),
            timezone=timezone,
        )
        tempfile._get_candidate_names = lambda: (f"{self.dice.getrandbits(40):x}" for _ in itertools.count())  # type: ignore[attr-defined]

    def move_to(self, world: World) -> None:
        self.world = world
        self.dice = Random(f"ids of {world.name}")
