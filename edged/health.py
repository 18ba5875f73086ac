"""Looks at every part of the running daemon and says how it is: what `edged status`, READY and the watchdog are made of."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

from edged.control import NOT_YET
from edged.core.health import Awaits, Facts, Health, Problem, SlotFacts, assess
from edged.store import StoreError

if TYPE_CHECKING:
    from edged.daemon import Daemon

log = logging.getLogger(__name__)

RECENT_S = 60.0  # an error of the store is a problem for this long after the last one
STORE_ERRORS = ("store_errors", "outbox_full_waits", "messages_dropped")


class Vitals:
    """The daemon's health. `look` may be called on any thread."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._errors: int | None = None  # of the store, at the last look
        self._errors_at = float("-inf")

    def look(self) -> Health:
        """How the daemon is at this moment."""
        return assess(self.facts())

    def facts(self) -> Facts:
        """What every part says."""
        d = self._daemon
        network, broker = d.link.alive(), d.control.link_state
        store_error = self._count_errors()
        return Facts(
            looped=d.control.looped,
            stalled=d.beats.stalled(),
            ended=self._ended(),
            network=network,
            broker=None if broker == NOT_YET else broker,
            refused=tuple(d.link.refused),
            slots=self._slots(),
            disk_free=self._disk_free(),
            state_dir=str(d.settings.device.state_dir),
            write_errors=d.clock.monotonic() - self._errors_at < RECENT_S,
            store_error=store_error,
            config_error=d.reloader.refused,
            more=self._more(),
        )

    def _slots(self) -> dict[str, SlotFacts]:
        d = self._daemon
        out = {}
        for name, slot in list(d.slots.items()):
            live, config = slot.live, d.settings.slots.get(name)
            awaits: Awaits = "nothing"
            if d.updater.expects(name):
                awaits = "release"
            elif config is not None and config.seed is not None:
                awaits = "seed"
            out[name] = SlotFacts(live.ref.release if live else None, awaits)
        return out

    def _ended(self) -> tuple[str, ...]:
        """Threads that nobody has asked to end."""
        d = self._daemon
        if not d.serving:
            return ()
        pipelines = (*list(d.pipelines.values()), *list(d.responders.values()))
        out = [f"pipeline {pipeline.name}" for pipeline in pipelines if not pipeline.alive()]
        return (*out, *(f"source of {name}" for name, source in list(d.sources.items()) if not source.alive()))

    def _disk_free(self) -> int | None:
        try:
            return shutil.disk_usage(self._daemon.settings.device.state_dir).free
        except OSError as error:
            log.error("%s: %s", self._daemon.settings.device.state_dir, error)
            return None

    def _count_errors(self) -> str:
        """Note when the store last did not take something; why it cannot even be read, or empty."""
        d = self._daemon
        try:
            counters = d.store.counters()
        except StoreError as error:
            return str(error)
        errors = sum(counters.get(name, 0) for name in STORE_ERRORS)
        before, self._errors = self._errors, errors
        if before is not None and errors > before:
            self._errors_at = d.clock.monotonic()
        return ""

    def _more(self) -> tuple[Problem, ...]:
        return tuple(problem for report in self._daemon.problem_reports for problem in report())
