"""The composition root: builds the parts from the configuration, starts them, stops them in order."""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from edged import connection, facts
from edged.acts import THREAD as UPDATER
from edged.acts import Carrier
from edged.agency import Agency
from edged.beats import Beats
from edged.carried import carried
from edged.clock import Clock, SystemClock
from edged.clock_steps import ClockSteps
from edged.config import Settings
from edged.config_sources import CameraSource, RtspSource
from edged.config_sources import DirectorySource as DirectoryConfig
from edged.control import Control
from edged.core.health import Problem
from edged.health import Vitals
from edged.in_hand import InHand
from edged.limits import Monitor
from edged.machine import Memory
from edged.meaning import responding, store_limits
from edged.metrics import Window
from edged.notify import Herald, Notifier
from edged.orders import Orders
from edged.pace import Pace
from edged.pipeline import Pipeline
from edged.recent import Recent
from edged.releases import Releases
from edged.reload import Reloader
from edged.services import Services
from edged.slot import Slot
from edged.sources import Source, live
from edged.sources.directory import DirectorySource
from edged.stamp import Stamp
from edged.status_socket import StatusSocket
from edged.storage import StorageWatch
from edged.store.integrity import Opened, open_store
from edged.tallies import Tallies
from edged.told import Told
from edged.trust import Trust
from edged.updater import Updater
from edged.within import within

log = logging.getLogger(__name__)

# From the order to stop to the end of the process, whatever hangs: less than the unit's TimeoutStopSec.
DRAIN_S_MAX = 15.0
FINISH_S_MAX = 5.0  # of it, for the items in hand
FLUSH_S = 3.0  # on shutdown the outbox may use this long to empty itself; what is left is sent after the next start


class AlreadyRunning(Exception):
    """Another daemon works in this state directory."""


