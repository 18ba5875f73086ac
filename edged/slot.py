"""A slot holds one live model and changes it without losing an item.

A candidate is loaded beside the live one, must answer its golden set, and becomes live by one assignment. Workers hold the
live model by a refcounted lease; the old one unloads when its last lease ends. Where there is no room for two the slot is
vacated first: whoever wants a lease then waits until a model is live again.
"""

from __future__ import annotations

import ctypes
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from edged import golden
from edged.core.confidence import check_calibration
from edged.engines.base import ELSEWHERE, Detector, EngineError, EngineOptions, Generator, Unsuitable, open_engine
from edged.engines.host import ProcessGenerator
from edged.turns import POLL_S, Halt, Halted, Turns, Unlimited, never
from edged.wire.manifest import Calibration, ReleaseManifest, ReleaseRef

log = logging.getLogger(__name__)

BEAT_S = 1.0  # between two signs of life of who waits for a model
CLOSED_S = 1.0  # how long nobody is let in at first, for the leases to end
OPEN_S = 0.05  # how long those who wait are let in again, when they did not


class SlotStopped(Exception):
    """The daemon is shutting down: the item in hand is not lost, its source still has it."""


class WrongKind(Unsuitable):
    """The item is not for this kind of model."""


@dataclass(slots=True)
class Loaded:
    """A release in memory. `use` serialises the engine: one caller at a time, first come first served, and an adapter
    changes only between calls. Where another machine runs the model there is nothing to serialise."""

    ref: ReleaseRef
    manifest: ReleaseManifest
    engine: Detector | Generator
    adapter: ReleaseRef | None = None
    adapter_calibration: Calibration = field(default_factory=Calibration)
    use: Turns = field(default_factory=Turns)
    leases: int = 0
    retired: bool = False
    awaited: bool = (
        False  # somebody waits for the last lease to end and unloads it then: whoever answers has no time for it
    )
    # Decided once: looking for every method of a protocol takes a tenth of a millisecond, and this is asked for each item.
    _detects: bool = field(init=False)

    def __post_init__(self) -> None:
        self._detects = isinstance(self.engine, Detector)

    @property
    def here(self) -> bool:
        """Whether this process runs the model, and would end with it."""
        return not isinstance(self.engine, ProcessGenerator) and self.manifest.engine not in ELSEWHERE

    @property
    def calibration(self) -> Calibration:
        """How sure what serves may be: what was fitted on the bare base says nothing about its answers with an adapter."""
        return self.manifest.calibration if self.adapter is None else self.adapter_calibration

    @property
    def detector(self) -> Detector:
        """The engine as a detector; raises WrongKind when the release is of another kind."""
        if not self._detects:
            raise WrongKind(f"release {self.ref.release} is no detector (kind {self.manifest.kind})")
        return cast(Detector, self.engine)

    @property
    def generator(self) -> Generator:
        """The engine as a generator; raises WrongKind when the release is of another kind."""
        if not isinstance(self.engine, Generator):
            raise WrongKind(f"release {self.ref.release} is no generator (kind {self.manifest.kind})")
        return self.engine


def load(
    ref: ReleaseRef, folder: Path, manifest: ReleaseManifest, options: EngineOptions, isolation: str | None = None,
    ended: Callable[[str, bool], None] = lambda how, in_hand: None, golden_max: int | None = None,
) -> Loaded:  # fmt: skip
    """Load a release and let it answer its golden set (at most `golden_max` inputs of it); raises EngineError, and then
    nothing stays in memory.

    `isolation` is the slot's setting. `ended` is told (how, whether a request was in hand) when the process of an engine
    that has one ends without having been asked.
    """
    if isolation == "process" and manifest.kind != "llm":
        raise EngineError(
            f"release {manifest.release} is of kind {manifest.kind}, and only language models run in a process of their "
            'own: take isolation = "process" out of this slot'
        )
    engine: Detector | Generator
    if manifest.kind == "llm" and isolation != "daemon" and manifest.engine not in ELSEWHERE:
        engine = ProcessGenerator(folder, manifest, options, ended)
    else:
        engine = open_engine(folder, manifest, options)
    try:
        golden.check(engine, folder, manifest, golden_max)
    except BaseException:
        engine.close()
        raise
    if manifest.engine in ELSEWHERE:
        return Loaded(ref, manifest, engine, use=Unlimited())
    return Loaded(ref, manifest, engine)


class InUse(EngineError):
    """The live model cannot leave: somebody works with it all the time."""


