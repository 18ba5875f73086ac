"""The envelope of every message that this process sends."""

from __future__ import annotations

import threading
from typing import Any

from edged.clock import Clock, new_id


class Stamp:
    """Hands out envelopes: a fresh id, the time, this boot, and a sequence number without gaps."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.boot = new_id(clock)
        self._seq = 0
        self._lock = threading.Lock()

    def __call__(self) -> dict[str, Any]:
        """The envelope's fields, to be passed to a message's constructor."""
        with self._lock:
            self._seq += 1
            seq = self._seq
        return {"id": new_id(self.clock), "ts": self.clock.now(), "boot": self.boot, "seq": seq}
