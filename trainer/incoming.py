"""What comes in from the broker: batches of messages that become rows, and what the connection itself says.

Law of this file: messages are acknowledged after what they say is committed. A message that cannot be taken in is counted
and left out, whatever it brings about; while the database cannot be written all of them wait, and nothing is lost.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, update
from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError, SQLAlchemyError

from edged.link import Connected, Disconnected, Inbound, Link, Published
from edged.wire import messages, topics
from edged.wire.messages import InvalidPayload
from trainer import archive, fleet, intake
from trainer.core.believed import Unbelievable, believed
from trainer.database import Served, devices, events, parts
from trainer.database import removed as removed_table
from trainer.host import Host
from trainer.notices import note
from trainer.presence import WRITES, touch
from trainer.removed import Cleared, removed_names

log = logging.getLogger(__name__)

BATCH_MAX = 256  # messages taken in with one commit
WAIT_S = 1.0  # between two tries to write
COMPLAINT_S = 60.0  # of one kind from one device one is logged in this time; every one is counted
TOUCHED_MAX = 200_000  # devices of which it is remembered that they have just said something
LEVELS_OF_A_KIND = 6  # of a topic: up to `up/cmd`, whatever the command's name


@dataclass(frozen=True, slots=True)
class SentEvent:
    """The reference of an event of ours on its way."""

    id: str


@dataclass(frozen=True, slots=True)
class _Heard:
    message: Inbound
    route: topics.Route
    fields: dict[str, str]
    decoded: Any

    @property
    def device(self) -> str:
        return self.fields["dev"]

    @property
    def again(self) -> bool:
        """Whether it counts though it was taken in before: what is retained, and a Will, which has the same id each time
        that a boot loses its connection."""
        return self.message.retain or (isinstance(self.decoded, messages.State) and self.decoded.state == "offline")


class Complaints:
    """Keeps one noisy device from filling the log."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._said: dict[str, float] = {}

    def due(self, about: str) -> bool:
        """Whether to log: the first of its kind within COMPLAINT_S."""
        now = self._monotonic()
        if now - self._said.get(about, -COMPLAINT_S) < COMPLAINT_S:
            return False
        self._said = {each: at for each, at in self._said.items() if now - at < COMPLAINT_S}
        self._said[about] = now
        return True


