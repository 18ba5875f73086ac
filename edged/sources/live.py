"""A live stream as a source: the part that a camera and an RTSP stream share.

    keeper thread: opens a connection, watches it, reconnects  |  its connection's thread: reads every frame, hands some on

Law: every frame is read as it comes, so that none grows old in a buffer. A frame goes to the pipeline if that can begin with
it, else it is skipped and counted; at any moment: read = skipped + answered + rejected + in hand. A library that hangs costs
its connection's thread, never the keeper, a stop or another pipeline.
"""

from __future__ import annotations

import logging
import random
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from edged.beats import Beats
from edged.clock import Clock, new_id
from edged.config_sources import CameraSource, RtspSource
from edged.core.backoff import failures_after, reconnect_s
from edged.core.cadence import Cadence
from edged.core.health import Problem
from edged.core.redact import redact
from edged.engines.base import Image
from edged.sources import Item, Source
from edged.sources.stream import Connection, CorruptFrame, Opener
from edged.store import StoreError

if TYPE_CHECKING:
    from edged.pipeline import Pipeline
from edged.services import Services

log = logging.getLogger(__name__)

IN_HAND_MAX = 2  # one is being answered, the next is being prepared meanwhile: more would only grow old
LOOK_S = 0.25  # how often the keeper looks at its connection
STILL_S_MAX = 120.0  # the keeper itself comes round far more often
OPENING = 3  # times its timeout a stream has until its first frame: to connect, to describe itself, for a keyframe
GRACE_S = 1.0  # the library notices the timeout itself; that much later it counts as hanging
HUNG_MAX = 2  # threads of one source left behind in a library; with so many nothing is opened until one has come back
STOP_S_MAX = 1.5  # a stop waits this long for a library to return
REJECTED_REST_S = 1.0  # after a frame that was rejected: the next would be too, and each is a line in the log


@dataclass(frozen=True, slots=True)
class Feed:
    """What a live source needs of the daemon and of its pipeline."""

    offer: Callable[[Item], bool]  # queue an item if there is room
    ready: Callable[[], bool]  # whether there is a model to answer with
    count: Callable[[str], None]  # one more of this counter
    say: Callable[[str, str], None]  # an event for people: kind, text
    clock: Clock
    beats: Beats


