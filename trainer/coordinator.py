"""`trainer serve`: one loop that takes in what devices say, lets jobs and rollouts go on, and sends what is due.

Law of this file: messages are acknowledged after what they say is committed, and what is sent follows from rows alone:
desired states, commands and events are sent (again) until they are confirmed, so that a trainer or a broker that is
killed at any point loses nothing.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection, select, update
from sqlalchemy.exc import DataError, OperationalError

from edged.link import Connected, Disconnected, Inbound, Link, LinkOptions, Published, TooLarge
from edged.wire import messages, topics
from edged.wire.messages import InvalidPayload
from trainer import fleet
from trainer.blocks import Blocks
from trainer.catalogues import ask_for_catalogues
from trainer.collect import Collect, claims
from trainer.config import TrainerConfig
from trainer.corrections import Corrections
from trainer.database import Database, Served, commands, desired, devices, events, jobs, samples
from trainer.drift import Drift
from trainer.host import Host
from trainer.jobs import Jobs
from trainer.notices import Notices, note
from trainer.orders import Orders
from trainer.registration import Registrations
from trainer.releases import Registry
from trainer.rollouts import Rollouts
from trainer.server import Server, ServerOptions
from trainer.signing import Signing, repository_of
from trainer.status import status
from trainer.worker import Worker

log = logging.getLogger(__name__)

BATCH_MAX = 256  # messages taken in with one commit
TICK_S = 0.5
PRUNE_S = 600.0
COMPLAINT_S = 60.0  # an invalid payload is logged once a topic and this long; every one is counted
GOODBYE_S = 2.0


@dataclass(frozen=True, slots=True)
class _Desired:
    device: str
    rev: int


@dataclass(frozen=True, slots=True)
class _Event:
    id: str


class Coordinator:
    """One trainer at work. `run` returns after `stop`, which any thread or signal handler may call."""

    def __init__(self, config: TrainerConfig, config_path: Path) -> None:
        """Open the database and the registry; raises what they raise, and BadCredentials for TLS files."""
        config.data_dir.mkdir(parents=True, exist_ok=True)
        database = Database(config.database_at)
        database.serve(config.name)
        self.host = Host(config, config_path.resolve(), database, Registry(config.releases))
        self.jobs = Jobs(self.host, Worker(self.host, config.name) if config.worker.embedded else None)
        self.rollouts = Rollouts(self.host)
        self.collect = Collect(self.host)
        self.drift = Drift(self.host)
        self.orders = Orders(self.host, self.jobs, self.rollouts, self.collect)
        self.signing = Signing(self.host)
        self.notices = Notices(config.notify, database, self.host.now)
        self.registrations = Registrations(self.host, lambda: self.url)
        self.counters: dict[str, int] = {}
        self.server = Server(
            ServerOptions(
                config.http.host, config.http.port, config.http.sample_bytes_max,
                config.http.ca, config.http.certificate, config.http.key, config.http.crl,
            ),
            self.host.registry,
            config.samples,
            claimed=self._is_claimed,
            status=lambda: status(self.host, self._all_counters(), self.link.connected),
            arrived=lambda _digest: None if self._stopping.is_set() else self._wake.set(),
            metadata=self._metadata,
        )  # fmt: skip
        self.blocks = Blocks(
            config, self.host.registry, claimed=self._is_claimed, arrived=lambda _digest: self._wake.set(),
            metadata=self._metadata_files,
        )  # fmt: skip
        self._address = topics.HOST(trainer=config.name)
        self.link = Link(
            _link_options(config), _subscriptions(config.site), will=(self._address, self._presence("offline"))
        )
        self.corrections = Corrections(self.host, self.link.publish)
        self._stopping = threading.Event()
        self._wake = threading.Event()  # pixels have arrived: a job may go on before the next tick
        self._confirmed: dict[str, int] = {}  # device -> rev of the desired state that this connection has confirmed
        self._flying: set[_Desired | _Event] = set()
        self._sent_at: dict[str, float] = {}  # command -> when it was last sent (monotonic)
        self._complained: dict[str, float] = {}
        self._present = False  # whether this connection has been told that the trainer is here
        self._ticked = self._pruned = -1e9
        self._handlers: dict[topics.Route, Callable[[Connection, str, dict[str, str], Any], None]] = {
            topics.STATE: self._on_state,
            topics.REPORTED: lambda c, dev, _f, m: fleet.take_reported(c, dev, m, self.host.now()),
            topics.SAMPLE: lambda c, dev, _f, m: fleet.take_sample(c, dev, m),
            topics.METRICS: lambda c, dev, _f, m: fleet.take_metrics(c, dev, m),
            topics.EVENT: self._on_event,
            topics.COMMAND_STATE: lambda c, _dev, f, m: fleet.take_command_state(c, f["id"], m),
        }

    @property
    def url(self) -> str:
        """The address that devices are told."""
        return self.host.config.http.url or self.server.url

    def run(self) -> None:
        """Serve until `stop`; raises OSError when the HTTP address cannot be bound."""
        self.server.start()
        log.info("serving releases and taking samples at %s", self.url)
        self.link.start()
        self.blocks.start()
        self.registrations.start()
        self.notices.start()
        try:
            while not self._stopping.is_set():
                self._take_in()
                if self._wake.is_set() or time.monotonic() - self._ticked >= TICK_S:
                    self._wake.clear()
                    self._ticked = time.monotonic()
                    for name, act in (
                        ("lock", self.host.database.keep),
                        ("orders", self.orders.tick), ("jobs", self.jobs.tick), ("rollouts", self.rollouts.tick),
                        ("signing", self.signing.tick), ("pulls", self.collect.tick), ("corrections", self.corrections.tick),
                        ("catalogue", lambda: ask_for_catalogues(self.host)), ("prune", self._prune),
                        ("drift", self.drift.tick),
                    ):  # fmt: skip
                        self._guarded(name, act)
                self._guarded("send", self._send)
                self.link.ensure_alive()
        finally:
            self._end()

    def stop(self) -> None:
        """End `run`; a training child is ended with it and starts again with the next one."""
        self._stopping.set()

    def _end(self) -> None:
        self.jobs.stop()
        self.drift.stop()
        self.registrations.stop()
        self.notices.stop()
        self.blocks.stop()
        if self.link.publish(self._address, self._presence("offline"), "goodbye"):
            deadline = time.monotonic() + GOODBYE_S
            while time.monotonic() < deadline:
                try:
                    said = self.link.inbox.get(timeout=0.1)
                except queue.Empty:
                    continue
                if isinstance(said, Published) and said.ref == "goodbye":
                    break
        self.link.stop()
        self.server.stop()
        self.host.database.close()

    def _guarded(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Served:
            raise  # the database is another trainer's now: this one may not go on
        except Exception:  # one broken job must not end the service of all others; it is counted and logged
            self._count("faults")
            log.exception("%s", what)

    def _all_counters(self) -> dict[str, int]:
        return {**self.counters, **self.blocks.counters, **self.notices.counters}

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1

    # What comes in.

    def _take_in(self) -> None:
        """Take in what has arrived with one commit, then acknowledge it."""
        batch: list[Inbound] = []
        try:
            event = self.link.inbox.get(timeout=0.1)
            while True:
                if isinstance(event, Inbound):
                    batch.append(event)
                else:
                    self._on_link(event)
                if len(batch) >= BATCH_MAX:
                    break
                event = self.link.inbox.get_nowait()
        except queue.Empty:
            pass
        while batch:
            try:
                with self.host.database.write() as connection:
                    for message in batch:
                        self._on_message(connection, message)
                break
            except OperationalError as error:  # the disk is full, or busy for too long
                self._count("database_errors")
                log.error("messages wait, the database cannot be written: %s", error.orig)
                if self._stopping.wait(1.0):
                    return  # not acknowledged: they come again
        # Acknowledge after commit: a crash before this means that they come again, never that they are lost.
        for message in batch:
            self.link.acknowledge(message)

    def _on_link(self, event: Any) -> None:
        if isinstance(event, Connected):
            log.info("broker: connected%s", "" if event.session else " (new session)")
            self._confirmed.clear()
            self._flying.clear()
            self._sent_at.clear()
            self._present = False
            if not event.session:  # what devices sent while nobody was subscribed is gone
                with self.host.database.write() as connection:
                    connection.execute(update(devices).values(listed_at=0.0))
        elif isinstance(event, Disconnected):
            self._count("broker_disconnects")
            log.warning("broker: %s", event.reason)
        elif isinstance(event, Published):
            self._on_published(event)

    def _on_published(self, event: Published) -> None:
        self._flying.discard(event.ref)
        if event.error:
            self._count("broker_refusals")
            log.warning("the broker refused %s: %s; check its access rules", event.ref, event.error)
        if isinstance(event.ref, _Desired):
            # A refused one waits for the next connection: asking again at once would not change the broker's mind.
            self._confirmed[event.ref.device] = max(event.ref.rev, self._confirmed.get(event.ref.device, -1))
        elif isinstance(event.ref, _Event):
            with self.host.database.write() as connection:
                connection.execute(update(events).where(events.c.id == event.ref.id).values(published=True))

    def _on_message(self, connection: Connection, message: Inbound) -> None:
        if not message.payload:
            return  # a retained message was deleted
        try:
            route, fields, decoded = messages.decode(message.topic, message.payload)
        except InvalidPayload as error:
            self._complain(message.topic, error)
            return
        handler = self._handlers.get(route)
        if handler is None:
            return
        try:
            with connection.begin_nested():
                # Retained states come again at every connection, and must count again when a newer one was never seen.
                repeated = not fleet.is_new(connection, decoded)
                if repeated and not message.retain:
                    self._count("duplicates")
                    return
                handler(connection, fields["dev"], fields, decoded)
        except (
            ValueError,
            TypeError,
            KeyError,
            ValidationError,
            DataError,
        ):  # PostgreSQL takes no NUL, NaN or huge number
            self._count("faults")
            log.exception("message on %s", message.topic)

    def _complain(self, topic: str, error: InvalidPayload) -> None:
        self._count("payloads_invalid")
        now = time.monotonic()
        if now - self._complained.get(topic, -COMPLAINT_S) >= COMPLAINT_S:
            self._complained = {t: at for t, at in self._complained.items() if now - at < COMPLAINT_S}
            self._complained[topic] = now
            log.warning("dropped an invalid payload: %s", error)

    def _on_state(self, connection: Connection, device: str, _fields: dict[str, str], state: messages.State) -> None:
        if fleet.take_state(connection, device, state, self.host.now()):
            self._forget_sent(connection, device)

    def _forget_sent(self, connection: Connection, device: str) -> None:
        """A device that has just started is told at once what it has not confirmed."""
        for command in connection.execute(select(commands.c.id).where(commands.c.device == device)).scalars():
            self._sent_at.pop(command, None)

    def _on_event(self, connection: Connection, device: str, _fields: dict[str, str], event: messages.Event) -> None:
        if device != self.host.config.name:  # our own come back to us
            log.warning("%s: %s: %s", device, event.kind, event.text)
            fleet.take_event(connection, device, event)
            note(connection, self.host.config.notify, {**event.model_dump(), "source": device})

    # What goes out.

    def _send(self) -> None:
        if self.link.room() == 0:
            return
        if not self._present:
            self._present = self.link.publish(self._address, self._presence("online"))
        with self.host.database.read() as connection:
            states = connection.execute(select(desired)).all()
            open_commands = connection.execute(
                select(commands, devices.c.online)
                .join(devices, devices.c.device == commands.c.device)
                .where(commands.c.state.notin_(fleet.ENDED))
                .order_by(commands.c.created)
            ).all()
            news = connection.execute(
                select(events).where(events.c.published.is_(False)).order_by(events.c.ts).limit(8)
            ).all()
        for row in states:
            self._send_desired(row)
        for row in open_commands:
            # Only to who listens: what waits in the broker for a device that is off crowds out what matters more.
            due = time.monotonic() - self._sent_at.get(row.id, -1e9) >= self.host.config.command_resend_s
            if row.online and due:
                self._send_command(row)
        for row in news:
            self._send_event(row)

    def _send_desired(self, row: Any) -> None:
        ref = _Desired(row.device, row.rev)
        if self._confirmed.get(row.device, -1) >= row.rev or ref in self._flying:
            return
        state = messages.Desired(
            **self.host.envelope(), rev=row.rev, models=row.models, adapters=row.adapters, policy=row.policy
        )
        address = topics.DESIRED(site=self.host.config.site, dev=row.device)
        if self.link.publish(address, messages.encode(state), ref):
            self._flying.add(ref)

    def _send_command(self, row: Any) -> None:
        body, claim = dict(row.body), row.body.get("action") == "claim"
        by_blocks = self.host.config.blocks.samples and self.blocks.serving
        if row.type == "samples":
            body["upload_url"] = f"{self.url}/samples" if claim and not by_blocks else ""
        command = messages.COMMANDS[row.type](**self.host.envelope(), **body)
        address = topics.COMMAND(site=self.host.config.site, dev=row.device, type=row.type, id=row.id)
        try:
            if self.link.publish(address, messages.encode(command), ("command", row.id)):
                self._sent_at[row.id] = time.monotonic()
                if claim and by_blocks:
                    self.blocks.pull(row.device, self._claimed_of(row))
        except TooLarge as error:
            self._sent_at[row.id] = time.monotonic()
            self._count("messages_too_large")
            log.error("%s", error)

    def _send_event(self, row: Any) -> None:
        ref = _Event(row.id)
        if ref in self._flying:
            return
        fields = {**self.host.envelope(), "id": row.id, "ts": row.ts}
        event = messages.Event(**fields, kind=row.kind, text=row.text, detail=row.detail)
        address = topics.EVENT(site=self.host.config.site, dev=self.host.config.name)
        if self.link.publish(address, messages.encode(event), ref):
            self._flying.add(ref)

    def _presence(self, state: str) -> bytes:
        said: dict[str, Any] = {"state": state}
        if state == "online":
            said |= {"url": self.url, "mirrors": self.host.config.http.mirrors, "blocks": self.blocks.serving}
        return messages.encode(messages.HostState(**self.host.envelope(), **said))

    # What is done now and then.

    def _prune(self) -> None:
        if time.monotonic() - self._pruned >= PRUNE_S:
            self._pruned = time.monotonic()
            with self.host.database.write() as connection:
                fleet.prune(connection, self.host.now())

    def _metadata_files(self) -> dict[str, Path]:
        repository = repository_of(self.host.config)
        return repository.files() if repository is not None else {}

    def _metadata(self, name: str) -> bytes | None:
        repository = repository_of(self.host.config)
        return repository.read(name) if repository is not None else None

    def _claimed_of(self, row: Any) -> dict[str, int]:
        """SHA-256 -> bytes of the samples that a claim names."""
        query = select(samples.c.id, samples.c.sha256, samples.c.bytes).where(samples.c.job == row.job)
        with self.host.database.read() as connection:
            known = connection.execute(query.where(samples.c.device == row.device)).all()
        named = set(row.body["samples"])
        return {each.sha256: each.bytes for each in known if each.id in named}

    def _is_claimed(self, digest: str) -> bool:
        with self.host.database.read() as connection:
            query = (
                select(samples.c.id)
                .join(jobs, jobs.c.id == samples.c.job)
                .where(samples.c.sha256 == digest, jobs.c.status == "claiming")
            )
            return connection.execute(query.limit(1)).first() is not None or claims(connection, digest)


def _link_options(config: TrainerConfig) -> LinkOptions:
    broker = config.broker
    return LinkOptions(
        broker.host, broker.port, config.name, broker.ca, broker.certificate, broker.key,
        keepalive_s=broker.keepalive_s, session_expiry_s=broker.session_expiry_s,
    )  # fmt: skip


def _subscriptions(site: str) -> list[str]:
    routes = (topics.STATE, topics.REPORTED, topics.SAMPLE, topics.METRICS, topics.EVENT, topics.COMMAND_STATE)
    return [route.filter(site=site) for route in routes]