class Daemon:
    """One `edged run`. `run` blocks until `stop`, which any thread or signal handler may call."""

    def __init__(
        self, settings: Settings, clock: Clock | None = None, *, config: Path | None = None,
        notifier: Notifier | None = None,
    ) -> None:  # fmt: skip
        """`config`: the file that the settings came from, to be loaded again when it changes; `notifier`: the service
        manager's ear."""
        self.settings = settings
        clock = self.clock = clock or SystemClock()
        state = settings.device.state_dir
        state.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(state)
        opened = open_store(state, store_limits(settings), clock.now())
        self.store, swept = opened.store, opened.swept
        if swept.temporary or swept.orphans or swept.missing:
            log.warning("after a crash: %d half files and %d orphans removed, %d samples without image rejected",
                        swept.temporary, swept.orphans, len(swept.missing))  # fmt: skip
        self.stamp = Stamp(clock)
        self.beats, self.pace, self.tallies = Beats(clock), Pace(clock), Tallies()
        outgoing = self.told = Told(settings.device.site, settings.device.id, self.stamp)
        releases = Releases(state / "releases")
        window = self.window = Window(clock.now())
        self.started, self.usage, self.metering = clock.now(), facts.Usage(clock), facts.Metering(self)
        self.in_hand = InHand(state / "in_hand", self.store, self._tell)
        self.slots = {name: self.make_slot(name) for name in settings.slots}
        inbox: queue.Queue[Any] = queue.Queue()
        self.link = connection.link(settings, outgoing, inbox)
        self.delivery, uploads = carried(self, releases)
        self.trust = Trust(settings.trust, state / "trust", self.delivery.metadata, clock)
        self.delivery.admit = self.trust.admit
        self._services = Services(
            self.store, outgoing, clock, window,
            wait=lambda *waiting: self.control.wait(*waiting),
            engine_error=lambda slot, **how: self.updater.engine_error(slot, **how),
            unsure=lambda unsure: self.control.ask_on(unsure),
            wake=lambda: self.control.wake(),
            publish=self.link.publish,
            beats=self.beats, pace=self.pace, in_hand=self.in_hand, tallies=self.tallies,
            recent=Recent() if settings.agents else None,
        )  # fmt: skip
        self.pipelines = {name: self.make_pipeline(name, settings) for name in settings.pipelines}
        self.responders = {(r.tier, r.task): self.make_responder(n, settings) for n, r in settings.responders.items()}
        self.control = Control(
            settings, self.store, self.link, outgoing, clock, window, uploads, self.pipelines, self.responders,
            self.beats,
        )  # fmt: skip
        self.slot_configs = dict(settings.slots)
        memory = Memory(settings.limits.memory_mib)
        self.monitor = Monitor(
            settings.limits, memory, self.pace, self.beats, clock, self.store.count, self.control.say
        )
        self.updater = self.control.updater = Updater(
            self.slots, self.slot_configs, releases, self.store, clock,
            Carrier(self.delivery.fetch, self.delivery.progress),
            post=inbox.put, report=self.control.report, say=self.control.say, retry_s=settings.host.fetch_retry_s,
            beats=self.beats, memory=memory, tallies=self.tallies,
        )  # fmt: skip
        self.agency = Agency(self, config, self._services.recent)
        self.orders = self.control.orders = Orders(state, self.store, self.updater, self.control.tell_command)
        self.sources: dict[str, Source] = {}  # by pipeline; one that takes requests has none
        for name in settings.pipelines:
            source = self.make_source(name, settings)
            if source is not None:
                self.sources[name] = source
        self._watch(opened, config, notifier or Notifier())

    def _watch(self, opened: Opened, config: Path | None, notifier: Notifier) -> None:
        """The parts that look at the others: status, health, the service manager, a new configuration, the disk."""
        self._status = StatusSocket(self.settings.device.state_dir, self.status, self.beats)
        self.serving = False  # everything has been started, and nothing was asked to end
        self.storage = StorageWatch(opened, self.clock, self._tell)
        # Of parts that know themselves what is wrong.
        self.problem_reports: list[Callable[[], Iterable[Problem]]] = [
            lambda: live.problems(dict(self.sources)), self.storage.problems, self.agency.problems,
        ]  # fmt: skip
        self.vitals = Vitals(self)
        self.herald = Herald(notifier, self.vitals.look, self.control.report)
        self.reloader = Reloader(config, self)
        self.control.health = lambda: self.vitals.look().document()
        self.control.machine = self.monitor.peaks
        self._clock_steps = ClockSteps(self.clock, self.store)
        self.control.wall = self._clock_steps.wall
        self.control.at_tick |= {
            "clock": self._clock_steps.tick, "reload": self.reloader.tick, "storage": self.storage.tick,
            "orders": self.orders.tick,
        }  # fmt: skip
        self.left_running: list[str] = []  # threads that did not end in time: the process must be ended for them
        self.overdue: Callable[[], None] = lambda: None  # called when the end takes longer than DRAIN_S_MAX
        self._stop_asked, self._ended = threading.Event(), threading.Event()

    def _tell(self, kind: str, text: str, **more: Any) -> None:
        """An event for people; raises StoreError when it cannot be kept."""
        self.store.enqueue(self.told.event(kind, text, **more), self.clock.now())

    def make_slot(self, name: str) -> Slot:
        """The slot `name`, empty."""
        return Slot(name, lambda: self.beats.beat(threading.current_thread().name))

    def make_pipeline(self, name: str, settings: Settings) -> Pipeline:
        """The pipeline `name`, not started."""
        config = settings.pipelines[name]
        return Pipeline(name, config, self.slots[config.slot], self._services)

    def make_responder(self, name: str, settings: Settings) -> Pipeline:
        """The pipeline of the responder `name`, not started."""
        config = settings.responders[name]
        slot = self.slots[config.slot]
        return Pipeline(f"responder-{name}", responding(config), slot, self._services, config.concurrency)

    def make_source(self, name: str, settings: Settings) -> Source | None:
        """The source of the pipeline `name`, not started; None when its items come as requests."""
        source, put = settings.pipelines[name].source, self.pipelines[name].put
        if isinstance(source, DirectoryConfig):
            return DirectorySource(source.path, source.after, put, self.clock, self.beats)
        if isinstance(source, CameraSource | RtspSource):
            return live.live_source(name, source, self.pipelines[name], self._services)
        return None

    def run(self) -> None:
        """Serve until `stop`; then finish the items in hand, say goodbye and close. Afterwards `left_running` names what
        did not end."""
        threading.Thread(target=self._see_to_the_end, name="end", daemon=True).start()
        self.herald.start()
        try:
            self.monitor.start()
            self.updater.start(self.in_hand.excuses)
            self._status.start()
            self.metering.start()
            for pipeline in (*self.pipelines.values(), *self.responders.values()):
                pipeline.start()
            self.agency.start()
            self.link.start()
            for source in self.sources.values():
                source.start()
            log.info(
                "edged %s runs: %d slots, %d pipelines", self.settings.device.id, len(self.slots), len(self.pipelines)
            )
            self.serving = True
            self.control.run()
        finally:
            self._shut_down()

    def stop(self) -> None:
        """Ask `run` to end."""
        self.control.stop()
        self._stop_asked.set()

    def _see_to_the_end(self) -> None:
        """Whatever hangs, and wherever: the end comes in time."""
        self._stop_asked.wait()
        if not self._ended.wait(DRAIN_S_MAX):
            running = sorted(thread.name for thread in threading.enumerate())
            log.error("not ended within %.0f s; these threads run: %s", DRAIN_S_MAX, ", ".join(running))
            self.overdue()

    def _shut_down(self) -> None:
        self.in_hand.close()  # a stop blames nobody
        # From the sources to the sinks: nothing new comes in, what is in hand is committed, then it is sent. First
        # everybody is told, because a source may wait for room in a queue, and a pipeline for a model that never came.
        self.serving = False
        self.stop()
        self.herald.stopping()
        self.monitor.stop()
        until = time.monotonic() + FINISH_S_MAX
        pipelines = (*self.pipelines.values(), *self.responders.values())
        for pipeline in pipelines:
            pipeline.finish()
        if not self.agency.stop():
            self.left_running.append("agents")
        for slot in self.slots.values():
            slot.stop()
        for name, source in self.sources.items():
            if not within(max(0.0, until - time.monotonic()), f"source of {name}", source.stop):
                self.left_running.append(f"source of {name}")
        for pipeline in pipelines:
            pipeline.stop(max(0.0, until - time.monotonic()))
            self.left_running += pipeline.running()
        if not self.updater.stop(max(0.0, until - time.monotonic())):
            self.left_running.append(UPDATER)
        self.control.close_window()
        self.control.flush(FLUSH_S)
        for address, payload in connection.announcements(self.settings, self.told, "offline", {}):
            self.link.publish(address, payload)
        self.control.flush(0.3)
        self.link.stop()
        self.delivery.close()
        self.metering.stop()
        self._status.stop()
        self.herald.stop()
        self.store.close()
        self._lock.close()
        self._ended.set()
        if self.left_running:
            log.error("edged %s stopped; still at work: %s", self.settings.device.id, ", ".join(self.left_running))
        else:
            log.info("edged %s stopped", self.settings.device.id)

    def status(self) -> dict[str, Any]:
        """What `edged status` shows, true at this moment."""
        return {
            "device": self.settings.device.id,
            "site": self.settings.device.site,
            "pid": os.getpid(),
            "boot": self.stamp.boot,
            "broker": self.control.link_state,
            "models": {name: r.model_dump(mode="json") for name, r in self.updater.reports().items()},
            "pipelines": {name: facts.pipeline(p, self) for name, p in list(self.pipelines.items())},
            "sources_alive": all(source.alive() for source in list(self.sources.values())),
            **self.storage.figures(),
            "limits": self.monitor.status(),
            "streams": live.statuses(dict(self.sources)),
            "health": self.vitals.look().document(),
            "config": self.reloader.status(),
            "orders": self.orders.status(),
            "bad": [bad.model_dump(mode="json") for bad in self.updater.known_bad()],
            **facts.more(self),
            **self.agency.status(),
        }


def _lock(state: Path) -> Any:
    file = (state / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise AlreadyRunning(f"{state}: another edged runs with this state_dir; stop it or choose another") from None
    return file
