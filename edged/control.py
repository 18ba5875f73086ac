"""The control loop: everything that arrives from the broker and from the workers is handled here, in order, on one thread.

It decides nothing about updates (the table does) or answers (the policy does); it moves messages and keeps the clocks.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from typing import Any

from edged.acts import Seeded, UpdateEvent
from edged.announced import Announcement, Trainer
from edged.beats import Beats
from edged.clock import Clock
from edged.config import Settings
from edged.connection import announcements, reannouncements
from edged.core.tiers import Presence
from edged.handover import Handover
from edged.holds import Order
from edged.link import RECEIVE_MAX, Connected, Disconnected, Inbound, Link, Published
from edged.metrics import Window
from edged.orders import Orders
from edged.outgoing import Outgoing
from edged.pipeline import Pipeline
from edged.policies import Policies
from edged.questions import Questions
from edged.responders import Responders, presences
from edged.routes import Routes
from edged.sending import Sending
from edged.sources import Unsure, Waiting
from edged.store import OutboxFull, OutboxMessage, StorageFull, Store, StoreError
from edged.updater import Updater
from edged.uploads import Uploads
from edged.verdicts import Verdicts
from edged.wire import messages, topics
from edged.wire.messages import InvalidPayload

log = logging.getLogger(__name__)

TICK_S = 0.25
THREAD = "control"
STILL_S_MAX = 60.0  # one event may wait for the store's lock and for a slow disk, several times
NOT_YET = "not connected yet"
BATCH_MAX = 64  # messages handled before the outbox gets its turn
# Questions are acknowledged when they are answered, so those that wait fill the window in which the broker may send: the
# other half of it stays free for desired state, verdicts and commands.
OPEN_MAX = RECEIVE_MAX // 2
COMPLAINT_S = 60.0  # an invalid payload is logged once a topic and this long; every one is counted


class Wake:
    """Put into the inbox by a worker that has just filled the outbox."""


WAKE = Wake()


class Control:
    """Owns the link's inbox. `run` returns when `stop` was called."""

    def __init__(
        self, settings: Settings, store: Store, link: Link, outgoing: Outgoing, clock: Clock, window: Window,
        uploads: Uploads, pipelines: dict[str, Pipeline], responders: dict[tuple[str, str], Pipeline],
        beats: Beats | None = None,
    ) -> None:  # fmt: skip
        self._beats = beats or Beats(clock)
        self.looped = False  # `run` has come round
        self.health: Callable[[], dict[str, Any]] = dict  # set by the composition root: how the device is
        self.machine: Callable[[], dict[str, Any]] = dict  # likewise: the fields of wire.measured.Machine
        self.at_tick: dict[str, Callable[[], None]] = {}  # what else is done several times a second, by its name
        # What else is heard on the control loop, by its topic; set by the composition root.
        self.also: dict[topics.Route, Callable[[Inbound, dict[str, str], Any], None]] = {}
        self.wall = clock.now  # the time by which what waits is given up
        self._settings, self._store, self._link, self._outgoing = settings, store, link, outgoing
        self._clock, self._window, self._pipelines = clock, window, pipelines
        self._policies = Policies(pipelines, store, self.say)
        self.updater: Updater  # set by the composition root: each knows the other
        self.orders: Orders  # set by the composition root
        self.trainer = Trainer()
        self.link_state = NOT_YET
        self._retry: list[Any] = []  # what found the store failing; at most what the broker may send, and one a slot
        self._report_due = False
        self._rev = {"own": -1, "group": -1}
        self._own_desired = False
        self._complained: dict[str, float] = {}
        self._stopping = False
        self._ticked = self._window_closed = self._beat_at = clock.monotonic()
        self._beat_of: dict[str, str] = {}  # slot -> release at the last heartbeat of the responders
        self._handover = Handover(
            store, outgoing, uploads, lambda: self._settings.host.url or self.trainer.url, self._enqueue_and_wake
        )
        self._questions = Questions(
            store, link, outgoing, clock, pipelines, self._enqueue, self.wake, self._full,
            expects=lambda slot: self.updater.expects(slot),
        )  # fmt: skip
        self._verdicts = Verdicts(store, link, outgoing, clock, self._questions, self._guarded)
        presence = Presence()
        self._routes = Routes(presence, outgoing, clock, settings.pipelines)
        self._sending = Sending(store, link, clock, settings.delivery, self._routes, outgoing)
        self._responding = Responders(
            store, link, outgoing, clock, settings.responders, responders, presence,
            self._enqueue, self.wake, self._full,
        )  # fmt: skip
        self._handlers: dict[topics.Route, Callable[[Inbound, dict[str, str], Any], None]] = {
            topics.DESIRED: self._on_desired,
            topics.GROUP_DESIRED: self._on_desired,
            topics.VERDICT: self._on_verdict,
            topics.INFER: self._questions.on_infer,
            topics.COMMAND: self._on_command,
            topics.HOST: self._on_trainer,
            topics.METADATA: self._on_trainer,
            topics.RESPONDER: self._on_responder,
            topics.ESCALATION: self._responding.on_escalation,
        }

    # For other threads.

    def wake(self) -> None:
        """There is something new in the outbox."""
        self._link.inbox.put(WAKE)

    def report(self) -> None:
        """What this device runs has changed: publish it."""
        self._report_due = True
        self.wake()

    def wait(self, sample: str, waiting: Waiting) -> None:
        """Somebody waits for the verdict on `sample`."""
        self._link.inbox.put((sample, waiting))

    def ask_on(self, unsure: Unsure) -> None:
        """A responder here is not sure of its answer."""
        self._link.inbox.put(unsure)

    def stop(self) -> None:
        """End `run`, within TICK_S: called by a signal handler, which may have interrupted the inbox in its own lock."""
        self._stopping = True

    def answer(self, request: str, **fields: Any) -> None:
        """Reply to a request that no pipeline has any more."""
        self._enqueue(self._outgoing.reply(request, **fields))

    def say(self, kind: str, text: str, **detail: Any) -> None:
        """An event for people."""
        self._enqueue(self._outgoing.event(kind, text, **detail))

    # The loop.

    def run(self) -> None:
        """Handle what comes until `stop`."""
        self._beats.watch(THREAD, STILL_S_MAX)
        while not self._stopping:
            self._beats.beat(THREAD)
            news = self._drain(self._clock.real(TICK_S))
            self.looped = True
            now = self._clock.monotonic()
            ticks = now - self._ticked >= TICK_S
            if ticks:
                self._ticked = now
                self._guarded("tick", self._tick)
            if news or ticks or self._sending.held_back:
                self._guarded("outbox", self._sending.pump)
        self._beats.forget(THREAD)
        self._handover.close()

    def configure(self, settings: Settings) -> None:
        """Another configuration holds from now on; the pipelines and responders are already those of it."""
        before, self._settings = self._settings, settings
        self._routes.configure(settings.pipelines)
        self._sending.configure(settings.delivery)
        self._responding.configure(settings.responders)
        self._policies.apply()
        if self._link.connected:
            self._sending.announce(reannouncements(before, settings, self._outgoing, self.live()))
        self.report()

    def flush(self, seconds: float) -> None:
        """Before the end: hand over what is in the outbox, as far as that goes in this time."""
        deadline = self._clock.monotonic() + seconds
        while self._clock.monotonic() < deadline and self._link.connected:
            self._sending.pump()
            if self._sending.idle():
                break
            self._drain(0.05)
        self._guarded("outbox", self._sending.keep_progress)

    def _guarded(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except StoreError as error:
            self._store.count("store_errors")
            log.error("%s: %s", what, error)
        except Exception:  # the loop outlives every bug in a handler; the fault is counted
            self._store.count("control_faults")
            log.exception("%s", what)

    def _drain(self, timeout_s: float) -> bool:
        """Handle a batch of what has come; whether there was more than acknowledgements of what we sent."""
        news, acked = False, list[str]()
        try:
            for number in range(BATCH_MAX):
                event = self._link.inbox.get_nowait() if number else self._link.inbox.get(timeout=timeout_s)
                if isinstance(event, Published) and not event.error:
                    acked.append(event.ref)
                else:
                    news = True
                    self._handle(event)
        except queue.Empty:
            pass
        self._sending.acked(acked)
        self._retry += self._verdicts.commit()
        return news

    def _handle(self, event: Any) -> None:
        try:
            self._on_event(event)
        except StoreError as error:
            self._store.count("store_errors")
            log.error("inbox: %s", error)
            if isinstance(event, Inbound | UpdateEvent | Seeded):  # nobody brings it again, or only after a reconnect
                self._retry.append(event)
        except Exception:  # the loop outlives every bug in a handler; the fault is counted
            self._store.count("control_faults")
            log.exception("inbox")

    def _on_event(self, event: Any) -> None:
        self._beats.beat(THREAD)
        match event:
            case Inbound():
                self._on_message(event)
            case UpdateEvent() | Seeded():
                self.updater.handle(event)
            case Connected():
                self._on_connected(event)
            case Disconnected():
                if event.reason != self.link_state:
                    log.warning("broker: %s", event.reason)
                self.link_state = event.reason
                self._store.count("broker_disconnects")
            case Published():
                self._sending.refused(event)
            case (str() as sample, Waiting() as waiting):
                self._questions.wait(sample, waiting)
            case Unsure():
                self._responding.ask_on(event)

    def _on_connected(self, event: Connected) -> None:
        log.info("broker: connected%s", "" if event.session else " (new session)")
        self.link_state = "connected"
        self._store.count("broker_connects")
        self._sending.connected(session=event.session)
        self._beat_at, self._beat_of = self._clock.monotonic(), self.live()
        self._sending.announce(announcements(self._settings, self._outgoing, "online", self._beat_of))
        self._report_due = True

    def live(self) -> dict[str, str]:
        """slot -> active release."""
        return {name: r.active for name, r in self.updater.reports().items() if r.active}

    def _tick(self) -> None:
        if not self._link.ensure_alive():
            self._store.count("network_thread_restarts")
        for name, act in self.at_tick.items():
            self._guarded(name, act)
        again, self._retry = self._retry, []
        for message in again:
            self._handle(message)
        self._retry += self._verdicts.commit()
        self._guarded("outbox", self._sending.keep_progress)
        self._questions.tick()
        self._responding.tick()
        if self._routes.changed():  # who was to answer is gone, and somebody else could
            self._sending.resend_all()
        self._beat()
        now = self.wall()
        self._store.expire(now, self._outgoing.catalogue)
        self._store.drop_expired(now)
        self.updater.tick()
        if self._clock.monotonic() - self._window_closed >= self._settings.delivery.window_s:
            self.close_window()
        self._store.flush_counters()
        if self._report_due and self._link.connected:
            address = topics.REPORTED(site=self._outgoing.site, dev=self._outgoing.device)
            report = messages.Reported(
                **self._outgoing.stamp(), desired_rev=max(0, *self._rev.values()),
                models=self.updater.reports(), health={**self.health(), "counters": self._store.counters()},
                bad=self.updater.known_bad(),
            )  # fmt: skip
            self._report_due = not self._link.publish(address, messages.encode(report))

    def _beat(self) -> None:
        """The responders' heartbeat, when it is due or their models have changed, and what was announced before is out."""
        now, models = self._clock.monotonic(), self.live()
        due = now - self._beat_at >= self._settings.delivery.presence_s or models != self._beat_of
        if due and not self._sending.announcing:
            self._beat_at, self._beat_of = now, models
            self._sending.announce(presences(self._settings, self._outgoing, "online", models))

    def close_window(self) -> None:
        """End the metrics window and send what it counted."""
        self._window_closed = self._clock.monotonic()
        machine = messages.Machine(**self.machine())
        for fields in self._window.close(self._clock.now()):
            address = topics.METRICS(site=self._outgoing.site, dev=self._outgoing.device)
            body = messages.Metrics(**self._outgoing.stamp(), **fields, machine=machine)
            self._enqueue(self._outgoing.message(address, body))

    def _enqueue(self, message: OutboxMessage) -> None:
        """For what may be given up when the outbox is full: counted and said."""
        try:
            self._store.enqueue(message, self._clock.now())
        except (OutboxFull, StorageFull) as error:
            self._store.count("messages_dropped")
            log.error("%s: %s", message.topic, error)

    def _enqueue_and_wake(self, message: OutboxMessage) -> None:
        self._enqueue(message)
        self.wake()

    # Messages.

    def _on_message(self, message: Inbound) -> None:
        if not message.payload:  # a retained message was deleted
            self._link.acknowledge(message)
            return
        try:
            route, fields, decoded = messages.decode(message.topic, message.payload)
        except InvalidPayload as error:
            self._store.count("payloads_invalid")
            now = self._clock.monotonic()
            if now - self._complained.get(message.topic, -COMPLAINT_S) >= COMPLAINT_S:
                self._complained = {t: at for t, at in self._complained.items() if now - at < COMPLAINT_S}
                self._complained[message.topic] = now
                log.warning("dropped an invalid payload: %s", error)
            self._questions.on_invalid(message, str(error))
            self._link.acknowledge(message)
            return
        handler = self._handlers.get(route) or self.also.get(route)
        if handler is None:
            self._link.acknowledge(message)
        else:
            handler(message, fields, decoded)

    def _on_desired(self, message: Inbound, fields: dict[str, str], desired: messages.Desired) -> None:
        kind = "own" if "dev" in fields else "group"
        self._link.acknowledge(message)
        if desired.rev < self._rev[kind]:
            self._store.count("desired_outdated")
            return
        self._rev[kind] = desired.rev
        self._own_desired |= kind == "own"
        if kind == "group" and self._own_desired:
            return  # the device's own wins
        self.updater.desire(desired)
        self._policies.desire(desired.policy)
        self._report_due = True

    def _on_verdict(self, message: Inbound, _fields: dict[str, str], verdict: messages.Verdict) -> None:
        if self._responding.on_verdict(verdict):
            self._link.acknowledge(message)
        else:
            self._verdicts.take(message, verdict)

    def _on_trainer(self, message: Inbound, _fields: dict[str, str], said: Announcement) -> None:
        self._link.acknowledge(message)
        self.trainer.heard(said)

    def _on_responder(self, message: Inbound, fields: dict[str, str], responder: messages.ResponderState) -> None:
        self._link.acknowledge(message)
        if self._routes.heard(fields, responder, retained=message.retain):  # who waits for an answer asks at once
            self._sending.resend_all()

    def _full(self) -> bool:
        return self._questions.in_hand() + self._responding.in_hand() > OPEN_MAX

    def _on_command(
        self, message: Inbound, fields: dict[str, str],
        command: messages.SamplesCommand | messages.CancelCommand | Order,
    ) -> None:  # fmt: skip
        if isinstance(command, messages.CancelCommand):
            self._questions.on_cancel(message, fields, command)
            return
        self._link.acknowledge(message)  # the trainer repeats a command until it hears `done`
        if isinstance(command, messages.SamplesCommand):
            self._handover.submit(fields["id"], command)
        else:
            self.orders.take(fields["type"], fields["id"], command)

    def tell_command(self, kind: str, command: str, state: Any, reason: str) -> None:
        """How far a command is, on `up/cmd`."""
        self._enqueue(self._outgoing.command_state(kind, command, state, reason, {}))
