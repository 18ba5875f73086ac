"""Keeps the store within its limits while the daemon runs, and tells people what becomes of it: full, free again, damaged.

Law: a change is said once, in the order in which it came, and said again at the next tick until the outbox has taken it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from edged.clock import Clock
from edged.core.health import Problem
from edged.store import StoreError
from edged.store.integrity import Opened, set_asides

log = logging.getLogger(__name__)

UNSAID_MAX = 16  # events that wait for room in the outbox; then the oldest is given up


class StorageWatch:
    """Ticked by the control loop."""

    def __init__(self, opened: Opened, clock: Clock, say: Callable[..., None]) -> None:
        """`say` puts an event into the outbox, or raises StoreError."""
        self._store, self._clock, self._say = opened.store, clock, say
        self._was_full = self._was_broken = self._waiting = False
        self._figures: dict[str, Any] = {
            "samples": {},
            "outbox": {"messages": 0, "bytes": 0},
            "counters": {},
            "storage": {},
        }
        self._unsaid: deque[tuple[str, str, dict[str, Any]]] = deque(maxlen=UNSAID_MAX)
        if opened.broken is not None:
            log.error("%s", opened.broken.describe())
            self._unsaid.append(
                (
                    "store_broken",
                    opened.broken.describe(),
                    {"database": str(opened.broken.database), "blobs": str(opened.broken.blobs)},
                )
            )

    def tick(self) -> None:
        """Give up what is over its limits, a bounded number, and say what has changed."""
        self._look()  # before there may be room again: what was full for a moment is told too
        try:
            self._store.tend(self._clock.now(), self._clock.monotonic())
        finally:
            self._look()
            self._tell()

    def _look(self) -> None:
        if bool(self._store.full) is not self._was_full:
            self._was_full = bool(self._store.full)
            self._changed()
        if self._store.broken and not self._was_broken:
            self._was_broken = True
            self._store.suspect()
            log.critical("the store is damaged: %s", self._store.broken)
            self._unsaid.append(("store_damaged", f"{self._store.broken}: the next start sets the database aside", {}))

    def _tell(self) -> None:
        while self._unsaid:
            kind, text, detail = self._unsaid[0]
            try:
                self._say(kind, text, **detail)
            except StoreError as error:
                if not self._waiting:
                    log.warning("event %s waits: %s", kind, error)
                self._waiting = True
                return
            self._waiting = False
            self._unsaid.popleft()

    def _changed(self) -> None:
        if self._was_full:
            self._store.count("storage_full")
            text = f"no samples are captured: {self._store.full}. Items are answered as before"
            log.error("storage full: %s", text)
            self._unsaid.append(("storage_full", text, self.status()))
        else:
            log.warning("storage: there is room again, samples are captured")
            self._unsaid.append(("storage_free", "there is room again: samples are captured", self.status()))

    def figures(self) -> dict[str, Any]:
        """What the store holds, for `edged status`; what a damaged one no longer tells, as it was last."""
        for name, ask in (
            ("samples", self._store.counts),
            ("outbox", lambda: dict(zip(("messages", "bytes"), self._store.depth(), strict=True))),
            ("counters", self._store.counters),
            ("storage", self.status),
        ):
            try:
                self._figures[name] = ask()
            except StoreError as error:
                log.debug("%s: %s", name, error)
        return {**self._figures, "storage": {**self._figures["storage"], "broken": self._store.broken}}

    def status(self) -> dict[str, Any]:
        """What `edged status` shows: bytes, limits, whether it is full and why, what was set aside."""
        found = asdict(self._store.storage())
        reason = found.pop("full")
        aside = [path.name for path in set_asides(self._store.folder)]
        return {**found, "full": bool(reason), "reason": reason, "set_aside": aside}

    def problems(self) -> Iterator[Problem]:
        """What a person should look at."""
        if self._store.broken:
            fix = "restart edged: it sets the database aside; then `edged samples recover`"
            yield Problem("store", f"the database is damaged: {self._store.broken}", fix, fatal=True)
        elif self._store.full:
            fix = "let the trainer use samples, raise blob_bytes_max in [store], or free some of the disk"
            yield Problem("store", f"no samples are captured: {self._store.full}", fix)
