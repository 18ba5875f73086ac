"""The composition root: builds the parts from the configuration, starts them, stops them in order."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import queue
import socket
import threading
from pathlib import Path
from typing import Any

from edged.acts import Carrier
from edged.beats import Beats
from edged.carrier import HttpCarrier
from edged.clock import Clock, SystemClock
from edged.config import DirectorySource as DirectoryConfig
from edged.config import MqttSource, Responder, Settings
from edged.config import Pipeline as PipelineConfig
from edged.control import Control, announcements
from edged.fetch import Fetcher, FetchOptions
from edged.link import Link, LinkOptions
from edged.metrics import Window
from edged.outgoing import Outgoing
from edged.pace import Pace
from edged.pipeline import Pipeline, Services
from edged.releases import Releases
from edged.slot import Slot
from edged.sources import Source
from edged.sources.directory import DirectorySource
from edged.stamp import Stamp
from edged.store import Store, StoreLimits
from edged.updater import Updater
from edged.wire import messages, topics

log = logging.getLogger(__name__)

FLUSH_S = 3.0  # on shutdown the outbox may use this long to empty itself; what is left is sent after the next start


class AlreadyRunning(Exception):
    """Another daemon works in this state directory."""


class Daemon:
    """One `edged run`. `run` blocks until `stop`, which any thread or signal handler may call."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self.settings = settings
        clock = clock or SystemClock()
        state = settings.device.state_dir
        state.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(state)
        limits = settings.store
        self.store = Store(
            state,
            StoreLimits(
                blob_bytes_max=limits.blob_bytes_max,
                outbox_rows_max=limits.outbox_rows_max,
                outbox_bytes_max=limits.outbox_bytes_max,
            ),
        )
        swept = self.store.sweep()
        if swept.temporary or swept.orphans or swept.missing:
            log.warning("after a crash: %d half files and %d orphans removed, %d samples without image rejected",
                        swept.temporary, swept.orphans, len(swept.missing))  # fmt: skip
        self.stamp = Stamp(clock)
        self.beats, self.pace = Beats(clock), Pace()
        outgoing = Outgoing(settings.device.site, settings.device.id, self.stamp)
        releases = Releases(state / "releases")
        window = Window(clock.now())
        self.slots = {name: Slot(name) for name in settings.slots}
        inbox: queue.Queue[Any] = queue.Queue()
        self.link = _link(settings, outgoing, inbox)
        fetcher = Fetcher(FetchOptions(settings.broker.ca, settings.broker.certificate, settings.broker.key))
        carrier = HttpCarrier(fetcher, lambda: settings.host.url or self.control.host_url, releases)
        services = Services(
            self.store, outgoing, clock, window,
            wait=lambda *waiting: self.control.wait(*waiting),
            engine_error=lambda slot: self.updater.engine_error(slot),
            unsure=lambda unsure: self.control.ask_on(unsure),
            wake=lambda: self.control.wake(),
            publish=self.link.publish,
            beats=self.beats, pace=self.pace,
        )  # fmt: skip
        self.pipelines = {
            name: Pipeline(name, config, self.slots[config.slot], services)
            for name, config in settings.pipelines.items()
        }
        self.responders = {
            (r.tier, r.task): Pipeline(f"responder-{name}", _responding(r), self.slots[r.slot], services)
            for name, r in settings.responders.items()
        }
        self.control = Control(
            settings, self.store, self.link, outgoing, clock, window, carrier, self.pipelines, self.responders
        )
        self.updater = self.control.updater = Updater(
            self.slots, settings.slots, releases, self.store, clock, Carrier(carrier.fetch),
            post=inbox.put, report=self.control.report, say=self.control.say, retry_s=settings.host.fetch_retry_s,
        )  # fmt: skip
        self._outgoing = outgoing
        self._sources: list[Source] = [
            DirectorySource(config.source.path, config.source.after, self.pipelines[name].put, clock)
            for name, config in settings.pipelines.items()
            if isinstance(config.source, DirectoryConfig)
        ]
        self._status = _StatusSocket(state, self.status)

    def run(self) -> None:
        """Serve until `stop`; then finish the items in hand, say goodbye and close."""
        try:
            self.updater.start()
            self._status.start()
            for pipeline in (*self.pipelines.values(), *self.responders.values()):
                pipeline.start()
            self.link.start()
            for source in self._sources:
                source.start()
            log.info(
                "edged %s runs: %d slots, %d pipelines", self.settings.device.id, len(self.slots), len(self.pipelines)
            )
            self.control.run()
        finally:
            self._shut_down()

    def stop(self) -> None:
        """Ask `run` to end."""
        self.control.stop()

    def _shut_down(self) -> None:
        # From the sources to the sinks: nothing new comes in, what is in hand is committed, then it is sent. First
        # everybody is told, because a source may wait for room in a queue, and a pipeline for a model that never came.
        pipelines = (*self.pipelines.values(), *self.responders.values())
        for pipeline in pipelines:
            pipeline.finish()
        for slot in self.slots.values():
            slot.stop()
        for source in self._sources:
            source.stop()
        for pipeline in pipelines:
            pipeline.stop()
        self.updater.stop()
        self.control.close_window()
        self.control.flush(FLUSH_S)
        for address, payload in announcements(self.settings, self._outgoing, "offline", {}):
            self.link.publish(address, payload)
        self.control.flush(0.3)
        self.link.stop()
        self._status.stop()
        self.store.close()
        self._lock.close()
        log.info("edged %s stopped", self.settings.device.id)

    def status(self) -> dict[str, Any]:
        """What `edged status` shows, true at this moment."""
        rows, size = self.store.depth()
        return {
            "device": self.settings.device.id,
            "site": self.settings.device.site,
            "pid": os.getpid(),
            "boot": self.stamp.boot,
            "broker": self.control.link_state,
            "models": {name: r.model_dump(mode="json") for name, r in self.updater.reports().items()},
            "pipelines": {
                name: {"alive": p.alive(), "waiting": p.waiting(), "breaker": p.answers.state.value}
                for name, p in self.pipelines.items()
            },
            "sources_alive": all(source.alive() for source in self._sources),
            "samples": self.store.counts(),
            "outbox": {"messages": rows, "bytes": size},
            "counters": self.store.counters(),
        }