class Slot:
    """One live model and the law of changing it."""

    def __init__(self, name: str, beat: Callable[[], None] = lambda: None) -> None:
        """`beat` is called now and then by a thread that waits for a lease: it stands still, but does not hang."""
        self.name, self._beat = name, beat
        self._live: Loaded | None = None
        self._vacated_at: float | None = None  # monotonic: since when there is no model because another one is to come
        self._stopped = False
        self._changed = threading.Condition()

    @property
    def live(self) -> Loaded | None:
        """What serves now. Only to look at: use `lease` to work with it."""
        return self._live

    def wait(self, timeout_s: float) -> bool:
        """Wait until there is a model, or none will come because of a shutdown; false when neither is so in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._live is not None or self._stopped, timeout_s)

    @contextmanager
    def lease(self, timeout_s: float | None = None, halt: Halt = never) -> Iterator[Loaded]:
        """The live model, kept in memory until the block ends; waits for the first one, and while the slot is vacated.

        Raises SlotStopped on shutdown and EngineError when none came within `timeout_s`, not counting a time in which one
        was known to come; with 0 it never waits. Raises Halted when `halt` has a reason not to wait any more.
        """
        give_up = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._live is None and not self._stopped:
                left = give_up - time.monotonic()
                if left <= 0 and (self._vacated_at is None or timeout_s == 0):
                    raise EngineError(f"slot {self.name}: no model is loaded yet")
                if reason := halt():
                    raise Halted(reason)
                beat_s = BEAT_S if halt is never else POLL_S
                self._changed.wait(min(beat_s, left) if left > 0 else beat_s)
                self._beat()
            live = self._live
            if self._stopped or live is None:
                raise SlotStopped(self.name)
            live.leases += 1
        try:
            yield live
        finally:
            with self._changed:
                live.leases -= 1
                unload = live.retired and live.leases == 0 and not live.awaited
                self._changed.notify_all()
            if unload:
                self._unload(live)

    def flip(self, candidate: Loaded, drain_s_max: float = 60.0) -> float:
        """Make `candidate` live; returns the milliseconds from the assignment until the old model was out of use, or, when
        the slot was vacated, for which it had no model.

        Items that hold a lease on the old one finish on it; every later item gets the new one. What freeing the old one's
        memory takes is nobody's wait, and not in the figure. Raises SlotStopped when the slot was stopped meanwhile; nothing
        stays in memory then.
        """
        started = time.monotonic()
        with self._changed:
            if self._stopped:
                candidate.engine.close()
                raise SlotStopped(self.name)
            old, self._live = self._live, candidate
            if self._vacated_at is not None:
                started, self._vacated_at = self._vacated_at, None
            unload = False
            if old is not None:
                old.retired = old.awaited = True
                self._changed.notify_all()
                unload = self._changed.wait_for(lambda: old.leases == 0, drain_s_max)
                old.awaited = False
            else:
                self._changed.notify_all()
        took_ms = (time.monotonic() - started) * 1000
        if old is not None and unload:
            self._unload(old)
        return took_ms

    @property
    def vacated(self) -> bool:
        """Whether the live model has left because another one is to come."""
        return self._vacated_at is not None

    def vacate(self, drain_s_max: float = math.inf) -> None:
        """Unload the live model when its last lease ends. From then on whoever wants a lease waits for `flip`, or until
        `give_up` says that there will be none.

        Raises InUse when the leases do not end within `drain_s_max`: then the model stays. Raises SlotStopped.
        """
        deadline, closed_s = time.monotonic() + drain_s_max, CLOSED_S
        with self._changed:
            old, self._live = self._live, None
            self._vacated_at = self._vacated_at or time.monotonic()
            while old is not None and not self._changed.wait_for(
                lambda: not old.leases or self._stopped, min(closed_s, max(OPEN_S, deadline - time.monotonic()))
            ):
                # Somebody works for long, or waits for somebody who waits here (a preparer hands its image to a worker
                # that has none yet). Letting them in for a moment helps the second, more patience the first.
                self._live = old
                self._changed.notify_all()
                if time.monotonic() > deadline:
                    self._vacated_at = None
                    raise InUse(f"slot {self.name}: {old.ref.release} was in use all the time for {drain_s_max:.0f} s")
                self._changed.wait(OPEN_S)
                closed_s *= 2
                if self._stopped:  # `stop` has seen to the model
                    raise SlotStopped(self.name)
                self._live, self._vacated_at = None, time.monotonic()
            if old is not None:
                old.retired = True  # on a shutdown there may be leases still
            unload = old is not None and not old.leases
        if old is not None and unload:
            self._unload(old)
        if self._stopped:
            raise SlotStopped(self.name)

    def give_up(self) -> None:
        """No model will come after all: who waits with a time limit is told so when that has passed."""
        with self._changed:
            self._vacated_at = None
            self._changed.notify_all()

    def attach(self, adapter: ReleaseRef | None, path: Path | None, calibration: Calibration | None = None) -> float:
        """Put a LoRA adapter on the live generator (None: take it off); returns the milliseconds it took.

        `calibration` is the adapter's own; without it its answers count as uncalibrated. A generation under way finishes on
        what it began with. Raises EngineError, also for a calibration that this device cannot apply.
        """
        fitted = calibration or Calibration()
        try:
            check_calibration(fitted)
        except ValueError as error:
            raise EngineError(f"adapter {adapter.release if adapter else ''}: {error}") from None
        with self.lease(timeout_s=0) as live:
            generator = live.generator
            with live.use:
                started = time.monotonic()
                generator.attach(path)
                live.adapter, live.adapter_calibration = adapter, fitted
                return (time.monotonic() - started) * 1000

    def stop(self) -> None:
        """Wake whoever waits for a model and unload it once nobody uses it."""
        with self._changed:
            self._stopped = True
            live, self._live = self._live, None
            if live is not None:
                live.retired = True
            unload = live is not None and live.leases == 0
            self._changed.notify_all()
        if live is not None and unload:
            self._unload(live)

    def _unload(self, loaded: Loaded) -> None:
        started = time.monotonic()
        loaded.engine.close()
        trim_memory()
        took_ms = (time.monotonic() - started) * 1000
        log.info("slot %s: unloaded %s in %.1f ms", self.name, loaded.ref.release, took_ms)


def trim_memory() -> None:
    """Give freed memory back to the system: onnxruntime keeps it otherwise (50 swaps: 93 MB instead of 182)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        log.debug("no malloc_trim here: memory of unloaded models stays with the allocator")
