"""The control loop: everything that arrives from the broker and from the workers is handled here, in order, on one thread.

It decides nothing about updates (the table does) or answers (the policy does); it moves messages and keeps the clocks.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from edged.acts import UpdateEvent
from edged.carrier import HttpCarrier
from edged.clock import Clock
from edged.config import Settings
from edged.core.policy import Policy
from edged.handover import Handover
from edged.link import Connected, Disconnected, Inbound, Link, Published, TooLarge
from edged.metrics import Window
from edged.outgoing import Outgoing
from edged.pipeline import Pipeline
from edged.questions import Questions
from edged.sources import Waiting
from edged.store import OutboxFull, OutboxMessage, StorageFull, Store, StoreError
from edged.updater import Updater
from edged.wire import messages, topics
from edged.wire.messages import InvalidPayload

log = logging.getLogger(__name__)

TICK_S = 0.25
BATCH_MAX = 64  # messages handled before the outbox gets its turn
COMPLAINT_S = 60.0  # an invalid payload is logged once a topic and this long; every one is counted


class Wake:
    """Put into the inbox by a worker that has just filled the outbox."""


WAKE = Wake()


class Control:
    """Owns the link's inbox. `run` returns when `stop` was called."""

    def __init__(
        self, settings: Settings, store: Store, link: Link, outgoing: Outgoing, clock: Clock, window: Window,
        carrier: HttpCarrier, pipelines: dict[str, Pipeline], responders: dict[tuple[str, str], Pipeline],
    ) -> None:  # fmt: skip
        self._settings, self._store, self._link, self._outgoing = settings, store, link, outgoing
        self._clock, self._window, self._carrier = clock, window, carrier
        self._pipelines, self._responders = pipelines, responders
        self.updater: Updater  # set by the composition root: each knows the other
        self.host_url: str | None = None
        self.link_state = "not connected yet"
        self._births: list[tuple[topics.Address, bytes]] = []  # announcements that the link has not taken yet
        self._attempts: dict[str, int] = {}
        self._retry: list[Inbound] = []  # messages that found the store failing; at most what the broker may send
        self._report_due = False
        self._rev = {"own": -1, "group": -1}
        self._own_desired = False
        self._complained: dict[str, float] = {}
        self._stopping = False
        self._ticked = self._window_closed = clock.monotonic()
        self._handover = Handover(
            store, outgoing, carrier, lambda: settings.host.url or self.host_url, self._enqueue_and_wake
        )
        self._questions = Questions(store, link, outgoing, clock, pipelines, responders, self._enqueue, self.wake)
        self._handlers: dict[topics.Route, Callable[[Inbound, dict[str, str], Any], None]] = {
            topics.DESIRED: self._on_desired,
            topics.GROUP_DESIRED: self._on_desired,
            topics.VERDICT: self._on_verdict,
            topics.INFER: self._questions.on_infer,
            topics.COMMAND: self._on_command,
            topics.HOST: self._on_host,
            topics.RESPONDER: self._on_responder,
            topics.ESCALATION: self._questions.on_escalation,
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

    def stop(self) -> None:
        """End `run`, within TICK_S: called by a signal handler, which may have interrupted the inbox in its own lock."""
        self._stopping = True

    def say(self, kind: str, text: str, **detail: Any) -> None:
        """An event for people."""
        self._enqueue(self._outgoing.event(kind, text, **detail))

    # The loop.

    def run(self) -> None:
        """Handle what comes until `stop`."""
        while not self._stopping:
            self._drain(self._clock.real(TICK_S))
            now = self._clock.monotonic()
            if now - self._ticked >= TICK_S:
                self._ticked = now
                self._guarded("tick", self._tick)
            self._guarded("outbox", self._pump)
        self._handover.close()

    def flush(self, seconds: float) -> None:
        """Before the end: hand over what is in the outbox, as far as that goes in this time."""
        deadline = self._clock.monotonic() + seconds
        while self._clock.monotonic() < deadline and self._link.connected:
            self._pump()
            if not self._store.due(self._clock.now(), 1) and not self._attempts:
                return
            self._drain(0.05)

    def _guarded(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except StoreError as error:
            self._store.count("store_errors")
            log.error("%s: %s", what, error)
        except Exception:  # the loop outlives every bug in a handler; the fault is counted
            self._store.count("control_faults")
            log.exception("%s", what)

    def _drain(self, timeout_s: float) -> None:
        acked: list[str] = []
        try:
            for number in range(BATCH_MAX):
                event = self._link.inbox.get_nowait() if number else self._link.inbox.get(timeout=timeout_s)
                if isinstance(event, Published) and not event.error:
                    acked.append(event.ref)
                else:
                    self._handle(event)
        except queue.Empty:
            pass
        if acked:
            self._guarded("outbox", lambda: self._on_acked(acked))

    def _handle(self, event: Any) -> None:
        try:
            self._on_event(event)
        except StoreError as error:
            self._store.count("store_errors")
            log.error("inbox: %s", error)
            if isinstance(event, Inbound):  # not acknowledged, so it would come again only after a reconnect
                self._retry.append(event)
        except Exception:  # the loop outlives every bug in a handler; the fault is counted
            self._store.count("control_faults")
            log.exception("inbox")

    def _on_event(self, event: Any) -> None:
        match event:
            case Inbound():
                self._on_message(event)
            case UpdateEvent():
                self.updater.handle(event)
            case Connected():
                self._on_connected(event)
            case Disconnected():
                if event.reason != self.link_state:
                    log.warning("broker: %s", event.reason)
                self.link_state = event.reason
                self._store.count("broker_disconnects")
            case Published():
                log.warning("broker refused message %s: %s", event.ref, event.error)
                self._store.count("broker_refusals")
                attempts = self._attempts.pop(event.ref, 1)
                self._store.refused(event.ref, event.error, self._clock.now() + self._retry_s(attempts))
            case (str() as sample, Waiting() as waiting):
                self._questions.wait(sample, waiting)

    def _on_acked(self, ids: list[str]) -> None:
        now = self._clock.now()
        # An escalation's row stays until its verdict: how soon it is sent again grows with each attempt.
        by_attempts: dict[int, list[str]] = {}
        for message_id in ids:
            by_attempts.setdefault(self._attempts.pop(message_id, 1), []).append(message_id)
        for attempts, group in by_attempts.items():
            self._store.acked_many(group, now, now + self._retry_s(attempts))

    def _retry_s(self, attempts: int) -> float:
        d = self._settings.delivery
        return float(min(d.retry_s * 2 ** min(attempts - 1, 16), d.retry_s_max))

    def _on_connected(self, event: Connected) -> None:
        log.info("broker: connected%s", "" if event.session else " (new session)")
        self.link_state = "connected"
        self._store.count("broker_connects")
        self._attempts.clear()  # what was under way is sent again when it is due: receivers know repetitions by their id
        if not event.session:  # whatever the broker had queued or we had sent may be gone
            self._store.resend_all(self._clock.now())
        self._births = announcements(self._settings, self._outgoing, "online", self.live())
        self._report_due = True

    def live(self) -> dict[str, str]:
        """slot -> active release."""
        return {name: r.active for name, r in self.updater.reports().items() if r.active}

    def _tick(self) -> None:
        now = self._clock.now()
        self._link.ensure_alive()
        again, self._retry = self._retry, []
        for message in again:
            self._handle(message)
        self._questions.tick(now)
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
                models=self.updater.reports(), health={"counters": self._store.counters()},
            )  # fmt: skip
            self._report_due = not self._link.publish(address, messages.encode(report))

    def close_window(self) -> None:
        """End the metrics window and send what it counted."""
        self._window_closed = self._clock.monotonic()
        for fields in self._window.close(self._clock.now()):
            address = topics.METRICS(site=self._outgoing.site, dev=self._outgoing.device)
            self._enqueue(self._outgoing.message(address, messages.Metrics(**self._outgoing.stamp(), **fields)))

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

    def _pump(self) -> None:
        """Hand due rows to the link, never more than it may hold; who we are goes first."""
        while self._births and self._link.publish(*self._births[0]):
            del self._births[0]
        room = self._link.room()
        if not room:
            return
        now = self._clock.now()
        for row in self._store.due(now, room + len(self._attempts)):
            m = row.message
            if m.id in self._attempts:
                continue  # the link still holds it
            expiry = None if m.expires is None else max(1, int(m.expires - now))
            address = topics.Address(m.topic, m.qos, m.retain, expiry)
            try:
                if not self._link.publish(address, m.payload, m.id, correlation=m.correlation):
                    return
            except TooLarge as error:
                log.error("%s", error)
                self._store.count("messages_too_large")
                self._store.bury(m.id, str(error))
                continue
            self._attempts[m.id] = row.attempts + 1
            self._store.sent(m.id, now, now + self._retry_s(row.attempts + 1))

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
        handler = self._handlers.get(route)
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
        for name in desired.policy.keys() - self._pipelines.keys():
            self._refuse_policy(name, f"no such pipeline; known: {', '.join(sorted(self._pipelines)) or 'none'}")
        for name, pipeline in self._pipelines.items():  # one that is not named has its configured policy again
            try:
                policy: Policy = replace(pipeline.config.policy, **desired.policy.get(name, {}))
                pipeline.policy = replace(policy, escalate=policy.escalate and bool(pipeline.config.escalate_to))
            except (TypeError, ValueError) as error:
                self._refuse_policy(name, str(error))
        self._report_due = True

    def _refuse_policy(self, pipeline: str, reason: str) -> None:
        self._store.count("desired_invalid")
        self.say("bad_policy", f"desired policy of {pipeline!r}: {reason}")

    def _on_verdict(self, message: Inbound, _fields: dict[str, str], verdict: messages.Verdict) -> None:
        sample = self._store.label(
            verdict.sample, verdict.status, [box.model_dump(mode="json") for box in verdict.label], verdict.confidence,
            verdict.provenance.model_dump(mode="json"), verdict.reason, self._clock.now(), self._outgoing.catalogue,
        )  # fmt: skip
        # Acknowledge after commit: a crash before it means that the verdict comes again, never that it is lost.
        self._link.acknowledge(message)
        if sample is None:
            self._store.count("verdicts_unknown")
            return
        self._store.count("verdicts" if sample.changed else "verdicts_repeated")
        self._questions.decided(verdict)

    def _on_host(self, message: Inbound, _fields: dict[str, str], host: messages.HostState) -> None:
        self._link.acknowledge(message)
        if host.state == "online" and host.url:
            self.host_url = host.url

    def _on_responder(self, message: Inbound, _fields: dict[str, str], responder: messages.ResponderState) -> None:
        self._link.acknowledge(message)
        if (
            responder.state == "online" and not message.retain
        ):  # it has just come: who waited for an answer asks at once
            self._store.resend_all(self._clock.now())

    def _on_command(self, message: Inbound, fields: dict[str, str], command: messages.SamplesCommand) -> None:
        self._link.acknowledge(message)  # the trainer repeats a command until it hears `done`
        self._handover.submit(fields["id"], command)


def announcements(
    settings: Settings, outgoing: Outgoing, state: str, models: dict[str, str]
) -> list[tuple[topics.Address, bytes]]:
    """Birth (or death) certificate of the device and of each responder in it."""
    body = messages.State(
        **outgoing.stamp(), state=state, device=outgoing.device, profile=settings.device.profile,  # type: ignore[arg-type]
        tier=settings.device.tier, models=models, capabilities=sorted(settings.pipelines),
    )  # fmt: skip
    out = [(topics.STATE(site=outgoing.site, dev=outgoing.device), messages.encode(body))]
    for name, responder in settings.responders.items():
        address = topics.RESPONDER(tier=responder.tier, task=responder.task, responder=f"{outgoing.device}.{name}")
        release = models.get(responder.slot, "")
        presence = messages.ResponderState(**outgoing.stamp(), state=state, release=release)  # type: ignore[arg-type]
        out.append((address, messages.encode(presence)))
    return out
