"""From the outbox to the link: what was sent and acknowledged is written now and then, and not forgotten when that fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edged.config import Delivery
from edged.link import Link, Published, TooLarge
from edged.outgoing import Outgoing
from edged.routes import Routes
from edged.sending import UNSAVED_MAX, Sending
from edged.store import Store, StoreError
from edged.wire.messages import InferReply
from tests.unit.store_cases import due_ids, escalation_of, message

RETRY_S = 20.0
OUTGOING = Outgoing("plant", "dev1", lambda: {"id": "own", "ts": 100.0, "boot": "b", "seq": 1})


class Box:
    """A link with room for so many messages, and a clock in hand."""

    def __init__(self, store: Store) -> None:
        self.time, self.store, self.room, self.taken = 100.0, store, 16, list[str]()
        self.said: list[bytes] = []
        self.running = 0.0
        clock: Any = SimpleNamespace(now=lambda: self.time, monotonic=lambda: self.running)
        link = SimpleNamespace(room=lambda: self.room, publish=self._publish)
        routes = SimpleNamespace(fresh=lambda message, _now: (message.topic, message.payload))
        self.sending = Sending(
            store, cast(Link, link), clock, Delivery(retry_s=RETRY_S), cast(Routes, routes), OUTGOING
        )  # fmt: skip
        self.size_max = 1 << 20

    def _publish(self, address: Any, payload: bytes, ref: str, **_: Any) -> bool:
        if len(payload) > self.size_max:
            raise TooLarge(address.topic, len(payload), self.size_max)
        self.taken.append(ref)
        self.said.append(payload)
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
    box.sending.keep_progress()
    assert [row.attempts for row in box.store.due(box.time + RETRY_S, 9)] == [1, 1, 1]
    box.sending.acked(["m1", "m-q"])
    box.sending.pump()
    assert box.taken == ["m1", "m2", "m-q"], "nothing twice"
    box.sending.keep_progress()
    assert due_ids(box.store, box.time + RETRY_S) == ["m2", "m-q"], "a question stays until its verdict"
    box.sending.acked(["m2"])
    box.sending.keep_progress()
    assert box.store.depth()[0] == 1
    assert not box.store.dead_letters()


def test_progress_of_many_messages_is_one_transaction_and_until_then_nothing_goes_twice(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.store.enqueue_many([message(f"m{n}") for n in range(UNSAVED_MAX)], box.time)
    writes: list[int] = []
    write = box.store._db.write
    monkeypatch.setattr(box.store._db, "write", lambda *a, **k: writes.append(1) or write(*a, **k))
    sent = [f"m{n}" for n in range(UNSAVED_MAX)]
    for taken in (sent[:16], sent[16:], []):
        box.sending.pump()
        box.sending.acked(taken)
    assert box.taken == sent
    assert len(writes) == 1, "written as soon as so many are not"
    box.sending.keep_progress()
    assert len(writes) == 2
    assert box.store.depth() == (0, 0)
    box.sending.keep_progress()
    box.sending.pump()
    assert len(writes) == 2, "and nothing where nothing has moved"


def test_progress_that_the_store_did_not_take_is_written_later(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.store.enqueue(message("m"), box.time)
    box.sending.pump()
    box.sending.acked(["m"])

    def full(*_: Any) -> None:
        raise StoreError("disk")

    with monkeypatch.context() as broken:
        broken.setattr(Store, "progress", full)
        with pytest.raises(StoreError):
            box.sending.keep_progress()
    box.sending.pump()
    box.sending.keep_progress()
    assert box.store.depth() == (0, 0)
    assert box.taken == ["m"]


@pytest.mark.parametrize("session", [False, True])
def test_a_question_that_was_under_way_when_the_connection_ended_goes_out_again(box: Box, session: bool) -> None:
    box.store.enqueue_many([message("m"), escalation_of("q")], box.time)
    box.sending.pump()
    box.sending.acked(["m"])
    box.sending.connected(session=session)
    box.sending.pump()
    again = [] if session else ["m-q"]  # the broker that has our session has the question too
    assert box.taken == ["m", "m-q", *again]
    box.sending.keep_progress()
    box.time += RETRY_S
    box.sending.pump()
    assert box.taken == ["m", "m-q", "m-q"], "and what was acknowledged does not"


def test_a_refused_message_keeps_the_reason_and_is_tried_again(box: Box) -> None:
    box.store.enqueue(message("m"), box.time)
    box.sending.pump()
    box.sending.refused(Published("m", "Quota exceeded"))
    box.sending.pump()
    assert box.taken == ["m"]
    (row,) = box.store.due(box.time + RETRY_S, 9)
    assert (row.attempts, row.error) == (1, "Quota exceeded")
    box.time += RETRY_S
    box.sending.pump()
    assert box.taken == ["m", "m"]


def test_it_says_when_there_was_more_than_fits(box: Box) -> None:
    box.store.enqueue_many([message("m1"), message("m2")], box.time)
    box.room = 1
    box.sending.pump()
    assert (box.taken, box.sending.held_back) == (["m1"], True)
    box.room = 0
    box.sending.pump()
    assert box.sending.held_back
    box.room = 16
    box.sending.pump()
    assert (box.taken, box.sending.held_back) == (["m1", "m2"], False)


def test_a_reply_that_no_broker_takes_becomes_an_error_with_both_sizes(box: Box) -> None:
    box.size_max = 2000
    reply = OUTGOING.reply("q1", generation_prompt="x" * 3000, generated_response="y", release="p@1.0")
    box.store.enqueue_many([reply, message("m")], box.time)
    box.sending.pump()
    assert (box.taken, box.sending.held_back) == (["m"], True)
    box.sending.pump()
    told = InferReply.model_validate_json(box.said[1])
    assert (told.request, told.generation_prompt, told.generated_response) == ("q1", None, None)
    assert told.error is not None
    assert f"the reply has {len(reply.payload)} bytes, and the broker takes packets of at most 2000" in told.error
    box.sending.acked(["m", "own"])
    box.sending.keep_progress()
    assert box.store.depth() == (0, 0)
    (letter,) = box.store.dead_letters()  # for people: what was not sent
    assert letter.id == reply.id


@pytest.mark.parametrize("size_max", [40, 200])
def test_where_not_even_the_error_fits_nothing_is_said_again_and_again(box: Box, size_max: int) -> None:
    box.size_max = size_max
    box.store.enqueue_many([OUTGOING.reply("q1", generation_prompt="x" * 3000), message("m", payload=b"[]")], box.time)
    for _ in range(4):
        box.sending.pump()
    assert box.taken == ["m"]
    assert not box.sending.held_back
    box.sending.acked(["m"])
    box.sending.keep_progress()
    assert box.store.depth() == (0, 0)
