"""What this daemon told people, kept for `edged status`: an event that was sent is no more in the outbox."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from edged.outgoing import Outgoing
from edged.stamp import Stamp
from edged.store import OutboxMessage

log = logging.getLogger(__name__)

EVENTS_MAX = 50  # the newest
TEXT_MAX = 500  # characters of one


class Told(Outgoing):
    """Builds this device's messages, and remembers its newest events."""

    def __init__(self, site: str, device: str, stamp: Stamp) -> None:
        super().__init__(site, device, stamp)
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)

    def event(self, kind: str, text: str, **detail: Any) -> OutboxMessage:
        """Something that a person should see."""
        log.info("event %s: %s", kind, text)  # the journal has what `edged status` has forgotten
        self._events.append({"at": self.stamp.clock.now(), "kind": kind, "text": text[:TEXT_MAX]})
        return super().event(kind, text, **detail)

    def events(self) -> list[dict[str, Any]]:
        """The newest events since the start, oldest first: at (seconds since the epoch), kind, text."""
        return list(self._events)
