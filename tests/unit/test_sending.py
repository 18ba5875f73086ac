"""From the outbox to the link: what was sent and acknowledged is written once a pump, and not forgotten when that fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edged.config import Delivery
from edged.link import Link
from edged.routes import Routes
from edged.sending import Sending
from edged.store import Store, StoreError
from tests.unit.store_cases import due_ids, escalation_of, message

RETRY_S = 20.0


class Box:
    """A link with room for so many messages, and a clock in hand."""

    def __init__(self, store: Store) -> None:
        self.time, self.store, self.room, self.taken = 100.0, store, 16, list[str]()
        clock: Any = SimpleNamespace(now=lambda: self.time)
        link = SimpleNamespace(room=lambda: self.room, publish=self._publish)
        routes = SimpleNamespace(fresh=lambda message, _now: (message.topic, message.payload))
        self.sending = Sending(
            store, cast(Link, link), clock, Delivery(retry_s=RETRY_S), cast(Routes, routes)
        )  # fmt: skip

    def _publish(self, _address: Any, _payload: bytes, ref: str, **_: Any) -> bool:
        self.taken.append(ref)
        return True


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    store = Store(tmp_path)
    yield Box(store)
    store.close()


def test_what_was_sent_is_due_again_after_its_retry_time_and_what_was_acknowledged_is_gone(box: Box) -> None:
    box.store.enqueue_many([message("m1"), message("m2"), escalation_of("q")], box.time)
    box.sending.pump()
    assert box.taken == ["m1", "m2", "m-q"]
    assert [row.attempts for row in box.store.due(box.time + RETRY_S, 9)] == [1, 1, 1]
    box.sending.acked(["m1", "m-q"])
    box.sending.pump()
    assert box.taken == ["m1", "m2", "m-q"], "nothing twice"
    assert due_ids(box.store, box.time + RETRY_S) == ["m2", "m-q"], "a question stays until its verdict"
    box.sending.acked(["m2"])
    box.sending.pump()
    assert box.store.depth()[0] == 1
    assert not box.store.dead_letters()


def test_progress_is_one_transaction_a_pump(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.store.enqueue_many([message(f"m{n}") for n in range(8)], box.time)
    writes: list[int] = []
    write = box.store._db.write
    monkeypatch.setattr(box.store._db, "write", lambda *a, **k: writes.append(1) or write(*a, **k))
    box.sending.pump()
    box.sending.acked([f"m{n}" for n in range(8)])
    box.sending.pump()
    assert len(writes) == 2
    box.sending.pump()
    assert len(writes) == 2, "and none where nothing has moved"


def test_progress_that_the_store_did_not_take_is_written_later(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.store.enqueue(message("m"), box.time)
    box.sending.pump()
    box.sending.acked(["m"])

    def full(*_: Any) -> None:
        raise StoreError("disk")

    with monkeypatch.context() as broken:
        broken.setattr(Store, "progress", full)
        with pytest.raises(StoreError):
            box.sending.pump()
    box.sending.pump()
    assert box.store.depth() == (0, 0)
    assert box.taken == ["m"]
