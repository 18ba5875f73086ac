"""From the outbox to the link: what is sent when, how often, and what settles it. All calls on the control loop."""

from __future__ import annotations

import logging

from edged.clock import Clock
from edged.config import Delivery
from edged.link import Link, Published, TooLarge
from edged.routes import Routes
from edged.store import Store
from edged.wire.topics import Address

log = logging.getLogger(__name__)


class Sending:
    """Hands due rows to the link, never more than it may hold; who we are goes first."""

    def __init__(self, store: Store, link: Link, clock: Clock, delivery: Delivery, routes: Routes) -> None:
        self._store, self._link, self._clock, self._delivery = store, link, clock, delivery
        self._routes = routes
        self._announced: list[tuple[Address, bytes]] = []  # what the link has not taken yet
        self._attempts: dict[str, int] = {}  # of the rows that the link holds
        # Progress that is not in the store yet: attempts -> messages. Written once a pump, in one transaction.
        self._sent: dict[int, list[str]] = {}
        self._acked: dict[int, list[str]] = {}

    def configure(self, delivery: Delivery) -> None:
        """These clocks hold from the next message on."""
        self._delivery = delivery

    def announce(self, announcements: list[tuple[Address, bytes]]) -> None:
        """Say this before anything else; what was to be announced before is out of date."""
        self._announced = announcements

    @property
    def announcing(self) -> bool:
        """Whether the link has not taken everything that was announced."""
        return bool(self._announced)

    def idle(self) -> bool:
        """Whether nothing is to be sent, and nothing is under way."""
        return not self._store.due(self._clock.now(), 1) and not self._attempts

    def pump(self) -> None:
        """Send what is due, as far as there is room."""
        try:
            self._pump()
        finally:
            self._keep_progress()

    def _pump(self) -> None:
        while self._announced and self._link.publish(*self._announced[0]):
            del self._announced[0]
        room = self._link.room()
        if not room:
            return
        now = self._clock.now()
        for row in self._store.due(now, room + len(self._attempts)):
            m = row.message
            if m.id in self._attempts:
                continue  # the link still holds it
            expiry = None if m.expires is None else max(1, int(m.expires - now))
            topic, payload = self._routes.fresh(m, now) if m.keep == "verdict" else (m.topic, m.payload)
            try:
                sent = self._link.publish(
                    Address(topic, m.qos, m.retain, expiry), payload, m.id, correlation=m.correlation
                )
            except TooLarge as error:
                log.error("%s", error)
                self._store.count("messages_too_large")
                self._store.bury(m.id, str(error))
                continue
            if not sent:
                return
            self._attempts[m.id] = row.attempts + 1
            self._sent.setdefault(row.attempts + 1, []).append(m.id)

    def acked(self, ids: list[str]) -> None:
        """The broker has these; the store learns of it at the next `pump`."""
        # An escalation's row stays until its verdict: how soon it is sent again grows with each attempt.
        for message_id in ids:
            self._acked.setdefault(self._attempts.pop(message_id, 1), []).append(message_id)

    def _keep_progress(self) -> None:
        if not self._sent and not self._acked:
            return
        now = self._clock.now()
        sent, acked = ({now + self._retry_s(n): ids for n, ids in each.items()} for each in (self._sent, self._acked))
        self._store.progress(now, sent, acked)
        self._sent, self._acked = {}, {}

    def refused(self, event: Published) -> None:
        """The broker did not take this one: try again later."""
        log.warning("broker refused message %s: %s", event.ref, event.error)
        self._store.count("broker_refusals")
        attempts = self._attempts.pop(event.ref, 1)
        self._store.refused(event.ref, event.error, self._clock.now() + self._retry_s(attempts))

    def connected(self, *, session: bool) -> None:
        """On a new connection what was under way is sent again when it is due: receivers know repetitions by their id.
        Without a session, whatever the broker had queued or we had sent may be gone."""
        self._attempts.clear()
        if not session:
            self._store.resend_all(self._clock.now())

    def _retry_s(self, attempts: int) -> float:
        d = self._delivery
        return float(min(d.retry_s * 2 ** min(attempts - 1, 16), d.retry_s_max))
