"""What the daemon knows of itself beside its parts' own states: who it is, what it answered, what it uses."""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edged.clock import Clock

if TYPE_CHECKING:
    from edged.daemon import Daemon
    from edged.exporter import Exporter
    from edged.pipeline import Pipeline

FRESH_S = 5.0  # measuring memory walks page tables: not more often than this


@cache
def version() -> str:
    """The installed version of edged."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("edged")
    except PackageNotFoundError:
        return "unknown"


class Usage:
    """Memory and processor time of this process and of the engines' processes below it. Safe to use from any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._measured = -FRESH_S
        self._last: dict[str, Any] = {}

    def now(self) -> dict[str, Any]:
        """`daemon` and `engines`: pss_bytes and cpu_s; and the daemon's threads and open files. At most FRESH_S old."""
        with self._lock:
            if self._clock.monotonic() - self._measured >= FRESH_S:
                self._last, self._measured = _usage(), self._clock.monotonic()
            return self._last


def _usage() -> dict[str, Any]:
    import psutil

    own = psutil.Process()
    children = own.children(recursive=True)
    engines = {"pss_bytes": 0, "cpu_s": 0.0, "processes": 0}
    for child in children:
        try:
            used = _of(child)
        except psutil.Error:  # it has just ended
            continue
        engines = {"processes": engines["processes"] + 1, **{key: engines[key] + used[key] for key in used}}
    return {"daemon": {**_of(own), "threads": own.num_threads(), "files": own.num_fds()}, "engines": engines}


def _of(process: Any) -> dict[str, Any]:
    times = process.cpu_times()
    return {"pss_bytes": pss(process.pid) or process.memory_info().rss, "cpu_s": times.user + times.system}


def pss(pid: int) -> int:
    """Bytes of memory of a process, what it shares counted in part; 0 where the kernel does not tell."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:")), 0)


class Metering:
    """The page for Prometheus, where one is wanted; its library is loaded only then."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._exporter: Exporter | None = None

    def start(self) -> None:
        """Serve it if the configuration says so and the address can be had."""
        config = self._daemon.settings.metrics
        if config.listen is not None:
            from edged import exporter

            self._exporter = exporter.start(config, self._daemon.status, self._daemon.beats)

    def stop(self) -> None:
        """Close it."""
        if self._exporter is not None:
            self._exporter.stop()


def pipeline(of: Pipeline, daemon: Daemon) -> dict[str, Any]:
    """One pipeline, or responder: how it is, and what it answered since the start."""
    source = daemon.sources.get(of.name)
    return {
        "alive": of.alive(),
        "waiting": of.waiting(),
        "queue_max": of.config.queue_max,
        "breaker": of.answers.state.value,
        "slot": of.config.slot,
        "source": of.config.source.type,
        "source_alive": source is None or source.alive(),
        "totals": daemon.window.totals(of.name),
    }


def more(daemon: Daemon) -> dict[str, Any]:
    """What the status document says beside the parts' own states."""
    settings, limits = daemon.settings, daemon.settings.store
    return {
        "version": version(),
        "profile": settings.device.profile,
        "since": daemon.started,
        "now": daemon.stamp.clock.now(),
        "responders": {
            responder.name.removeprefix("responder-"): pipeline(responder, daemon)
            for responder in list(daemon.responders.values())
        },
        "outbox_limits": {"messages": limits.outbox_rows_max, "bytes": limits.outbox_bytes_max},
        "pace": daemon.pace.share,
        "stalled": daemon.beats.stalled(),
        "usage": daemon.usage.now(),
        "events": daemon.told.events(),
        "trust": daemon.trust.status(),
        "cores": os.cpu_count(),
    }
