"""A live source between a camera made of a queue and a pipeline that a test plays, on a clock that stands still."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from edged.beats import Beats
from edged.engines.base import Image
from edged.sources import Item, live
from edged.sources.live import Feed, LiveSource
from edged.sources.stream import CorruptFrame, LateFrame, StreamEnded

WAIT_S = 10.0
TIMEOUT_S = 5.0
# What a camera gives. What is corrupt shows at once, or only when the pixels are wanted.
FRAME, LATE, CORRUPT, CORRUPT_PIXELS, END, HANG = "frame", "late", "corrupt", "corrupt pixels", "end", "hang"


def until(what: str, found: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not found():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


class HandClock:
    """Stands still until a test moves it; waits are short, and remembered."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.waits: list[float] = []

    def now(self) -> float:
        return 1.7e9 + self.time

    def monotonic(self) -> float:
        return self.time

    def real(self, seconds: float) -> float:
        self.waits.append(seconds)
        return 0.002

    def pauses(self) -> list[float]:
        """What was waited for between two attempts."""
        return [wait for wait in list(self.waits) if wait != live.LOOK_S]


class FakeCamera:
    """Gives what a test says, one thing after the other; `plug(reason)` makes opening fail."""

    def __init__(self) -> None:
        self.script: queue.Queue[str | Exception] = queue.Queue()
        self.unplugged: Exception | None = None
        self.opened, self.closed, self.done = 0, 0, 0
        self.let_go = threading.Event()

    def open(self, _dropped: threading.Event) -> _FakeStream:
        if self.unplugged is not None:
            raise self.unplugged
        self.opened += 1
        return _FakeStream(self)

    def give(self, *steps: str | Exception) -> None:
        """Put steps, and wait until the source is done with the last."""
        target = self.done + len(steps)
        for step in steps:
            self.script.put(step)
        until("the source reads", lambda: self.done >= target)


class _FakeStream:
    about = "gives 4x2"

    def __init__(self, camera: FakeCamera) -> None:
        self._camera = camera
        self._step: str | Exception = ""

    def grab(self) -> bool:
        self._done()
        try:
            self._step = self._camera.script.get(timeout=0.01)
        except queue.Empty:
            return False
        if isinstance(self._step, Exception):
            raise self._step
        if self._step == CORRUPT:
            raise CorruptFrame
        if self._step == LATE:
            raise LateFrame
        if self._step == END:
            raise StreamEnded
        if self._step == HANG:
            self._camera.let_go.wait(WAIT_S)
        return True

    def _done(self) -> None:
        """The source has come to the end of what it does with the last step."""
        self._camera.done += bool(self._step)
        self._step = ""

    def retrieve(self) -> Image:
        if self._step == CORRUPT_PIXELS:
            raise CorruptFrame
        return np.full((2, 4, 3), 7, np.uint8)

    def close(self) -> None:
        self._done()
        self._camera.closed += 1


class Bench:
    """A live source between a fake camera and a pipeline that a test plays."""

    def __init__(self, **options: Any) -> None:
        self.clock, self.camera = HandClock(), FakeCamera()
        self.beats = Beats(self.clock)
        self.items: list[Item] = []
        self.counters: Counter[str] = Counter()
        self.events: list[tuple[str, str]] = []
        self.full, self.model = False, True
        feed = Feed(
            offer=self._offer, ready=lambda: self.model, count=lambda name: self.counters.update([name]),
            say=lambda kind, text: self.events.append((kind, text)), clock=self.clock, beats=self.beats,
        )  # fmt: skip
        options = {"timeout_s": TIMEOUT_S, "chance": lambda: 0.0} | options
        self.source = LiveSource("gate", "camera 7", self.camera.open, feed, **options)

    def _offer(self, item: Item) -> bool:
        if not self.full:
            self.items.append(item)
        return not self.full

    def frames(self) -> dict[str, int]:
        """What became of the frames, those that are none left out."""
        status = self.source.status()
        counts = {key.removeprefix("frames_"): value for key, value in status.items() if key.startswith("frames_")}
        read, corrupt = counts.pop("read"), counts["corrupt"]
        assert read == sum(counts.values()) - corrupt, "a frame is unaccounted for"
        return {key: value for key, value in counts.items() if value}

    def state(self, state: str) -> dict[str, Any]:
        """The status once it has come to this state."""
        until(f"{state}: {self.source.status()}", lambda: self.source.status()["state"] == state)
        return self.source.status()
