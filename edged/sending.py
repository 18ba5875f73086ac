"""From the outbox to the link: what is sent when, how often, and what settles it. All calls on the control loop.

Law of this file: progress may be forgotten by a crash, and then a message goes out again. So it is written now and then,
many messages in one transaction; until then the rows that it is about are left alone.
"""

from __future__ import annotations

import logging

from edged.clock import Clock
from edged.config import Delivery
from edged.link import Link, Published, TooLarge
from edged.outgoing import Outgoing
from edged.routes import Routes
from edged.store import Store
from edged.wire.topics import Address

log = logging.getLogger(__name__)

UNSAVED_MAX = 32  # messages whose progress is not in the store yet: every look for what is due passes over them


class Sending:
    """Hands due rows to the link, never more than it may hold; who we are goes first."""

    def __init__(
        self, store: Store, link: Link, clock: Clock, delivery: Delivery, routes: Routes, outgoing: Outgoing
    ) -> None:
        self._store, self._link, self._clock, self._delivery = store, link, clock, delivery
        self._routes, self._outgoing = routes, outgoing
        self._announced: list[tuple[Address, bytes]] = []  # what the link has not taken yet
        self._attempts: dict[str, int] = {}  # of the rows that the link holds
        self.held_back = False  # the last pump would have sent more, had there been room
        self._sent: dict[str, int] = {}  # message -> attempts: not in the store yet
        self._acked: dict[str, int] = {}

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
        return not self._attempts and not self._store.due(self._clock.now(), 1, self._passed_over())

    def pump(self) -> None:
        """Send what is due, as far as there is room."""
        try:
            self._pump()
        finally:
            if len(self._sent.keys() | self._acked.keys()) >= UNSAVED_MAX:
                self.keep_progress()

    def _pump(self) -> None:
        self.held_back = True
        while self._announced and self._link.publish(*self._announced[0]):
            del self._announced[0]
        room = self._link.room()
        if not room:
            return
        now = self._clock.now()
        rows = self._store.due(now, room, self._passed_over())
        more = False
        for row in rows:
            m = row.message
            expiry = None if m.expires is None else max(1, int(m.expires - now))
            topic, payload = self._routes.fresh(m, now) if m.keep == "verdict" else (m.topic, m.payload)
            try:
                sent = self._link.publish(
                    Address(topic, m.qos, m.retain, expiry), payload, m.id, correlation=m.correlation
                )
            except TooLarge as error:
                log.error("%s", error)
                self._store.count("messages_too_large")
                told = self._outgoing.instead(m, error.size, error.size_max)
                self._store.bury(m.id, str(error), told, now)
                more = more or told is not None
                continue
            if not sent:
                return
            self._attempts[m.id] = self._sent[m.id] = row.attempts + 1
        self.held_back = more or len(rows) == room or self.announcing

    def _passed_over(self) -> set[str]:
        """What the link holds, and what the store does not know the progress of."""
        return self._attempts.keys() | self._sent.keys() | self._acked.keys()

    def acked(self, ids: list[str]) -> None:
        """The broker has these; the store learns of it with the next `keep_progress`."""
        # An escalation's row stays until its verdict: how soon it is sent again grows with each attempt.
        for message_id in ids:
            self._acked[message_id] = self._attempts.pop(message_id, 1)

    def keep_progress(self) -> None:
        """Write what was sent and acknowledged since the last time; call it several times a second."""
        if not self._sent and not self._acked:
            return
        now = self._clock.now()
        sent, acked = ({ref: now + self._retry_s(n) for ref, n in each.items()} for each in (self._sent, self._acked))
        self._store.progress(now, sent, acked)
        self._sent, self._acked = {}, {}

    def refused(self, event: Published) -> None:
        """The broker did not take this one: try again later."""
        log.warning("broker refused message %s: %s", event.ref, event.error)
        self._store.count("broker_refusals")
        attempts = self._attempts.pop(event.ref, 1)
        self.keep_progress()  # that it was sent, before that it was refused
        self._store.refused(event.ref, event.error, self._clock.now() + self._retry_s(attempts))

    def connected(self, *, session: bool) -> None:
        """On a new connection what was under way is sent again when it is due: receivers know repetitions by their id.
        Without a session, whatever the broker had queued or we had sent may be gone."""
        self._attempts.clear()
        if not session:
            self.resend_all()

    def resend_all(self) -> None:
        """Whatever is not settled is due now."""
        self.keep_progress()
        self._store.resend_all(self._clock.now())

    def _retry_s(self, attempts: int) -> float:
        d = self._delivery
        return float(min(d.retry_s * 2 ** min(attempts - 1, 16), d.retry_s_max))
