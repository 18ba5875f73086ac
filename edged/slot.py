"""A slot holds one live model and changes it without losing an item.

A candidate is loaded beside the live one, must answer its golden set, and becomes live by one assignment. Workers hold the
live model by a refcounted lease; the old one unloads when its last lease ends.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from edged import golden
from edged.engines.base import Detector, EngineError, EngineOptions, Generator, Unsuitable, open_engine
from edged.engines.host import ProcessGenerator
from edged.wire.manifest import ReleaseManifest, ReleaseRef

log = logging.getLogger(__name__)


class SlotStopped(Exception):
    """The daemon is shutting down: the item in hand is not lost, its source still has it."""


class WrongKind(Unsuitable):
    """The item is not for this kind of model."""


@dataclass(slots=True)
class Loaded:
    """A release in memory. `use` serialises the engine: one caller at a time, and an adapter changes only between calls."""

    ref: ReleaseRef
    manifest: ReleaseManifest
    engine: Detector | Generator
    adapter: ReleaseRef | None = None
    use: threading.Lock = field(default_factory=threading.Lock)
    leases: int = 0
    retired: bool = False
    # Decided once: looking for every method of a protocol takes a tenth of a millisecond, and this is asked for each item.
    _detects: bool = field(init=False)

    def __post_init__(self) -> None:
        self._detects = isinstance(self.engine, Detector)

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
    if manifest.kind == "llm" and isolation != "daemon":
        engine = ProcessGenerator(folder, manifest, options, ended)
    else:
        engine = open_engine(folder, manifest, options)
    try:
        golden.check(engine, folder, manifest, golden_max)
    except BaseException:
        engine.close()
        raise
    return Loaded(ref, manifest, engine)


class Slot:
    """One live model and the law of changing it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._live: Loaded | None = None
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
    def lease(self, timeout_s: float | None = None) -> Iterator[Loaded]:
        """The live model, kept in memory until the block ends; waits for the first one.

        Raises SlotStopped on shutdown and EngineError when none came within `timeout_s`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._live is not None or self._stopped, timeout_s):
                raise EngineError(f"slot {self.name}: no model is loaded yet")
            live = self._live
            if self._stopped or live is None:
                raise SlotStopped(self.name)
            live.leases += 1
        try:
            yield live
        finally:
            with self._changed:
                live.leases -= 1
                unload = live.retired and live.leases == 0
                self._changed.notify_all()
            if unload:
                self._unload(live)

    def flip(self, candidate: Loaded, drain_s_max: float = 60.0) -> float:
        """Make `candidate` live; returns the milliseconds from the assignment until the old model was out of use.

        Items that hold a lease on the old one finish on it; every later item gets the new one.
        """
        started = time.monotonic()
        with self._changed:
            old, self._live = self._live, candidate
            if old is not None:
                old.retired = True
            unload = old is not None and old.leases == 0
            self._changed.notify_all()
            if old is not None and not unload:
                self._changed.wait_for(lambda: old.leases == 0, drain_s_max)
        if old is not None and unload:
            self._unload(old)
        return (time.monotonic() - started) * 1000

    def attach(self, adapter: ReleaseRef | None, path: Path | None) -> float:
        """Put a LoRA adapter on the live generator (None: take it off); returns the milliseconds it took.

        A generation under way finishes on what it began with. Raises EngineError.
        """
        with self.lease(timeout_s=0) as live:
            generator = live.generator
            with live.use:
                started = time.monotonic()
                generator.attach(path)
                live.adapter = adapter
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
        loaded.engine.close()
        trim_memory()
        log.info("slot %s: unloaded %s", self.name, loaded.ref.release)


def trim_memory() -> None:
    """Give freed memory back to the system: onnxruntime keeps it otherwise (50 swaps: 93 MB instead of 182)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        log.debug("no malloc_trim here: memory of unloaded models stays with the allocator")
