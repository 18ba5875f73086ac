"""The store on real SQLite files: what a device remembers, in which order it forgets, and what survives a kill -9."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.store import (
    BrokenStore,
    NewSample,
    OutboxFull,
    OutboxMessage,
    Sample,
    StorageFull,
    Store,
    StoreLimits,
)
from edged.store.records import CORRECTIONS, EVICTABLE, VERDICTS

MODEL = {"kind": "model", "who": "teacher", "release": "t@1"}
PERSON = {"kind": "person", "who": "ada"}
SEVEN = [{"label": "7", "box": [1.0, 2.0, 3.0, 4.0], "score": 1.0}]


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


def image_of(n: int | str) -> bytes:
    return f"pixels {n} ".encode() * 50


def new_sample(sample_id: str, image: bytes | None = None, state: Any = "escalated", **changes: Any) -> NewSample:
    image = image_of(sample_id) if image is None else image
    values: dict[str, Any] = {
        "id": sample_id, "pipeline": "line", "task": "digits", "model": "vision", "release": "d@1.0", "state": state,
        "reason": "low_confidence", "decision": "escalate", "confidence": 0.25, "inclusion_probability": 1.0,
        "sha256": hashlib.sha256(image).hexdigest(), "bytes": len(image), "prediction": SEVEN, "item": "a.jpg",
        "captured": 100.0, "answer_by": 105.0, "label_by": 1000.0,
    }  # fmt: skip
    return NewSample(**(values | changes))


def escalation_of(sample_id: str, **changes: Any) -> OutboxMessage:
    values: dict[str, Any] = {
        "id": f"m-{sample_id}", "topic": "t/esc", "qos": 1, "retain": False, "expires": 1000.0, "payload": b"{}",
        "keep": "verdict", "sample": sample_id, "correlation": b"dev/" + sample_id.encode(),
    }  # fmt: skip
    return OutboxMessage(**(values | changes))


def message(message_id: str, **changes: Any) -> OutboxMessage:
    return escalation_of("x", **({"id": message_id, "keep": "ack", "sample": None, "expires": None} | changes))


def escalate(store: Store, sample_id: str, **changes: Any) -> None:
    store.capture(new_sample(sample_id, **changes), image_of(sample_id), escalation_of(sample_id))


def label(store: Store, sample_id: str, status: Any = "labelled", boxes: Any = SEVEN, by: Any = MODEL) -> Sample:
    sample = store.label(sample_id, status, boxes, 0.9, by, "", 200.0)
    assert sample is not None
    return sample


def due_ids(store: Store, now: float, limit: int = 100) -> list[str]:
    return [row.message.id for row in store.due(now, limit)]


def files(store_folder: Path) -> list[Path]:
    return [path for path in (store_folder / "blobs").rglob("*") if path.is_file()]


# Capturing


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
    assert store.sample("a") is None


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


# Outbox


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


def test_language_requests_are_kept_newest_first_and_bounded(tmp_path: Path) -> None:
    store = Store(tmp_path, StoreLimits(requests_max=2))
    for n in range(3):
        store.record_request(id=f"r{n}", pipeline="chat", release="p@1", prompt=f"q{n}", answer="a", ts=float(n))
    store.record_request(id="r2", pipeline="chat", release="p@1", prompt="q2", answer="a", ts=2.0, outcome="bad")
    kept = store.requests(9)
    assert [(request.id, request.prompt, request.outcome) for request in kept] == [
        ("r2", "q2", "bad"),
        ("r1", "q1", "ok"),
    ]
    store.close()


# Damage


def test_a_damaged_database_is_named_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "edged.db").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(BrokenStore, match=r"edged\.db.*move the file away"):
        Store(tmp_path)


def test_a_damaged_page_is_found_when_the_store_opens(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for n in range(20):
        store.enqueue(message(f"m{n}", payload=os.urandom(4000)), 1.0)
    store.close()
    path = tmp_path / "edged.db"
    content = bytearray(path.read_bytes())
    for page in range(2 * 4096, len(content), 4096):
        content[page : page + 200] = os.urandom(200)
    path.write_bytes(content)
    with pytest.raises(BrokenStore, match=r"edged\.db"):
        Store(tmp_path)


def test_the_sweep_removes_what_has_no_row_and_rejects_what_has_no_blob(store: Store, tmp_path: Path) -> None:
    for sample_id in ("good", "lost", "cut", "spent"):
        escalate(store, sample_id)
    label(store, "spent")
    store.claim(["spent"], "job")
    store.used(["spent"], "d@1.1")
    folder = tmp_path / "blobs"
    for sample_id in ("lost", "spent"):
        (folder / new_sample(sample_id).sha256[:2] / new_sample(sample_id).sha256).unlink()
    (folder / new_sample("cut").sha256[:2] / new_sample("cut").sha256).write_bytes(b"short")
    (folder / "ab" / ("ab" + "0" * 62)).write_bytes(b"orphan")
    (folder / "ab" / "abc.1.0.tmp").write_bytes(b"half")
    report = store.sweep()
    assert (report.temporary, report.orphans, sorted(report.missing)) == (1, 1, ["cut", "lost"])
    assert store.counts() == {"escalated": 1, "rejected": 2, "used": 1}
    lost = store.sample("lost")
    assert lost is not None
    assert lost.label_reason == "blob missing"
    assert due_ids(store, 500.0) == ["m-good"]
    assert store.blob_bytes() == len(image_of("good"))
    again = store.sweep()
    assert (again.temporary, again.orphans, again.missing) == (0, 0, [])


def in_threads(n: int, work: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_threads_capture_evict_and_label_at_once_without_losing_a_blob(store: Store) -> None:
    image = b"shared" * 100

    def work(number: int) -> None:
        for n in range(12):
            sample_id = f"{number}-{n}"
            store.capture(new_sample(sample_id, image, "captured"), image)  # everybody's pixels: captured and evicted
            escalate(store, f"e{sample_id}")
            store.evict(1)
            label(store, f"e{sample_id}")
            store.count("done")

    in_threads(4, work)
    assert store.counts()["labelled"] == 48
    assert store.depth() == (0, 0)
    assert store.sweep().missing == []
    assert store.counters()["done"] == 48


def test_two_processes_may_open_the_same_store(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path)
    escalate(store, "a")
    escalate(other, "b")
    assert other.counts() == store.counts() == {"escalated": 2}
    other.close()


CAPTURE_FOR_EVER = """
import sys, itertools
from pathlib import Path
from edged.store import Store
from tests.unit.test_store import escalate
store = Store(Path(sys.argv[1]))
for n in itertools.count():
    sample_id = f"{sys.argv[2]}-{n}"
    escalate(store, sample_id)
    print(sample_id, flush=True)