def _lock(state: Path) -> Any:
    file = (state / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise AlreadyRunning(f"{state}: another edged runs with this state_dir; stop it or choose another") from None
    return file


def _responding(responder: Responder) -> PipelineConfig:
    """A responder is a pipeline whose items are other devices' questions."""
    return PipelineConfig(
        slot=responder.slot, source=MqttSource(), task=responder.task, queue_max=responder.queue_max,
        policy=responder.policy, escalate_to=responder.escalate_to,
    )  # fmt: skip


def _link(settings: Settings, outgoing: Outgoing, inbox: queue.Queue[Any]) -> Link:
    device, broker = settings.device, settings.broker
    own = {"site": device.site, "dev": device.id}
    subscriptions = [
        topics.DESIRED.filter(**own),
        topics.VERDICT.filter(**own),
        topics.INFER.filter(**own),
        topics.COMMAND.filter(**own),
        topics.HOST.filter(),
    ]
    if device.group:
        subscriptions.append(topics.GROUP_DESIRED.filter(site=device.site, group=device.group))
    asked = [p.escalate_to for p in settings.pipelines.values()] + [r.escalate_to for r in settings.responders.values()]
    for tier in sorted(set().union(*asked)):
        subscriptions.append(topics.RESPONDER.filter(tier=tier))
    for r in settings.responders.values():
        subscriptions.append(topics.ESCALATION.shared(f"{r.tier}-{r.task}", site=device.site, tier=r.tier, task=r.task))
    will = messages.State(**outgoing.stamp(), state="offline", device=device.id)
    return Link(
        LinkOptions(
            broker.host, broker.port, device.id, broker.ca, broker.certificate, broker.key, broker.keepalive_s,
            # A dead responder's session would go on taking its half of the shared questions.
            session_expiry_s=0 if settings.responders else broker.session_expiry_s,
            reconnect_s_max=broker.reconnect_s_max,
        ),
        subscriptions,
        will=(topics.STATE(**own), messages.encode(will)),
        inbox=inbox,
    )  # fmt: skip


STATUS_SOCKET = "status.sock"
STATUS_BYTES_MAX = 4 << 20


class _StatusSocket:
    """Answers every connection with one JSON document. Local to this machine and to whoever may read the state folder."""

    def __init__(self, state: Path, status: Any) -> None:
        self._state, self._make = state, status
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._serve, name="status", daemon=True)

    def start(self) -> None:
        (self._state / STATUS_SOCKET).unlink(missing_ok=True)
        with _ShortPath(self._state) as path:
            self._socket.bind(path)
        self._socket.listen(4)
        self._thread.start()

    def stop(self) -> None:
        self._socket.close()
        (self._state / STATUS_SOCKET).unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.settimeout(2)
                    connection.sendall(json.dumps(self._make()).encode())
                except Exception as error:  # a reader that went away must not end the readers after it
                    log.debug("status: %s", error)


class _ShortPath:
    """A path to the socket that fits the 107 bytes of a Unix socket address however deep the folder lies."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def __enter__(self) -> str:
        self._descriptor = os.open(self._state, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/self/fd/{self._descriptor}/{STATUS_SOCKET}"

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def ask_status(state: Path) -> dict[str, Any] | None:
    """The status of the daemon that works in `state`; None when none answers."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, _ShortPath(state) as path:
            client.settimeout(5)
            client.connect(path)
            data = bytearray()
            while chunk := client.recv(65536):
                data += chunk
                if len(data) > STATUS_BYTES_MAX:
                    return None
        answer: dict[str, Any] = json.loads(data)
    except (OSError, ValueError):
        return None
    return answer