class Incoming:
    """Takes in what devices and the broker say. `started` hears of a device that has just started, `changed` of what the
    connection says, `removed` of removed devices of which the broker retains something; none may fail."""

    def __init__(
        self, host: Host, link: Link, counters: dict[str, int], stopping: threading.Event, *,
        started: Callable[[str], None], changed: Callable[[Connected | Published], None],
        removed: Callable[[Collection[str]], None] = lambda _names: None,
    ) -> None:  # fmt: skip
        self._host, self._link, self._counters, self._stopping = host, link, counters, stopping
        self._started, self._changed, self._removed = started, changed, removed
        self.complaints = Complaints(host.clock.monotonic)
        self._out: frozenset[str] | None = None  # removed devices, as far as `_out_changed` says nothing
        self._out_changed = host.database.changed(removed_table)
        self._touched: dict[str, float] = {}  # device -> when its sign of life was last written, if it had to be
        self._relist = False  # devices are to be asked for their catalogues again
        self._confirmed: set[str] = set()  # events of ours that the broker has, not yet written down
        self._handlers: dict[topics.Route, Callable[[Connection, _Heard], None]] = {
            topics.STATE: self._on_state,
            topics.REPORTED: lambda c, h: fleet.take_reported(
                c, h.device, h.decoded, host.now(), retained=h.message.retain
            ),
            topics.SAMPLE: lambda c, h: fleet.take_sample(c, h.device, h.decoded),
            topics.METRICS: lambda c, h: self._refused(intake.take_windows(c, [(h.device, h.decoded)])),
            topics.EVENT: self._on_event,
            topics.COMMAND_STATE: lambda c, h: archive.take_command_state(host, c, h.device, h.fields["id"], h.decoded),
        }

    def take_in(self) -> None:
        """Take in what has arrived with one commit, then acknowledge it."""
        batch: list[Inbound] = []
        try:
            event = self._link.inbox.get(timeout=0.1)
            while True:
                if isinstance(event, Inbound):
                    batch.append(event)
                else:
                    self._on_link(event)
                if len(batch) >= BATCH_MAX:
                    break
                event = self._link.inbox.get_nowait()
        except queue.Empty:
            pass
        while batch or self._relist or self._confirmed:
            try:
                self._write(batch)
                break
            except SQLAlchemyError as error:  # the disk is full, or busy for too long, or the server is gone
                self._count("database_errors")
                if self.complaints.due("database"):
                    log.error("messages wait, the database cannot be written: %s", getattr(error, "orig", error))
                if self._stopping.wait(WAIT_S):
                    return  # not acknowledged: they come again
        # Acknowledge after commit: a crash before this means that they come again, never that they are lost.
        for message in batch:
            self._link.acknowledge(message)

    def confirmed(self, event_id: str) -> bool:
        """Whether the broker has this event of ours, though the rows do not say so yet."""
        return event_id in self._confirmed

    def _write(self, batch: list[Inbound]) -> None:
        with self._host.database.write() as connection:
            if self._relist:
                connection.execute(update(devices).values(listed_at=0.0))
            for part in parts(sorted(self._confirmed)):
                connection.execute(update(events).where(events.c.id.in_(part)).values(published=True))
            self._take(connection, batch)
        self._relist = False
        self._confirmed.clear()

    def _on_link(self, event: Any) -> None:
        if isinstance(event, Connected):
            log.info("broker: connected%s", "" if event.session else " (new session)")
            self._relist |= not event.session  # what devices sent while nobody was subscribed is gone
            self._changed(event)
        elif isinstance(event, Disconnected):
            self._count("broker_disconnects")
            log.warning("broker: %s", event.reason)
        elif isinstance(event, Published):
            if event.error and isinstance(event.ref, Cleared):
                log.info("the broker lets us not empty what it keeps of %s: `trainer revoke` does", event.ref.device)
            elif event.error:
                self._count("broker_refusals")
                log.warning("the broker refused %s: %s; check its access rules", event.ref, event.error)
            if isinstance(event.ref, SentEvent):
                self._confirmed.add(event.ref.id)
            self._changed(event)

    def _take(self, connection: Connection, batch: list[Inbound]) -> None:
        """What the messages of a batch say; of most of them with few statements for all."""
        heard = self._known(connection, [each for each in map(self._decoded, batch) if each is not None])
        self._batch(connection, [each for each in heard if each.route in intake.TOGETHER])
        for each in heard:
            if each.route not in (*intake.TOGETHER, *intake.LAST):
                self._on_message(connection, each)
        self._batch(connection, [each for each in heard if each.route in intake.LAST])
        self._signs(connection, heard)

    def _signs(self, connection: Connection, heard: list[_Heard]) -> None:
        """What is retained says itself when it was new; all else is a sign of life, whatever it says."""
        now, silent_s_max = self._host.now(), self._host.config.silent_s_max
        names = {each.device for each in heard if not each.route.retain}
        due = sorted(
            name for name in names if not 0 <= now - self._touched.get(name, -math.inf) < silent_s_max / WRITES
        )
        if due:
            touch(connection, due, now, silent_s_max)
            if len(self._touched) >= TOUCHED_MAX:
                self._touched.clear()
            self._touched |= dict.fromkeys(due, now)  # a commit that fails loses at most the signs of this while

    def _known(self, connection: Connection, heard: list[_Heard]) -> list[_Heard]:
        """Without what removed devices say: it is counted, and what the broker keeps of it is to go."""
        if self._out is None or self._out_changed.take():
            self._out = removed_names(connection)
        out = self._out & {each.device for each in heard}
        if not out:
            return heard
        theirs = [each for each in heard if each.device in out]
        self._count("messages_of_removed", len(theirs))
        self._removed({each.device for each in theirs if each.route.retain})
        return [each for each in heard if each.device not in out]

    def _batch(self, connection: Connection, heard: list[_Heard]) -> None:
        if not heard:
            return
        try:
            with connection.begin_nested():
                started, duplicates, refused = self._together(connection, heard)
        except Exception as error:  # one of them cannot be taken in: which one shows when each is for itself
            _raise_if_ours(error)
            for each in heard:
                self._on_message(connection, each)
            return
        if duplicates:
            self._count("duplicates", duplicates)
        self._refused(refused)
        for device in started:
            self._started(device)

    def _together(self, connection: Connection, heard: list[_Heard]) -> tuple[list[str], int, int]:
        """(the devices that have just started, how many messages came again, how many windows were refused); births before
        reports before windows."""
        now = self._host.now()
        new = intake.news(connection, [each.decoded for each in heard], now)
        # Retained states come again at every connection, and must count again when a newer one was never seen.
        kept = [each for each, first in zip(heard, new, strict=True) if first or each.again]
        said: dict[topics.Route, list[_Heard]] = {}
        for each in kept:
            said.setdefault(each.route, []).append(each)

        def of(route: topics.Route) -> list[tuple[str, Any]]:
            return [(each.device, each.decoded) for each in said.get(route, [])]

        def kept_back(route: topics.Route) -> set[str]:
            lively = {each.device for each in said.get(route, []) if not each.message.retain}
            return {each.device for each in said.get(route, [])} - lively

        started = intake.take_states(connection, of(topics.STATE), now, kept_back(topics.STATE))
        intake.take_reports(connection, of(topics.REPORTED), now, kept_back(topics.REPORTED))
        refused = intake.take_windows(connection, of(topics.METRICS))
        answers = [(each.device, each.fields["id"], each.decoded) for each in said.get(topics.COMMAND_STATE, [])]
        archive.take_command_states(self._host, connection, answers)
        return started, len(heard) - len(kept), refused

    def _decoded(self, message: Inbound) -> _Heard | None:
        if not message.payload:
            return None  # a retained message was deleted
        try:
            route, fields, decoded = messages.decode(message.topic, message.payload)
            if route not in self._handlers:
                return None
            return _Heard(message, route, fields, believed(decoded, self._host.now()))
        except InvalidPayload as error:
            self._dropped(message.topic, str(error))
        except Unbelievable as error:
            self._dropped(message.topic, f"{message.topic}: {error}")
        except Exception as error:
            self._fault(message.topic, error)
        return None

    def _on_message(self, connection: Connection, heard: _Heard) -> None:
        message = heard.message
        try:
            with connection.begin_nested():
                # Retained states come again at every connection, and must count again when a newer one was never seen.
                repeated = not fleet.is_new(connection, heard.decoded, self._host.now())
                if repeated and not heard.again:
                    self._count("duplicates")
                    return
                self._handlers[heard.route](connection, heard)
        except Exception as error:
            _raise_if_ours(error)
            self._fault(message.topic, error)

    def _refused(self, windows: int) -> None:
        if windows:
            self._count("windows_refused", windows)

    def _dropped(self, topic: str, why: str) -> None:
        self._count("payloads_invalid")
        if self.complaints.due(f"invalid {_kind(topic)}"):
            log.warning("dropped an invalid payload: %s", why)

    def _fault(self, topic: str, error: Exception) -> None:
        """A message brings about what nobody thought of: it alone is left out, all others are taken in."""
        self._count("faults")
        if self.complaints.due(f"fault {_kind(topic)}"):
            log.error("message on %s is left out", topic, exc_info=error)

    def _on_state(self, connection: Connection, heard: _Heard) -> None:
        now, retained = self._host.now(), heard.message.retain
        if fleet.take_state(connection, heard.device, heard.decoded, now, retained=retained):
            self._started(heard.device)

    def _on_event(self, connection: Connection, heard: _Heard) -> None:
        device, event = heard.device, heard.decoded
        if device != self._host.config.name:  # our own come back to us
            log.warning("%s: %s: %s", device, event.kind, event.text)
            fleet.take_event(connection, device, event)
            note(connection, self._host.config.notify, {**event.model_dump(), "source": device}, of_device=True)

    def _count(self, name: str, count: int = 1) -> None:
        self._counters[name] = self._counters.get(name, 0) + count


def subscriptions(site: str) -> list[str]:
    """The topics of every message that is taken in."""
    routes = (topics.STATE, topics.REPORTED, topics.SAMPLE, topics.METRICS, topics.EVENT, topics.COMMAND_STATE)
    return [route.filter(site=site) for route in routes]


def _kind(topic: str) -> str:
    return "/".join(topic.split("/")[:LEVELS_OF_A_KIND])[:256]


def _raise_if_ours(error: Exception) -> None:
    """Raise what is no message's doing: the database cannot be used, or is another trainer's now."""
    unusable = isinstance(error, OperationalError) or type(error) is DatabaseError
    if unusable or isinstance(error, Served) or (isinstance(error, DBAPIError) and error.connection_invalidated):
        raise error
