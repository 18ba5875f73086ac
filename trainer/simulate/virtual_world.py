"""Time, chance and the connection to the broker of a simulation without a broker.

Law of this file: the same seed gives the same run. Nothing here reads the machine's clock or its randomness.
"""

from __future__ import annotations

import heapq
import itertools
import queue
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

from edged.link import IN_FLIGHT_MAX, Connected, Inbound, Published
from edged.wire.topics import Address

START = 1_800_000_000.0  # seconds since the epoch
ROUND_TRIP_S = 0.02  # between a publish and the broker's answer


class VirtualClock:
    """`edged.clock.Clock` that moves when it is told to."""

    def __init__(self) -> None:
        self.elapsed = 0.0

    def now(self) -> float:
        """Seconds since the epoch."""
        return START + self.elapsed

    def monotonic(self) -> float:
        """Seconds since the simulation began."""
        return self.elapsed

    def real(self, seconds: float) -> float:
        """Nobody waits."""
        return 0.0


class VirtualWorld:
    """What happens, in the order of the clock."""

    def __init__(self, seed: int) -> None:
        self.clock, self.dice = VirtualClock(), Random(f"fleet {seed}")
        self.entropy = Random(f"ids {seed}").randbytes  # of the trainer: which devices are canaries depends on it
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, act: Callable[..., None], *values: Any) -> None:
        """Do this later."""
        heapq.heappush(self._events, (self.clock.elapsed + seconds, next(self._numbers), act, values))

    def pass_time(self, seconds: float) -> None:
        """Let what is due in this time happen, each at its own time."""
        end = self.clock.elapsed + seconds
        while self._events and self._events[0][0] <= end:
            at, _, act, values = heapq.heappop(self._events)
            self.clock.elapsed = max(self.clock.elapsed, at)
            act(*values)
        self.clock.elapsed = end


class Inbox:
    """What has arrived; nobody waits for more, because the clock stands still meanwhile."""

    def __init__(self) -> None:
        self._waiting: deque[Any] = deque()

    def put(self, event: Any) -> None:
        """One more."""
        self._waiting.append(event)

    def qsize(self) -> int:
        """How many."""
        return len(self._waiting)

    def get(self, timeout: float | None = None) -> Any:
        """The oldest; raises queue.Empty without waiting."""
        return self.get_nowait()

    def get_nowait(self) -> Any:
        """The oldest; raises queue.Empty."""
        if not self._waiting:
            raise queue.Empty
        return self._waiting.popleft()


class VirtualLink:
    """Stands where `edged.link.Link` does: always connected, nothing is lost, `IN_FLIGHT_MAX` messages a round trip."""

    def __init__(self, world: VirtualWorld, told: Callable[[str, bytes], None]) -> None:
        """`told`: what is published comes here, at once."""
        self.inbox, self.connected, self.sent = Inbox(), True, 0
        self._world, self._told, self._flying = world, told, 0
        self.inbox.put(Connected(session=False))

    def receive(self, address: Address, payload: bytes) -> None:
        """A device publishes."""
        self.inbox.put(Inbound(address.topic, payload, False, (0, address.qos, 1)))

    def acknowledge(self, message: Inbound) -> None:
        """It is committed; nobody would send it again."""

    def room(self) -> int:
        """How many more may be in flight."""
        return IN_FLIGHT_MAX - self._flying

    def publish(self, address: Address, payload: bytes, ref: Any = None, *, correlation: bytes | None = None) -> bool:
        """False when too many are in flight."""
        if self.room() <= 0:
            return False
        self._flying += 1
        self.sent += 1
        self._world.after(ROUND_TRIP_S, self._answered, ref)
        self._told(address.topic, payload)
        return True

    def _answered(self, ref: Any) -> None:
        self._flying -= 1
        if ref is not None:
            self.inbox.put(Published(ref, ""))

    def ensure_alive(self) -> bool:
        """It is."""
        return True

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""
