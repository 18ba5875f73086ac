"""`trainer serve`: one loop that takes in what devices say, lets jobs and rollouts go on, and sends what is due.

Law of this file: messages are acknowledged after what they say is committed, and what is sent follows from rows alone:
desired states, commands and events are sent (again) until they are confirmed, so that a trainer or a broker that is
killed at any point loses nothing.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select

from edged.link import Connected, Link, LinkOptions, Published, TooLarge
from edged.wire import messages, topics
from trainer import fleet
from trainer.blocks import Blocks
from trainer.catalogues import ask_for_catalogues
from trainer.clock import Clock, SystemClock
from trainer.collect import Collect, claims
from trainer.config import TrainerConfig
from trainer.corrections import Corrections
from trainer.database import Database, Served, events, jobs, samples
from trainer.drift import Drift
from trainer.due import Due
from trainer.host import Host
from trainer.incoming import Incoming, SentEvent, subscriptions
from trainer.jobs import Jobs
from trainer.mirror import Mirroring
from trainer.notices import Notices
from trainer.orders import Orders
from trainer.registration import Registrations
from trainer.releases import Registry
from trainer.removed import Clearing, kept_by_the_broker
from trainer.rollouts import Rollouts
from trainer.server import Server, ServerOptions
from trainer.signing import Signing, repository_of
from trainer.status import status
from trainer.worker import Worker

log = logging.getLogger(__name__)

TICK_S = 0.5
PRUNE_S = 600.0
GOODBYE_S = 2.0
SHORT_CHARS = 500  # of an event's text that the broker does not take whole


@dataclass(frozen=True, slots=True)
class _Desired:
    device: str
    rev: int


@dataclass(frozen=True, slots=True)
class Outside:
    """What of the world a coordinator works with: its clock, its chance, and its connection to the broker. `link`: None for
    `edged.link.Link`; else made of the same arguments."""

    clock: Clock = field(default_factory=SystemClock)
    entropy: Callable[[int], bytes] = os.urandom
    link: Callable[..., Any] | None = None


class Coordinator:
    """One trainer at work. `run` returns after `stop`, which any thread or signal handler may call."""

    def __init__(self, config: TrainerConfig, config_path: Path, outside: Outside | None = None) -> None:
        """Open the database and the registry; raises what they raise, and BadCredentials for TLS files."""
        config.data_dir.mkdir(parents=True, exist_ok=True)
        outside = outside or Outside()
        database = Database(config.database_at)
        database.serve(config.name)
        self.host = Host(
            config, config_path.resolve(), database, Registry(config.releases),
            clock=outside.clock, entropy=outside.entropy,
        )  # fmt: skip
        self._monotonic = outside.clock.monotonic
        self.jobs = Jobs(self.host, Worker(self.host, config.name) if config.worker.embedded else None)
        self.rollouts = Rollouts(self.host)
        self.collect = Collect(self.host)
        self.drift = Drift(self.host)
        self.orders = Orders(self.host, self.jobs, self.rollouts, self.collect)
        self.signing = Signing(self.host)
        self.mirroring = Mirroring(self.host)
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
        self.link: Link = (outside.link or Link)(
            _link_options(config), subscriptions(config.site), will=(self._address, self._presence("offline"))
        )
        self.corrections = Corrections(self.host, self.link.publish)
        self._stopping = threading.Event()
        self._wake = threading.Event()  # pixels have arrived: a job may go on before the next tick
        self._due = Due(database)
        self._clearing = Clearing(self._monotonic)
        self._flying: set[SentEvent] = set()
        self._sent_at: dict[str, dict[str, float]] = {}  # device -> command -> when it was last sent (monotonic)
        self._present = False  # whether this connection has been told that the trainer is here
        self._afresh = False  # whether it has been told nothing yet
        self._ticked = self._pruned = -1e9
        self.incoming = Incoming(
            self.host, self.link, self.counters, self._stopping, started=self._started, changed=self._on_link,
            removed=self._clearing.spoke,
        )  # fmt: skip

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
                self.turn()
        finally:
            self._end()

    def turn(self) -> None:
        """Once around: take in what has arrived, let everything go on that is due, send."""
        self.incoming.take_in()
        if self._wake.is_set() or self._monotonic() - self._ticked >= TICK_S:
            self._wake.clear()
            self._ticked = self._monotonic()
            for name, act in (
                ("lock", self.host.database.keep),
                ("orders", self.orders.tick), ("jobs", self.jobs.tick), ("rollouts", self.rollouts.tick),
                ("signing", self.signing.tick), ("pulls", self.collect.tick), ("corrections", self.corrections.tick),
                ("catalogue", lambda: ask_for_catalogues(self.host)), ("prune", self._prune),
                ("drift", self.drift.tick), ("mirror", self.mirroring.tick),
            ):  # fmt: skip
                self._guarded(name, act)
        self._guarded("send", self._send)
        self.link.ensure_alive()

    def stop(self) -> None:
        """End `run`; a training child is ended with it and starts again with the next one."""
        self._stopping.set()

    def _end(self) -> None:
        self.jobs.stop()
        self.drift.stop()
        self.mirroring.stop()
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
            if self.incoming.complaints.due(what):
                log.exception("%s", what)

    def _all_counters(self) -> dict[str, int]:
        parts = (self.blocks, self.notices, self.mirroring, self.drift, self.rollouts.faults, self.jobs.faults)
        return self.counters | {name: count for part in parts for name, count in part.counters.items()}

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1

    def _started(self, device: str) -> None:
        """A device that has just started is told at once what it has not confirmed."""
        self._sent_at.pop(device, None)

    def _on_link(self, event: Connected | Published) -> None:
        """Only what is remembered: rows follow with what else comes in."""
        if isinstance(event, Connected):
            self._flying.clear()
            self._sent_at.clear()
            self._present, self._afresh = False, True
        else:
            # A desired state that was refused waits for the next connection: asking again at once would not change the
            # broker's mind; one that was lost with its connection is told again on the next one.
            self._flying.discard(event.ref)

    # What goes out.

    def _send(self) -> None:
        if self.link.room() == 0:
            return
        if not self._present:
            self._present = self.link.publish(self._address, self._presence("online"))
        with self.host.database.read() as connection:
            if self._afresh:
                self._due.connected(connection)
                self._afresh = False
            self._due.again(self._clearing.due())
            heard, states = self.host.lately(), self._due.states(connection)
            open_commands = self._due.commands(connection)
            news = connection.execute(
                select(events).where(events.c.published.is_(False)).order_by(events.c.ts).limit(8)
            ).all()
        for row in states:
            if not self._send_desired(row):
                break
            self._due.told(row.device)
        for row in open_commands:
            if self.link.room() <= 0:
                break
            sent_at = self._sent_at.get(row.device, {}).get(row.id, -1e9)
            quiet = not heard.holds(row.seen_at)
            pause_s = self.host.config.silent_s_max if quiet else self.host.config.command_resend_s
            if self._monotonic() - sent_at >= pause_s:
                self._send_command(row)
            self._due.looked_at(row)
        for row in news:
            self._send_event(row)

    def _send_desired(self, row: Any) -> bool:
        """Whether it is on its way, or can never be."""
        if row.rev is None:  # the device was removed: the broker is to keep nothing of it
            kept = kept_by_the_broker(self.host.config.site, row.device)
            return all(self.link.publish(address, b"", ref) for address, ref in kept)
        state = messages.Desired(
            **self.host.envelope(), rev=row.rev, models=row.models, adapters=row.adapters, policy=row.policy
        )
        address = topics.DESIRED(site=self.host.config.site, dev=row.device)
        try:
            return self.link.publish(address, messages.encode(state), _Desired(row.device, row.rev))
        except TooLarge as error:
            self._count("messages_too_large")
            log.error("%s", error)
            return True

    def _send_command(self, row: Any) -> None:
        body, claim = dict(row.body), row.body.get("action") == "claim"
        by_blocks = self.host.config.blocks.samples and self.blocks.serving
        if row.type == "samples":
            body["upload_url"] = f"{self.url}/samples" if claim and not by_blocks else ""
        command = messages.COMMANDS[row.type](**self.host.envelope(), **body)
        address = topics.COMMAND(site=self.host.config.site, dev=row.device, type=row.type, id=row.id)
        try:
            if self.link.publish(address, messages.encode(command), ("command", row.id)):
                self._sent(row)
                if claim and by_blocks:
                    self.blocks.pull(row.device, self._claimed_of(row))
        except TooLarge as error:
            self._sent(row)
            self._count("messages_too_large")
            log.error("%s", error)

    def _sent(self, row: Any) -> None:
        self._sent_at.setdefault(row.device, {})[row.id] = self._monotonic()

    def _send_event(self, row: Any) -> None:
        ref = SentEvent(row.id)
        if ref in self._flying or self.incoming.confirmed(row.id):
            return
        fields = {**self.host.envelope(), "id": row.id, "ts": row.ts}
        event = messages.Event(**fields, kind=row.kind, text=row.text, detail=row.detail)
        address = topics.EVENT(site=self.host.config.site, dev=self.host.config.name)
        try:
            sent = self.link.publish(address, messages.encode(event), ref)
        except TooLarge as error:  # the row has all of it; who listens hears at least that it happened
            self._count("messages_too_large")
            log.error("%s: a short one is sent", error)
            short = event.model_copy(update={"text": event.text[:SHORT_CHARS], "detail": {"cut": True}})
            sent = self.link.publish(address, messages.encode(short), ref)
        if sent:
            self._flying.add(ref)

    def _presence(self, state: str) -> bytes:
        said: dict[str, Any] = {"state": state}
        if state == "online":
            said |= {"url": self.url, "mirrors": self.host.config.http.mirrors, "blocks": self.blocks.serving}
        return messages.encode(messages.HostState(**self.host.envelope(), **said))

    # What is done now and then.

    def _prune(self) -> None:
        if self._monotonic() - self._pruned >= PRUNE_S:
            self._pruned = self._monotonic()
            with self.host.database.write() as connection:
                fleet.prune(connection, self.host.now(), self.host.config.name)

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
