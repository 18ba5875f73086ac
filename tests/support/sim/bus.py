"""A broker and connections to it that drop, duplicate and reorder, by seed.

What is kept of MQTT: a QoS 1 message is answered or not; what was not acknowledged comes again on the next connection,
with the session or, when the broker died, not at all; retained messages come at every connection.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from edged.link import Connected, Disconnected, Inbound, Published
from edged.wire.topics import Address
from tests.support.sim.world import Inbox, World

IN_FLIGHT_MAX = 16


@dataclass(slots=True)
class Faults:
    """How bad the network is; all are probabilities but for the seconds."""

    lost: float = 0.0
    doubled: float = 0.0
    delay_s: float = 0.05
    late: float = 0.0  # a message takes up to `late_s`, so that others overtake it
    late_s: float = 5.0
    cut_s: float = 1e9  # between two ends of the connection, about

    @classmethod
    def drawn(cls, dice: Random, cut_s: float) -> Faults:
        """Some, by chance."""
        lost, doubled, late = (dice.choice((0.0, probability)) for probability in (0.2, 0.3, 0.3))
        return cls(lost, doubled, late=late, cut_s=dice.choice((1e9, cut_s)))


def matches(pattern: str, topic: str) -> bool:
    wanted, found = pattern.split("/"), topic.split("/")
    return len(wanted) == len(found) and all(w in ("+", f) for w, f in zip(wanted, found, strict=True))


class Broker:
    """Hands messages on to connections (`Link`) and to peers (plain callbacks)."""

    def __init__(self, world: World, faults: Faults) -> None:
        self.world, self.faults = world, faults
        self.retained: dict[str, bytes] = {}
        self.links: list[Link] = []
        self._peers: list[tuple[str, Callable[[str, bytes], None]]] = []

    def listen(self, pattern: str, hear: Callable[[str, bytes], None]) -> None:
        """A peer that is always there."""
        self._peers.append((pattern, hear))

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        """Take a message in; everybody gets it some time, or never, or twice."""
        if retain:
            self.retained[topic] = payload
        for pattern, hear in self._peers:
            if matches(pattern, topic):
                lost = self._deliver(lambda hear=hear: hear(topic, payload))  # type: ignore[misc]
                if lost and retain:  # it comes with the peer's next connection
                    self.world.after(5.0, lambda hear=hear: hear(topic, self.retained[topic]))  # type: ignore[misc]
        for link in self.links:
            if link.wants(topic):
                lost = self._deliver(lambda link=link: link.receive(topic, payload, False))  # type: ignore[misc]
                if lost and retain:  # it comes with the next connection
                    self.world.after(2.0, link.disconnect)

    def _deliver(self, act: Callable[[], None]) -> bool:
        """True when it is lost."""
        world, lost = self.world, True
        for _ in range(2 if world.maybe(self.faults.doubled) else 1):
            if not world.maybe(self.faults.lost):
                world.after(self.delay(), act)
                lost = False
        return lost

    def delay(self) -> float:
        late = self.world.maybe(self.faults.late)
        return self.world.dice.uniform(0, self.faults.late_s if late else self.faults.delay_s)


class Link:
    """Stands where `edged.link.Link` does."""

    def __init__(self, broker: Broker, subscriptions: list[str], inbox: Inbox) -> None:
        self._broker, self._world, self._subscriptions, self.inbox = broker, broker.world, subscriptions, inbox
        self.connected = False
        self._connection = 0
        self._numbers = itertools.count(1)
        self._flying: dict[int, tuple[Address, bytes, Any]] = {}
        self._unacknowledged: dict[int, tuple[str, bytes]] = {}
        self.acknowledged: Callable[[Inbound], None] = lambda _message: None  # told when it is safe with its owner
        broker.links.append(self)
        self._world.after(self._world.dice.uniform(0, 1), lambda: self._connect(session=False))

    def gone(self) -> None:
        """The process ended."""
        self.connected, self._connection = False, -1
        self._broker.links.remove(self)

    def wants(self, topic: str) -> bool:
        return any(matches(pattern, topic) for pattern in self._subscriptions)

    def _connect(self, session: bool) -> None:
        if self._connection < 0:
            return
        self._connection += 1
        self.connected = True
        self.inbox.put(Connected(session))
        waiting, self._unacknowledged = self._unacknowledged, {}
        if session:
            for topic, payload in waiting.values():
                self.receive(topic, payload, False)
        for topic, payload in self._broker.retained.items():
            if self.wants(topic):
                self.receive(topic, payload, True)
        for number in list(self._flying):
            self._send(number)
        self._world.after(self._world.dice.expovariate(1 / self._broker.faults.cut_s), self.disconnect)

    def disconnect(self) -> None:
        """The network goes away for a while."""
        if self._connection < 0 or not self.connected:
            return
        self.connected = False
        self._connection += 1
        self.inbox.put(Disconnected("the network went away"))
        session = self._world.maybe(0.7)
        self._world.after(self._world.dice.uniform(0.1, 5), lambda: self._connect(session))

    def receive(self, topic: str, payload: bytes, retain: bool) -> None:
        if self._connection < 0:
            return
        number = next(self._numbers)
        self._unacknowledged[number] = (topic, payload)
        if self.connected:
            self.inbox.put(Inbound(topic, payload, retain, (number, 1, self._connection)))

    def acknowledge(self, message: Inbound) -> None:
        self._world.need_power()
        number, _, connection = message.token
        if connection == self._connection:
            self._unacknowledged.pop(number, None)
            self.acknowledged(message)

    def room(self) -> int:
        return IN_FLIGHT_MAX - len(self._flying) if self.connected else 0

    def publish(self, address: Address, payload: bytes, ref: Any = None, *, correlation: bytes | None = None) -> bool:
        self._world.need_power()
        if self.room() <= 0:
            return False
        number = next(self._numbers)
        self._flying[number] = (address, payload, ref)
        self._send(number)
        return True

    def _send(self, number: int) -> None:
        address, payload, ref = self._flying[number]
        connection, faults, world = self._connection, self._broker.faults, self._world

        def answered() -> None:
            if connection == self._connection and self._flying.pop(number, None) and ref is not None:
                self.inbox.put(Published(ref, ""))

        def arrived() -> None:
            if connection == self._connection or world.maybe(0.5):
                self._broker.publish(address.topic, payload, address.retain)
                if not world.maybe(faults.lost):
                    world.after(self._broker.delay(), answered)
                else:
                    world.after(2.0, self.disconnect)  # which is how a client learns of it

        world.after(self._broker.delay(), arrived)

    def ensure_alive(self) -> bool:
        return True

    def start(self) -> None: ...

    def stop(self) -> None: ...