class LiveSource:
    """Gives the frames of a stream to the pipeline `name`, at most `fps_max` a second, and reconnects for ever.

    `timeout_s`: so long without a frame and the stream counts as lost. `what`: its name for people, without secrets.
    """

    def __init__(
        self, name: str, what: str, opener: Opener, feed: Feed, *, timeout_s: float, fps_max: float | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:  # fmt: skip
        self._name, self._what, self._open, self.feed = name, what, opener, feed
        self._timeout_s, self._chance = timeout_s, chance
        self._cadence = Cadence(1 / fps_max if fps_max else 0.0)
        self._lock = threading.Lock()  # over the counts, the cadence and what is in hand
        self._in_hand: set[str] = set()
        self._counts = dict.fromkeys(("read", "skipped", "corrupt", "answered", "rejected"), 0)
        self._state, self._why, self._lost_at = "connecting", "", 0.0
        self._times_lost = 0
        self._last: float | None = None  # when the last frame came
        self._stopping = threading.Event()
        self._connection: Connection | None = None
        self._hung: list[Connection] = []  # abandoned, and their threads have not come back
        self._keeper = threading.Thread(target=self._keep, name=f"source-{name}", daemon=True)

    def start(self) -> None:
        """Begin to open the stream; whether it can be opened shows later."""
        self.feed.beats.watch(self._keeper.name, STILL_S_MAX)
        self._keeper.start()

    def stop(self) -> None:
        """End the threads; one that hangs inside a library is left behind."""
        self._stopping.set()
        if self._keeper.ident is not None:
            self._keeper.join()
        connection = self._connection
        if connection is not None and not connection.end(STOP_S_MAX):
            log.warning("%s: %s: its library does not return: its thread is left behind", self._name, self._what)

    def alive(self) -> bool:
        """Whether it does what it should: streams, reconnects, or has come to its end."""
        return self._keeper.is_alive() or self._state == "ended"

    def status(self) -> dict[str, Any]:
        """Its state (connecting, streaming, lost, ended), why it is so, and what became of the frames that were read."""
        now = self.feed.clock.monotonic()
        with self._lock:
            return {
                "stream": self._what,
                "state": self._state,
                "why": self._why,
                "times_lost": self._times_lost,
                "frame_age_s": None if self._last is None else round(now - self._last, 1),
                **{f"frames_{name}": number for name, number in self._counts.items()},
                "frames_in_hand": len(self._in_hand),
            }

    # Keeper thread.

    def _keep(self) -> None:
        failures = 0
        while not self._stopping.is_set() and self._state != "ended":
            try:
                failures = self._round(failures)
            except Exception as error:  # a bug of ours must not blind the camera for good
                log.error("%s: %s", self._name, redact(traceback.format_exc()))
                self.feed.count("source_faults")
                self._stopping.wait(self.feed.clock.real(reconnect_s(failures := failures + 1, 0.0)))
                self._why = redact(f"{type(error).__name__}: {error}")
            self.feed.beats.beat(self._keeper.name)
        self.feed.beats.forget(self._keeper.name)

    def _round(self, failures: int) -> int:
        """One attempt, and the wait after it; how many have failed in a row."""
        flowed_s, why, ended = self._attempt()
        if ended:
            self._end()
        elif not self._stopping.is_set():
            failures = failures_after(failures, flowed_s)
            pause_s = reconnect_s(failures, self._chance())
            self._lose(why, pause_s)
            self._stopping.wait(self.feed.clock.real(pause_s))
        return failures

    def _attempt(self) -> tuple[float, str, bool]:
        """Open the stream and watch it until it ends: (for how many seconds it flowed, why it ended, whether it should)."""
        self._hung = [connection for connection in self._hung if connection.running()]
        if len(self._hung) >= HUNG_MAX:
            return (
                0.0,
                f"{len(self._hung)} earlier attempts still hang in the library: unplug the camera, or restart edged",
                False,
            )
        connection = self._connection = Connection(self._name, self._open, self, self.feed.clock)
        connection.start()
        while not connection.gone.wait(self.feed.clock.real(LOOK_S)) and not self._stopping.is_set():
            self.feed.beats.beat(self._keeper.name)
            if connection.frames:
                self._flows(connection)
            silent_s = self.feed.clock.monotonic() - connection.last
            limit_s = self._timeout_s * (1 if connection.frames else OPENING) + GRACE_S
            if silent_s > limit_s:
                connection.dropped.set()
                self._hung.append(connection)
                return connection.flowed_s(), f"no frame for {silent_s:.0f} s", False
        if connection.frames and not self._stopping.is_set():
            self._flows(connection)
        return connection.flowed_s(), connection.why, connection.ended

    def _flows(self, connection: Connection) -> None:
        if self._state == "streaming":
            return
        lost = self._state == "lost"
        with self._lock:
            self._state, self._why = "streaming", ""
        log.info("%s: %s: %s", self._name, self._what, connection.about)
        if lost:
            away_s = self.feed.clock.monotonic() - self._lost_at
            self.feed.count("streams_recovered")
            log.info("%s: %s: frames come again after %.0f s", self._name, self._what, away_s)
            self.feed.say("stream_recovered", f"{self._name}: {self._what}: frames come again after {away_s:.0f} s")

    def _lose(self, why: str, pause_s: float) -> None:
        self.feed.count("stream_failures")
        text = f"{self._name}: {self._what}: {why}"
        if self._state == "lost":
            if why != self._why:
                log.info("%s; still trying", text)
            with self._lock:
                self._why = why
            return
        with self._lock:
            self._state, self._why = "lost", why
            self._times_lost += 1
        self._lost_at = self.feed.clock.monotonic()
        self.feed.count("streams_lost")
        log.warning("%s; trying again in %.1f s, then ever more seldom", text, pause_s)
        self.feed.say("stream_lost", text)

    def _end(self) -> None:
        with self._lock:
            self._state, self._why = "ended", "the stream has come to its end"
        self.feed.count("streams_ended")
        log.warning("%s: %s: has come to its end: no more frames", self._name, self._what)
        self.feed.say("stream_ended", f"{self._name}: {self._what}: has come to its end: no more frames")

    # Connection's thread, one at a time.

    def take(self, retrieve: Callable[[], Image]) -> None:
        """A frame came: hand it on if the pipeline can begin with it, else skip it. Raises StreamLost."""
        feed, now = self.feed, self.feed.clock.monotonic()
        with self._lock:
            self._last = now
            wanted = len(self._in_hand) < IN_HAND_MAX and self._cadence.wants(now)
        if not (wanted and feed.ready()):
            self.skip()
            return
        try:
            image = retrieve()
        except CorruptFrame:
            self.corrupt()
            return
        item_id = new_id(feed.clock)
        with self._lock:
            self._in_hand.add(item_id)
            self._counts["read"] += 1
            number = self._counts["read"]
            self._cadence = self._cadence.taken(now)
        feed.count("frames_read")
        item = Item(
            id=item_id, name=f"{self._name}-{number}", captured=feed.clock.now(), frame=image,
            settle=lambda reason: self._settle(item_id, reason),
        )  # fmt: skip
        if not feed.offer(item):
            with self._lock:
                self._in_hand.discard(item_id)
                self._counts["skipped"] += 1
            feed.count("frames_skipped")

    def skip(self) -> None:
        """A frame came that is not handed on."""
        self._note("read", "skipped")

    def corrupt(self) -> None:
        """What came is no whole frame: it does not count as read."""
        self._note("corrupt")

    def fault(self) -> None:
        """A bug of ours has cost a connection."""
        self.feed.count("source_faults")

    def _note(self, *names: str) -> None:
        with self._lock:
            for name in names:
                self._counts[name] += 1
        for name in names:
            self.feed.count(f"frames_{name}")

    def _settle(self, item_id: str, reason: str) -> None:
        """The pipeline is done with this frame; called by its threads."""
        with self._lock:
            if item_id not in self._in_hand:
                return
            self._in_hand.discard(item_id)
            self._counts["rejected" if reason else "answered"] += 1
            if reason:
                self._cadence = self._cadence.resting(self.feed.clock.monotonic() + REJECTED_REST_S)


def live_source(name: str, config: CameraSource | RtspSource, pipeline: Pipeline, services: Services) -> LiveSource:
    """The source of the pipeline `name`, not started."""
    clock, store, outgoing = services.clock, services.store, services.outgoing
    opener: Opener
    if isinstance(config, CameraSource):
        from edged.sources.camera import open_camera

        what, opener = f"camera {config.device}", partial(open_camera, config, clock)
    else:
        from edged.sources.rtsp import open_rtsp, shown

        what, opener = shown(config), partial(open_rtsp, config, clock)

    def say(kind: str, text: str) -> None:
        try:
            store.enqueue(outgoing.event(kind, text), clock.now())
        except StoreError as error:
            store.count("messages_dropped")
            log.error("%s: not told: %s", text, error)
        services.wake()

    feed = Feed(
        offer=pipeline.offer, ready=lambda: pipeline.slot.live is not None,
        count=store.count, say=say, clock=clock, beats=services.beats,
    )  # fmt: skip
    return LiveSource(name, what, opener, feed, timeout_s=config.timeout_s, fps_max=config.fps_max)


def statuses(sources: Mapping[str, Source]) -> dict[str, Any]:
    """Pipeline -> the status of its live source, of those that have one."""
    return {name: source.status() for name, source in list(sources.items()) if isinstance(source, LiveSource)}


def problems(sources: Mapping[str, Source]) -> Iterator[Problem]:
    """The streams that give no frames."""
    for name, status in statuses(sources).items():
        if status["state"] == "lost":
            text = f"{name}: {status['stream']} gives no frames: {status['why']}"
            yield Problem(
                f"stream {name}", text, "see to the camera: edged goes on trying, and `edged check` tries it now"
            )