"""


def test_kill_9_loses_no_acknowledged_sample_and_leaves_no_orphan(tmp_path: Path) -> None:
    choice = random.Random(7)
    acknowledged: list[str] = []
    root = Path(__file__).parents[2]
    for turn in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", CAPTURE_FOR_EVER, str(tmp_path), str(turn)],
            stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
        )  # fmt: skip
        assert child.stdout is not None
        wanted = choice.randint(1, 25)
        for _ in range(wanted):
            acknowledged.append(child.stdout.readline().strip())
        threading.Event().wait(choice.random() * 0.01)
        child.send_signal(signal.SIGKILL)
        acknowledged += child.stdout.read().split()
        child.wait()
    store = Store(tmp_path)
    assert "" not in acknowledged
    store.sweep()
    queued = set(due_ids(store, 500.0, 10_000))
    for sample_id in acknowledged:
        sample = store.sample(sample_id)
        assert sample is not None, f"{sample_id} was acknowledged and is gone"
        blob = store.blob(sample.sha256)
        assert blob is not None
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == sample.sha256
        assert f"m-{sample_id}" in queued
    kept = store.samples(limit=10_000)
    assert {path.name for path in files(tmp_path)} == {sample.sha256 for sample in kept}
    assert len(queued) == len(kept)
    store.close()


def test_opening_the_store_package_does_not_import_sqlite_utils() -> None:
    code = "import sys, json, edged.store; print(json.dumps([m for m in sys.modules if m.startswith('sqlite_utils')]))"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert json.loads(found.stdout) == []
