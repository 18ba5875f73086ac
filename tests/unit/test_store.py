"""Samples on real SQLite files: what is captured, how it moves, in which order it is forgotten."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.store import OutboxFull, StorageFull, Store, StoreLimits
from edged.store.records import CORRECTIONS, EVICTABLE, VERDICTS
from tests.unit.store_cases import (
    MODEL,
    PERSON,
    SEVEN,
    due_ids,
    escalate,
    escalation_of,
    files,
    image_of,
    label,
    message,
    new_sample,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    opened = Store(tmp_path_factory.mktemp("shared"))
    yield opened
    opened.close()


def test_a_captured_sample_comes_back_whole_after_a_restart(tmp_path: Path) -> None:
    with_store = Store(tmp_path)
    escalate(with_store, "a")
    with_store.close()
    store = Store(tmp_path)
    sample = store.sample("a")
    assert sample is not None
    assert (sample.state, sample.prediction, sample.label_by, sample.provenance) == ("escalated", SEVEN, 1000.0, None)
    blob = store.blob(sample.sha256)
    assert blob is not None
    assert blob.read_bytes() == image_of("a")
    assert [row.message for row in store.due(100.0, 9)] == [escalation_of("a")]
    store.close()


def test_capturing_the_same_id_again_changes_nothing(store: Store) -> None:
    escalate(store, "a")
    label(store, "a")
    escalate(store, "a")
    assert store.counts() == {"labelled": 1}
    assert store.depth() == (0, 0)


def test_the_same_pixels_are_stored_once_and_live_until_the_last_sample_goes(store: Store, tmp_path: Path) -> None:
    image = b"same" * 100
    store.capture(new_sample("a", image, "captured"), image)
    store.capture(new_sample("b", image, "captured", captured=101.0), image)
    assert (len(files(tmp_path)), store.blob_bytes()) == (1, 400)
    store.evict(1)
    assert store.counts() == {}
    assert files(tmp_path) == []
    store.capture(new_sample("a", image, "captured"), image)
    store.capture(new_sample("b", image, "escalated"), image)
    assert store.evict(1).bytes == 0
    assert len(files(tmp_path)) == 1
    assert store.sample("a") is not None  # without it nothing would be free


def test_pixels_that_are_not_what_the_hash_says_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample a"):
        store.capture(new_sample("a", b"one"), b"two")
    assert store.counts() == {}
    assert files(tmp_path) == []


def test_a_full_folder_refuses_the_sample_and_keeps_nothing_of_it(tmp_path: Path) -> None:
    store = Store(tmp_path, StoreLimits(blob_bytes_max=1000))
    store.capture(new_sample("a", b"x" * 900), b"x" * 900)
    with pytest.raises(StorageFull, match="blob_bytes_max=1000"):
        store.capture(new_sample("b", b"y" * 101), b"y" * 101, escalation_of("b"))
    assert (store.counts(), store.depth(), len(files(tmp_path))) == ({"escalated": 1}, (0, 0), 1)
    store.capture(new_sample("c", b"x" * 900), b"x" * 900)  # the same pixels need no room
    store.close()


def test_a_full_disk_refuses_the_sample_and_keeps_nothing_of_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edged.store.blobs.os.fsync", full)
    with pytest.raises(StorageFull, match="no room for"):
        escalate(store, "a")
    monkeypatch.undo()
    assert (store.counts(), store.depth(), files(tmp_path)) == ({}, (0, 0), [])
    escalate(store, "a")
    assert store.counts() == {"escalated": 1}


def test_a_full_outbox_refuses_the_escalation_together_with_its_sample(tmp_path: Path) -> None:
    store = Store(tmp_path, StoreLimits(outbox_rows_max=1))
    escalate(store, "a")
    with pytest.raises(OutboxFull, match="outbox_rows_max=1"):
        escalate(store, "b")
    assert (store.counts(), len(files(tmp_path))) == ({"escalated": 1}, 1)
    assert store.blob_bytes() == len(image_of("a"))
    store.close()


# States


@pytest.mark.parametrize("by", [MODEL, PERSON], ids=["model", "person"])
@pytest.mark.parametrize("status", ["labelled", "unresolved", "rejected"])
@pytest.mark.parametrize("state", ["captured", "escalated", "unresolved", "labelled", "claimed", "used", "rejected"])
def test_a_verdict_moves_a_sample_only_as_the_table_says(shared: Store, state: str, status: str, by: Any) -> None:
    key = f"{state}-{status}-{by['kind']}"
    escalate(shared, key, state="captured" if state == "captured" else "escalated")
    if state in ("labelled", "claimed", "used", "unresolved", "rejected"):
        label(shared, key, state if state in ("unresolved", "rejected") else "labelled")
    if state in ("claimed", "used"):
        shared.claim([key], "job")
    if state == "used":
        shared.used([key], "d@1.1")
    before = shared.sample(key)
    assert before is not None
    assert before.state == state
    table = CORRECTIONS if by is PERSON else VERDICTS
    after = label(shared, key, status, [{"label": "other"}], by)
    assert after.state == table.get((state, status), state)
    assert after.changed == ((state, status) in table)
    assert after.label == ([{"label": "other"}] if after.changed else before.label)


def test_a_verdict_settles_its_escalation_and_announces_in_the_same_step(store: Store) -> None:
    escalate(store, "a")
    sample = store.label(
        "a", "labelled", SEVEN, 0.8, MODEL, "", 200.0, lambda moved: message("entry", payload=moved.state.encode())
    )
    assert sample is not None
    assert sample.changed
    assert (sample.label, sample.label_confidence, sample.labelled) == (SEVEN, 0.8, 200.0)
    assert [(row.message.id, row.message.payload) for row in store.due(200.0, 9)] == [("entry", b"labelled")]


def test_a_repeated_verdict_changes_and_announces_nothing(store: Store) -> None:
    escalate(store, "a")
    assert label(store, "a").changed
    again = store.label("a", "labelled", SEVEN, 0.9, MODEL, "", 300.0, message("entry"))
    assert again is not None
    assert not again.changed
    assert again.labelled == 200.0
    assert store.depth() == (0, 0)


def test_a_full_outbox_never_costs_a_label(tmp_path: Path) -> None:
    store = Store(tmp_path, StoreLimits(outbox_rows_max=1))
    escalate(store, "a")
    store.acked("m-a", 150.0, 160.0)
    label(store, "a")
    store.enqueue(message("other"), 1.0)
    sample = store.label("a", "rejected", [], 1.0, PERSON, "blurred", 300.0, message("entry"))
    assert sample is not None
    assert sample.state == "rejected"
    assert store.counters()["catalogue_dropped"] == 1
    store.close()


def test_a_verdict_on_an_unknown_sample_is_told_apart(store: Store) -> None:
    assert store.label("nobody", "labelled", SEVEN, 1.0, MODEL, "", 1.0) is None


def test_no_verdict_in_time_leaves_it_unresolved_and_a_late_one_still_labels(store: Store) -> None:
    escalate(store, "a")
    escalate(store, "b", label_by=2000.0)
    assert store.expire(999.0) == []
    assert [(sample.id, sample.state) for sample in store.expire(1000.0)] == [("a", "unresolved")]
    assert due_ids(store, 500.0) == ["m-b"]
    assert label(store, "a").state == "labelled"


def test_the_trainers_moves_are_idempotent_and_say_what_was_refused(store: Store) -> None:
    for sample_id in ("a", "b", "c"):
        escalate(store, sample_id)
    label(store, "a")
    label(store, "b")
    for _ in range(2):
        moved = store.claim(["a", "a", "c", "zz"], "job1")
        assert [sample.id for sample in moved.samples] == ["a"]
        assert (moved.unknown, moved.refused) == (["zz"], {"c": "escalated"})
    assert store.claim(["a"], "job2").refused == {"a": "claimed (job1)"}
    assert store.unclaim(["a"], "job2").refused == {"a": "claimed (job1)"}
    for _ in range(2):
        assert [sample.state for sample in store.unclaim(["a"], "job1").samples] == ["labelled"]
    store.claim(["a", "b"], "job2")
    for _ in range(2):
        assert [sample.used_by for sample in store.used(["a", "b"], "d@1.1").samples] == ["d@1.1", "d@1.1"]
    assert store.used(["a"], "d@1.2").refused == {"a": "used (d@1.1)"}
    for _ in range(2):
        assert [sample.state for sample in store.archive(["a"]).samples] == ["archived"]
    assert store.counts() == {"archived": 1, "used": 1, "escalated": 1}


def test_samples_are_listed_by_state_oldest_first_in_pages(store: Store) -> None:
    for n in (3, 1, 2):
        escalate(store, f"s{n}", captured=float(n))
    store.capture(new_sample("c", state="captured", captured=0.0), image_of("c"))
    assert [sample.id for sample in store.samples("escalated", 2)] == ["s1", "s2"]
    assert [sample.id for sample in store.samples("escalated", 2, 2)] == ["s3"]
    assert [sample.id for sample in store.samples()] == ["c", "s1", "s2", "s3"]


def test_eviction_takes_what_is_used_first_and_never_what_training_still_needs(store: Store) -> None:
    for n, state in enumerate(("captured", "escalated", "labelled", "claimed", "used", "archived", "rejected")):
        escalate(store, state, state="captured" if state == "captured" else "escalated", captured=float(n))
    for sample_id in ("labelled", "claimed", "used", "archived"):
        label(store, sample_id)
    label(store, "rejected", "rejected")
    store.claim(["claimed", "used", "archived"], "job")
    store.used(["used", "archived"], "d@1.1")
    store.archive(["archived"])
    order = []
    while (before := store.counts()) and store.evict(1).samples:
        order += [state for state, n in before.items() if store.counts().get(state, 0) < n]
    assert order == [state for state in EVICTABLE if state != "unresolved"]
    assert store.counts() == {"escalated": 1, "labelled": 1, "claimed": 1}
