"""A generator whose engine lives in a process of its own: when that dies, the daemon and its other models do not.

One supervising thread starts the process, hears it, watches that it is alive, and starts it again when it has ended. The
request in hand then fails with an EngineError that says how it ended; the next one waits for the new process.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edged.engines.base import EngineError, EngineOptions, Finished, GenerateRequest, PromptTooLong, Token
from edged.engines.child import Child, ChildGone
from edged.engines.frames import (
    START,
    Accepted,
    Answer,
    BadFrame,
    Frame,
    FrameTooLarge,
    answer_of,
    pack,
    request_fields,
)
from edged.wire.manifest import ReleaseManifest

log = logging.getLogger(__name__)

MODULE = "edged.engines.served"
HALT_POLL_S = 0.05  # how soon a request that has to wait notices its `halt`


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the daemon waits for an engine's process, in seconds."""

    load_s_max: float = 600.0  # for the release to load, and for an adapter: gigabytes from an SD card
    ping_s: float = 2.0  # a sign of life is asked for after this much silence
    answer_s_max: float = 20.0  # a process that is silent for longer is stuck: even a busy one answers pings
    halt_s_max: float = 60.0  # from a halted request to its end: one step of a large model on a slow board
    close_s_max: float = 3.0  # to end by itself
    restart_s_max: float = 30.0  # a request waits this long for the process to come back
    backoff_s: float = 0.5  # before the first new start, then twice as long each time
    backoff_s_max: float = 60.0
    steady_s: float = 60.0  # after serving this long, the next end is a first one again


class Backoff:
    """How long to wait before the process is started again."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._next_s = patience.backoff_s

    def after(self, served_s: float) -> float:
        """Seconds to wait after a process that has ended and had served requests for `served_s`."""
        if served_s >= self._patience.steady_s:
            self._next_s = self._patience.backoff_s
        delay = self._next_s
        self._next_s = min(delay * 2, self._patience.backoff_s_max)
        return delay


class EngineEnded(EngineError):
    """The engine's process has ended with this request in hand."""


class _Condemned(Exception):
    """The process must be killed; the message says what it did."""


@dataclass(slots=True, eq=False)
class _Call:
    """A request in the process's hands. Its answers, one for each token, are no more than the context has tokens."""

    order: Frame
    what: str  # the process did when it is not done in time
    ends_by: float = math.inf  # monotonic; past it the process counts as stuck
    halted: str = ""
    answers: queue.SimpleQueue[Answer] = field(default_factory=queue.SimpleQueue)


def _never() -> str:
    return ""


