"""One connection to a live stream, in a thread of its own: a library that hangs costs this thread and nothing else."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from typing import Protocol

from edged.clock import Clock
from edged.core.redact import redact
from edged.engines.base import Image

log = logging.getLogger(__name__)


class StreamLost(Exception):
    """The stream cannot be opened or has failed; the message says why and what to do. It is tried again."""


class StreamEnded(Exception):
    """The stream has come to its end, as it should: it is not opened again."""


class CorruptFrame(Exception):
    """What came is no whole frame; the next one may be."""


class LateFrame(Exception):
    """A frame came so late that it is not even decoded: newer ones wait already."""


class Stream(Protocol):
    """An open stream, used by one thread."""

    about: str  # what came, for the log: size, rate, codec

    def grab(self) -> bool:
        """Wait for the next frame; false: something came that is none. Raises any of the four above."""
        ...

    def retrieve(self) -> Image:
        """The grabbed frame's (height, width, 3) uint8 BGR pixels; raises CorruptFrame, StreamLost."""
        ...

    def close(self) -> None: ...


# Opens a stream or raises StreamLost. The event is set when nobody wants the stream any more.
Opener = Callable[[threading.Event], Stream]


class Taker(Protocol):
    """Whoever gets the frames."""

    def take(self, retrieve: Callable[[], Image]) -> None: ...

    def skip(self) -> None: ...

    def corrupt(self) -> None: ...

    def fault(self) -> None: ...


class Connection:
    """One attempt at a stream, from opening it to closing it, in a thread of its own."""

    def __init__(self, name: str, opener: Opener, taker: Taker, clock: Clock) -> None:
        self._name, self._open, self._taker, self._clock = name, opener, taker, clock
        self.gone = threading.Event()  # the thread has come to its end
        self.dropped = threading.Event()  # nobody wants its frames any more
        self.frames = 0
        self.began = self.last = clock.monotonic()  # `last`: when the last frame came
        self.about, self.why, self.ended = "", "", False
        self._thread = threading.Thread(target=self._run, name=f"stream-{name}", daemon=True)

    def start(self) -> None:
        """Begin to open the stream."""
        self._thread.start()

    def running(self) -> bool:
        """Whether the thread is still somewhere in the library."""
        return self._thread.is_alive()

    def end(self, timeout_s: float) -> bool:
        """Ask the thread to end; false when it has not within `timeout_s`."""
        self.dropped.set()
        return self.gone.wait(timeout_s)

    def flowed_s(self) -> float:
        """From its first frame to its last."""
        return self.last - self.began if self.frames else 0.0

    def _run(self) -> None:
        stream: Stream | None = None
        try:
            stream = self._open(self.dropped)
            self.about = stream.about
            self._read(stream)
        except StreamEnded:
            self.ended = True
        except StreamLost as error:
            self.why = redact(str(error))
        except Exception as error:  # counted, said, and the stream is opened anew
            log.error("%s: %s", self._name, redact(traceback.format_exc()))
            self._taker.fault()
            self.why = redact(f"{type(error).__name__}: {error}")
        finally:
            try:
                if stream is not None:
                    stream.close()
            except Exception as error:
                log.warning("%s: closing: %s", self._name, redact(str(error)))
            self.gone.set()

    def _read(self, stream: Stream) -> None:
        while not self.dropped.is_set():
            try:
                grabbed, late = stream.grab(), False
            except LateFrame:
                grabbed, late = True, True
            except CorruptFrame:
                self._taker.corrupt()
                continue
            if not grabbed or self.dropped.is_set():
                continue
            self.last = self._clock.monotonic()
            if not self.frames:
                self.began = self.last
            self.frames += 1
            if late:
                self._taker.skip()
            else:
                self._taker.take(stream.retrieve)
