"""One process that hosts an engine, as the daemon sees it: start it, speak, hear, notice its end, leave nothing behind.

One thread starts it, hears it and ends it (the kernel ends the child when that very thread goes); any thread may speak.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from edged.engines.base import EngineError
from edged.engines.frames import ANSWER_BYTES_MAX, Frame, Unpacker, pack

CHUNK_BYTES = 1 << 16
LAST_READS_MAX = 4  # of what it wrote before its end: a pipe holds no more
LINE_CHARS_MAX = 500  # of a line that it logs; the rest is left out
_PING = pack({"do": "ping"})


class ChildGone(Exception):
    """The process has closed its end, or was asked to."""


class Child:
    """A running engine process. `log` is called with every line that it writes to its standard output or error."""

    def __init__(self, module: str, title: str, send_s_max: float, log: Callable[[str], None]) -> None:
        """Start `python -m module`, with `title` for whoever looks at the list of processes.

        A message that it does not take within `send_s_max` seconds counts as its end. Raises EngineError when the system
        has no room for another process.
        """
        self._log, self._last, self._line = log, "", b""
        self.silent_s = -math.inf  # seconds since it spoke last; a process that still starts may take its time
        self._unpacker = Unpacker(ANSWER_BYTES_MAX)
        self._sending = threading.Lock()
        self._ending = threading.Lock()
        with ExitStack() as undo:
            try:
                self._socket, theirs = socket.socketpair()
                undo.enter_context(self._socket)
                with theirs:
                    self._process = _start(module, title, theirs.fileno())
            except OSError as error:
                raise EngineError(f"no process for the engine: {error.strerror}") from None
            undo.pop_all()
        self._socket.settimeout(send_s_max)
        assert self._process.stdout is not None
        self._output = self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._selector = selectors.PollSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._output, selectors.EVENT_READ)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def send(self, data: bytes) -> None:
        """Send a packed frame; when that fails the child is as good as gone, and `hear` will say so."""
        with self._sending:
            try:
                self._socket.sendall(data)
            except OSError:
                self.hang_up()  # perhaps in the middle of a frame: nothing more can be said

    def hear(self, seconds: float) -> list[Frame]:
        """What it says next, or nothing when it stays silent for `seconds`: then it is asked for a sign of life.

        Raises ChildGone or BadFrame.
        """
        started = time.monotonic()
        frames = self._wait(started + seconds)
        if frames:
            self.silent_s = 0.0
        else:
            # Counted in waits of our own, not on the clock: a machine that was asleep finds its engines well.
            self.silent_s += min(time.monotonic() - started, seconds)
            self._ping()
        return frames

    def _wait(self, deadline: float) -> list[Frame]:
        while True:
            ready = {key.fileobj for key, _ in self._selector.select(max(0.0, deadline - time.monotonic()))}
            if self._output in ready and not self._read_output():
                self._selector.unregister(self._output)
            if self._socket in ready:
                frames = self._unpacker.feed(self._receive())
                if frames:
                    return frames
            if time.monotonic() >= deadline:
                return []

    def hang_up(self) -> None:
        """Close the conversation: the child ends, and `hear` raises ChildGone. May be repeated, from any thread."""
        with self._ending, suppress(OSError):  # when either end is closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self, grace_s: float) -> str:
        """Give it `grace_s` to go by itself, kill it, free everything; says how it ended and its last words."""
        self.hang_up()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for _ in range(LAST_READS_MAX):
            if not self._read_output():
                break
        self._finish_line()
        self._selector.close()
        self._output.close()
        with self._sending, self._ending:
            self._socket.close()
        return how_it_ended(self._process.returncode, self._last)

    def _ping(self) -> None:
        """Never waits: who takes no more bytes stays silent, and that is what counts."""
        if self._sending.acquire(blocking=False):
            try:
                os.write(self._socket.fileno(), _PING)  # past `sendall`, which would wait for room
            except OSError:
                pass
            finally:
                self._sending.release()

    def _receive(self) -> bytes:
        try:
            data = self._socket.recv(CHUNK_BYTES)
        except OSError:
            data = b""
        if not data:
            raise ChildGone
        return data

    def _read_output(self) -> bool:
        """Log some of what it wrote; false when there is nothing."""
        try:
            data = os.read(self._output.fileno(), CHUNK_BYTES)
        except BlockingIOError:
            return False
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._say(line)
        if len(self._line) > CHUNK_BYTES:
            self._finish_line()
        return bool(data)

    def _finish_line(self) -> None:
        self._say(self._line)
        self._line = b""

    def _say(self, line: bytes) -> None:
        text = line.decode(errors="replace").strip()[:LINE_CHARS_MAX]
        if text:
            self._last = text
            self._log(text)


def _start(module: str, title: str, descriptor: int) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C is for the daemon, which still has requests to finish on this engine.
    return subprocess.Popen(
        [sys.executable, "-m", module, str(descriptor), str(os.getpid()), title],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        pass_fds=(descriptor,), start_new_session=True,
    )  # fmt: skip


def how_it_ended(status: int, last: str) -> str:
    """A process's end in words: exit status or signal (negative `status`), and the last line that it wrote."""
    if status < 0:
        try:
            how = f"was ended by {signal.Signals(-status).name}"
        except ValueError:
            how = f"was ended by signal {-status}"
        if -status == signal.SIGKILL:
            how += " (the kernel does that when memory runs out)"
    else:
        how = f"ended with status {status}"
    return f"{how}; its last words: {last}" if last else how
