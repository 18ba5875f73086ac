"""Blocks over the second connection, made and lost at the wrong moment. The real one: tests/system/test_delivery_mqtt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from queue import Empty, Queue
from typing import Any

from edged.bulk import Bulk
from edged.clock import SystemClock
from edged.link import Connected, Inbound, LinkOptions
from edged.mqtt_carrier import MqttCarrier
from edged.stamp import Stamp
from edged.wire import messages, topics
from edged.wire.manifest import ReleaseRef

CONTENT = b"{}"
DIGEST = sha256(CONTENT).hexdigest()


class OneByOne(Queue[Any]):
    """Events come apart: after each there is a look round before the next."""

    def get_nowait(self) -> Any:
        raise Empty


class Scripted(Bulk):
    """A connection that says when it was made, and answers what is asked, as `script` says: per question some of
    told (it says now that it was made), new (it was lost and made again), block."""

    def __init__(self, *script: str) -> None:
        super().__init__(LinkOptions("127.0.0.1", 1, "d1~blk"), lambda _name, _number: None)
        self.connection, self._script, self._box = 1, list(script), OneByOne()

    @contextmanager
    def listen(self, key: str) -> Iterator[Queue[Any]]:
        yield self._box

    def publish(self, address: topics.Address, payload: bytes) -> int:
        asked_on = self.connection
        (number,) = messages.Want.model_validate_json(payload).blocks
        for event in self._script.pop(0).split():
            if event == "block":
                topic = topics.BLOCK(sha256=DIGEST, n=str(number)).topic
                self._box.put(Inbound(topic, CONTENT, retain=False, token=(0, 0, 1)))
            else:
                self.connection += event == "new"
                self._box.put(Connected(session=False))
        return asked_on


def asked(*script: str) -> Counter[str]:
    """What was counted while a document was fetched."""
    counted: Counter[str] = Counter()
    carrier = MqttCarrier(
        Scripted(*script), "s1", "d1", Stamp(SystemClock()), SystemClock(),
        lambda name, number: counted.update({name: number}), lambda: True, dict,
    )  # fmt: skip
    looks = iter([False] * 4)  # more would be waiting for a time-out
    ref = ReleaseRef(release="eye@1.0", sha256=DIGEST)
    assert carrier.manifest(ref, 100, lambda: next(looks, True)) == CONTENT
    return counted


def test_what_was_asked_for_on_this_connection_is_not_asked_for_again_when_it_says_that_it_was_made() -> None:
    # The connection is used the moment it is there; that it was made is read from the queue after that.
    assert asked("told block") == {"blocks_asked": 1, "blocks_received": 1, "block_bytes_received": 2}


def test_what_was_asked_for_on_a_lost_connection_is_asked_for_again_at_once() -> None:
    assert asked("new", "block")["blocks_asked"] == 2
