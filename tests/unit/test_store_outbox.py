"""The outbox and the small facts on real SQLite files: order, retries, limits, restarts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edged.store import OutboxFull, Store, StoreLimits
from tests.unit.store_cases import (
    due_ids,
    escalate,
    label,
    message,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


def test_messages_go_out_in_the_order_they_were_made(store: Store) -> None:
    store.enqueue_many([message(f"m{n}") for n in range(5)], 10.0)
    assert due_ids(store, 9.0) == []
    assert due_ids(store, 10.0, 3) == ["m0", "m1", "m2"]


def test_a_message_in_flight_waits_for_its_retry_and_keeps_its_history(store: Store) -> None:
    store.enqueue(message("m"), 10.0)
    store.sent("m", 10.0, 40.0)
    assert due_ids(store, 39.0) == []
    assert [(row.attempts, row.due) for row in store.due(40.0, 9)] == [(1, 40.0)]
    store.refused("m", "Quota exceeded", 70.0)
    assert due_ids(store, 69.0) == []
    assert store.due(70.0, 9)[0].error == "Quota exceeded"


def test_an_acknowledgement_settles_a_plain_message_but_not_an_escalation(store: Store) -> None:
    escalate(store, "a")
    store.enqueue(message("m"), 100.0)
    store.sent_many(["m", "m-a"], 100.0, 130.0)
    store.acked_many(["m", "m-a", "gone"], 101.0, 400.0)
    assert due_ids(store, 399.0) == []
    assert due_ids(store, 400.0) == ["m-a"]
    store.resend_all(120.0)  # the broker came back without our session
    assert due_ids(store, 120.0) == ["m-a"]
    label(store, "a")
    assert store.depth() == (0, 0)


def test_the_same_message_is_queued_once(store: Store) -> None:
    store.enqueue(message("m"), 1.0)
    store.enqueue(message("m"), 2.0)
    assert store.depth() == (1, 2)


def test_expired_messages_are_neither_sent_nor_kept_but_counted(store: Store) -> None:
    store.enqueue(message("old", expires=50.0), 1.0)
    store.enqueue(message("new", expires=60.0), 1.0)
    assert due_ids(store, 50.0) == ["new"]
    assert (store.drop_expired(50.0), store.drop_expired(50.0)) == (1, 0)
    assert store.counters()["outbox_expired"] == 1
    assert store.depth()[0] == 1


def test_a_message_that_can_never_be_sent_is_buried_with_its_reason(store: Store) -> None:
    store.enqueue(message("m", payload=b"x" * 100_000), 1.0)
    store.bury("m", "too large")
    store.bury("m", "too large")
    [letter] = store.dead_letters()
    assert (letter.id, letter.reason, letter.bytes, len(letter.payload)) == ("m", "too large", 100_000, 65536)
    assert store.depth() == (0, 0)
    assert store.counters()["outbox_buried"] == 1


def test_the_outbox_is_limited_in_bytes_and_a_batch_enters_whole_or_not(tmp_path: Path) -> None:
    store = Store(tmp_path, StoreLimits(outbox_bytes_max=10))
    with pytest.raises(OutboxFull, match="outbox_bytes_max=10"):
        store.enqueue_many([message("a", payload=b"12345"), message("b", payload=b"123456")], 1.0)
    assert store.depth() == (0, 0)
    store.close()


def test_dead_letters_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edged.store.outbox.DEAD_LETTERS_MAX", 3)
    for n in range(5):
        store.enqueue(message(f"m{n}"), 1.0)
        store.bury(f"m{n}", "no")
    assert [letter.id for letter in store.dead_letters(9)] == ["m4", "m3", "m2"]


# Small facts


def test_counters_survive_a_restart_once_flushed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.count("items", 2)
    store.flush_counters()
    store.count("items")
    store.count("errors")
    assert store.counters() == {"items": 3, "errors": 1}
    store.close()
    store = Store(tmp_path)
    assert store.counters() == {"items": 3, "errors": 1}
    store.close()


def test_updates_bad_releases_and_values_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save_update("vision", {"state": "downloading"})
    store.save_update("vision", {"state": "staged", "saves": 2})
    store.remember_bad("d@1.1", "ab", "crash loop", 5.0)
    store.set_value("rev", 7)
    store.set_value("rev", 8)
    store.close()
    store = Store(tmp_path)
    assert store.updates() == {"vision": {"state": "staged", "saves": 2}}
    assert (store.bad("ab"), store.bad("cd")) == ("crash loop", None)
    assert (store.forget_bad("ab"), store.forget_bad("ab"), store.bad("ab")) == (True, False, None)
    assert (store.value("rev"), store.value("other")) == (8, None)
    store.close()


def test_a_message_is_seen_once_it_is_recorded_and_old_ones_are_forgotten(tmp_path: Path) -> None:
    store = Store(tmp_path, StoreLimits(seen_max=2))
    assert not store.seen("a", 1.0, record=False)
    assert not store.seen("a", 1.0)
    assert store.seen("a", 1.0)
    store.seen("b", 2.0)
    store.seen("c", 3.0)
    assert (store.seen("b", 4.0), store.seen("a", 4.0, record=False)) == (True, False)
    store.close()