class ProcessGenerator:
    """A release's engine in a child process, as a `Generator`. One worker thread at a time, which may differ."""

    def __init__(
        self, folder: Path, manifest: ReleaseManifest, options: EngineOptions,
        ended: Callable[[str, bool], None] = lambda text, in_hand: None, patience: Patience = Patience(),
    ) -> None:  # fmt: skip
        """Load the release in `folder`; raises EngineError with the engine's own reason.

        `ended` is told (how, whether a request was in hand) each time that the process ends without having been asked.
        """
        self.context = 0
        self._release, self._ended, self._patience = manifest.release, ended, patience
        self._load = pack(
            {
                "do": "load",
                "id": START,
                "folder": str(folder.absolute()),
                "manifest": manifest.model_dump(mode="json"),
                "options": asdict(options),
            }
        )
        self._changed = threading.Condition()
        self._child: Child | None = None
        self._ready = False  # the child takes requests
        self._call: _Call | None = None
        self._number = START
        self._attached: Frame | None = None  # the order that gave it the adapter which every new process gets too
        self._failure, self._retry_at = "", 0.0
        self._closing = False
        # The first process too is started by this thread: the kernel ends a child together with the thread that made it.
        self._thread = threading.Thread(target=self._supervise, name=f"engine-{manifest.release}", daemon=True)
        self._thread.start()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._failure)
                failure = self._failure
            if failure:
                raise EngineError(failure)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """The process that serves now; None while there is none."""
        with self._changed:
            return self._child.pid if self._child is not None and self._ready else None

    def generate(self, request: GenerateRequest) -> Iterator[Token | Finished]:
        """As every generator does; a closed iterator cancels. Waits for a process that is being started again.

        Raises PromptTooLong or EngineError at the call as the engine does, and EngineError during the answer when the
        process ends.
        """
        call = self._begin({"do": "generate", "request": request_fields(request)}, request.halt)
        if isinstance(call, Finished):
            return iter((call,))
        try:
            self._next(call, request.halt)  # the engine has taken it
        except BaseException:
            self._stop_call(call, "cancelled")
            raise
        return self._answer(call, request.halt)

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None:
        """Use this LoRA adapter from the next request on, in every process to come as well; raises EngineError."""
        order = {"do": "attach", "adapter": None if adapter is None else str(adapter.absolute()), "scale": scale}
        call = self._begin(order, _never, self._patience.load_s_max)
        assert isinstance(call, _Call)
        self._next(call, _never)

    def close(self) -> None:
        """End the process and free everything that it had. May be repeated; a request in hand fails."""
        with self._changed:
            self._closing = True
            child = self._child
            self._changed.notify_all()
        if child is not None:
            child.hang_up()
        self._thread.join()

    # The caller's side.

    def _begin(self, order: Frame, halt: Callable[[], str], limit_s: float = math.inf) -> _Call | Finished:
        """Hand `order` to the process once that is free; Finished when `halt` comes first. Raises EngineError."""
        give_up = time.monotonic() + self._patience.restart_s_max
        with self._changed:
            forgotten = self._call
            self._number += 1
            call = _Call(order | {"id": self._number}, f"did not do what it was asked within {limit_s:g} s")
        try:
            data = pack(call.order)
        except FrameTooLarge as error:
            raise PromptTooLong(f"{self._release}: the request is too long: {error}") from None
        if forgotten is not None:  # its iterator was dropped
            self._stop_call(forgotten, "cancelled")
        while True:
            with self._changed:
                child = self._claim(call, limit_s)
                if child is None:
                    self._check_wait(give_up)
                    self._changed.wait(HALT_POLL_S)
            if child is not None:
                child.send(data)
                return call
            reason = halt()
            if reason:
                return Finished(reason, prompt_tokens=0, answer_tokens=0, mean_logprob=0.0)

    def _claim(self, call: _Call, limit_s: float) -> Child | None:
        """The process, when it is free, now in use for `call`; raises EngineError when the engine is closed."""
        if self._closing:
            raise EngineError(f"{self._release}: the engine is closed")
        if not self._ready or self._call is not None:
            return None
        self._call, call.ends_by = call, time.monotonic() + limit_s
        return self._child

    def _check_wait(self, give_up: float) -> None:
        """Raise EngineError when there is no process, and there will be none before `give_up`."""
        now = time.monotonic()
        if not self._ready and (now > give_up or self._retry_at > give_up):
            wait_s = self._retry_at - now
            when = f"is started again in {wait_s:.1f} s" if wait_s > 0 else "is being started again"
            raise EngineError(f"{self._failure or f'{self._release}: no process'}; the engine {when}")

    def _next(self, call: _Call, halt: Callable[[], str]) -> Token | Finished | Accepted:
        """What comes next for `call`, or raises it; passes on what `halt` says meanwhile."""
        while True:
            try:
                answer = call.answers.get(timeout=HALT_POLL_S)
            except queue.Empty:
                answer = None
            reason = "" if call.halted else halt()
            if reason:
                self._stop_call(call, reason)
            if isinstance(answer, EngineError):
                raise answer
            if answer is not None:
                return answer

    def _answer(self, call: _Call, halt: Callable[[], str]) -> Iterator[Token | Finished]:
        try:
            while True:
                event = self._next(call, halt)
                if not isinstance(event, Accepted):
                    yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._stop_call(call, "cancelled")

    def _stop_call(self, call: _Call, reason: str) -> None:
        """Tell the engine to end `call`; nothing to do when it has ended. If it goes on, the supervisor kills it."""
        limit_s = self._patience.halt_s_max
        with self._changed:
            child = self._child
            if self._call is not call or call.halted or child is None:
                return
            call.halted = reason
            call.ends_by = min(call.ends_by, time.monotonic() + limit_s)
            call.what = f"did not end within {limit_s:g} s of a request that was halted ({reason})"
        child.send(pack({"do": "halt", "id": call.order["id"], "reason": reason}))

    # The supervisor's side.

    def _supervise(self) -> None:
        backoff = Backoff(self._patience)
        while True:
            failure, served_s = self._one_process()
            delay = backoff.after(served_s)
            with self._changed:
                call, self._call = self._call, None
                self._child, self._ready, self._failure = None, False, failure
                self._retry_at = time.monotonic() + delay
                self._changed.notify_all()
                over = self._closing or not self.context  # whoever loads it decides about a first start that failed
            if call is not None:
                closed = EngineError(f"{self._release}: the engine is closed")
                call.answers.put(closed if over else EngineEnded(failure))
            if over:
                return
            log.warning("%s; it is started again in %.1f s", failure, delay)
            try:
                self._ended(failure, call is not None)
            except Exception:  # it is told, it has no say
                log.exception("%s", self._release)
            with self._changed:
                if self._changed.wait_for(lambda: self._closing, delay):
                    return

    def _one_process(self) -> tuple[str, float]:
        """Start the process and serve until it has ended: how, and for how long (seconds) it took requests."""
        grace_s, why, served_from = 0.0, "", math.inf
        try:
            child = Child(MODULE, self._release, self._patience.answer_s_max, self._log)
        except EngineError as error:
            return f"{self._release}: {error}", 0.0
        try:
            self._start(child)
            served_from = time.monotonic()
            self._hear(child, math.inf)
        except ChildGone:
            grace_s = self._patience.close_s_max
        except EngineError as error:  # of the engine itself, which names the release or the file
            return str(error), 0.0
        except BadFrame as error:
            why = f"is damaged: it sent {error}"
        except _Condemned as error:
            why = str(error)
        except Exception as error:  # a bug of ours must not leave requests waiting for ever
            log.exception("%s", self._release)
            why = f"met a fault of the daemon: {type(error).__name__}: {error}"
        finally:
            with self._changed:
                self._ready = False  # takes nothing more
            how = child.end(grace_s)
        how = f"{why}, and was killed" if why else how
        return f"{self._release}: the engine's process {how}", max(0.0, time.monotonic() - served_from)

    def _start(self, child: Child) -> None:
        """Load the release, and the adapter that it had; then the process takes requests. Raises EngineError."""
        with self._changed:
            self._child = child
            if self._closing:
                raise ChildGone
        child.send(self._load)
        start_by = time.monotonic() + self._patience.load_s_max
        loaded = self._hear(child, start_by)
        if self._attached is not None:
            child.send(pack(self._attached | {"id": START}))
            self._hear(child, start_by)
        with self._changed:
            try:
                self.context = int(loaded["context"])
            except (KeyError, TypeError, ValueError):
                raise BadFrame(f"no size of its context: {str(loaded)[:80]}") from None
            self._ready, self._failure = True, ""
            self._changed.notify_all()
        log.info("%s: the engine's process %d serves", self._release, child.pid)

    def _hear(self, child: Child, start_by: float) -> Frame:
        """Pass on what the process says, until it has answered what START asked; raises what ends it."""
        while True:
            for frame in child.hear(self._patience.ping_s):
                if frame.get("id") == START and start_by < math.inf:
                    return _started(frame)
                if frame.get("say") != "pong":
                    self._pass_on(frame)
            if child.silent_s > self._patience.answer_s_max:
                raise _Condemned(f"did not answer for {child.silent_s:.0f} s")
            now = time.monotonic()
            if now > start_by:
                raise _Condemned(f"did not load within {self._patience.load_s_max:g} s")
            call = self._call
            if call is not None and now > call.ends_by:
                raise _Condemned(call.what)

    def _pass_on(self, frame: Frame) -> None:
        number, answer = answer_of(frame)
        with self._changed:
            call = self._call
            if call is None or call.order["id"] != number:
                raise BadFrame(f"an answer to request {number}, which is not in hand")
            if call.answers.qsize() > self.context:
                raise BadFrame(f"more than {self.context} tokens, the size of its context")
            done = isinstance(answer, Accepted) and call.order["do"] == "attach"
            if done:
                self._attached = call.order
            if done or isinstance(answer, Finished | EngineError):
                self._call = None
                self._changed.notify_all()
        call.answers.put(answer)

    def _log(self, line: str) -> None:
        log.info("%s: the engine's process: %s", self._release, line)


def _started(frame: Frame) -> Frame:
    """The answer to the start; raises EngineError when it is an error."""
    if frame.get("say") == "loaded":
        return frame
    _, answer = answer_of(frame)
    if isinstance(answer, EngineError):
        raise answer
    return frame
