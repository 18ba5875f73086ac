"""The store when things go wrong: damage, threads, other processes, kill -9, any order of events."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edged.store import BrokenStore, NewSample, OutboxFull, OutboxMessage, Store, StoreLimits
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


def test_a_damaged_database_is_named_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "edged.db").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(BrokenStore, match=r"edged\.db.*edged samples recover"):
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


def test_pixels_that_are_being_captured_again_are_not_evicted_from_under_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = b"same" * 100
    store.capture(new_sample("old", image, "captured"), image)
    insert = store._insert

    def insert_late(sample: NewSample, escalation: OutboxMessage | None) -> None:
        assert store.evict(1).samples == 1  # another thread needs room just now
        insert(sample, escalation)

    monkeypatch.setattr(store, "_insert", insert_late)
    store.capture(new_sample("new", image), image)
    blob = store.blob(new_sample("new", image).sha256)
    assert blob is not None
    assert blob.read_bytes() == image


def test_a_refused_sample_does_not_take_the_pixels_of_another_with_it(tmp_path: Path) -> None:
    store = Store(tmp_path, StoreLimits(outbox_rows_max=0))
    image = b"same" * 100
    store.capture(new_sample("kept", image, "captured"), image)
    with pytest.raises(OutboxFull):
        store.capture(new_sample("refused", image), image, escalation_of("refused"))
    assert store.blob(new_sample("kept", image).sha256) is not None
    store.close()


def test_two_processes_may_write_the_same_store_at_once(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path)

    def work(number: int) -> None:
        for n in range(40):
            (store, other)[number].enqueue(message(f"{number}-{n}"), 1.0)

    in_threads(2, work)
    assert other.depth() == store.depth() == (80, 160)
    other.close()


MEMORY = Path("/dev/shm")  # hundreds of transactions whose order counts here, not their fsync


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: an escalation waits exactly while its sample is escalated, and no sample that
    is kept is without its pixels."""

    ids = st.sampled_from(["a", "b", "c", "d"])

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.store = Store(Path(self.folder.name))
        self.now = 100.0

    def teardown(self) -> None:
        self.restart()
        self.store.close()
        self.folder.cleanup()

    @rule(sample_id=ids, escalated=st.booleans())
    def capture(self, sample_id: str, escalated: bool) -> None:
        image = image_of("shared" if sample_id in "ab" else sample_id)
        sample = new_sample(sample_id, image, "escalated" if escalated else "captured", label_by=self.now + 30)
        self.store.capture(sample, image, escalation_of(sample_id, expires=None) if escalated else None)

    @rule(sample_id=ids, status=st.sampled_from(["labelled", "unresolved", "rejected"]), person=st.booleans())
    def verdict(self, sample_id: str, status: Any, person: bool) -> None:
        self.store.label(sample_id, status, SEVEN, 0.9, PERSON if person else MODEL, "", self.now)

    @rule(passes=st.floats(0, 60))
    def time_passes(self, passes: float) -> None:
        self.now += passes
        self.store.expire(self.now)

    @rule(sample_id=ids, move=st.sampled_from(["claim", "used", "unclaim", "archive"]))
    def trainer_moves(self, sample_id: str, move: str) -> None:
        values = {"claim": ["job"], "unclaim": ["job"], "used": ["d@1.1"], "archive": []}[move]
        getattr(self.store, move)([sample_id], *values)

    @rule()
    def broker_answers(self) -> None:
        ids = [row.message.id for row in self.store.due(self.now, 2)]
        self.store.sent_many(ids, self.now, self.now + 5)
        self.store.acked_many(ids, self.now, self.now + 20)

    @rule()
    def room_is_needed(self) -> None:
        self.store.evict(1)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = Store(Path(self.folder.name))
        report = self.store.sweep()
        assert (report.temporary, report.orphans, report.missing) == (0, 0, [])

    @invariant()
    def nothing_is_lost_or_left(self) -> None:
        samples = self.store.samples()
        self.store.resend_all(self.now)  # so that what waits for a retry is seen too
        waiting = {row.message.sample for row in self.store.due(self.now, 100)}
        assert waiting == {sample.id for sample in samples if sample.state == "escalated"}
        assert all(self.store.blob(sample.sha256) for sample in samples)


AnyOrder.TestCase.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
TestAnyOrder = AnyOrder.TestCase


CAPTURE_FOR_EVER = """
import hashlib, itertools, sys
from pathlib import Path
from edged.store import NewSample, OutboxMessage, Store
store = Store(Path(sys.argv[1]))
for n in itertools.count():
    key = f"{sys.argv[2]}-{n}"
    image = f"pixels {key} ".encode() * 5000
    sha256 = hashlib.sha256(image).hexdigest()
    sample = NewSample(key, "line", "digits", "vision", "d@1.0", "escalated", "low", "escalate", 0.2, 1.0,
                       sha256, len(image), [], "a.jpg", 100.0, 105.0, 1000.0)
    store.capture(sample, image, OutboxMessage(f"m-{key}", "t", 1, False, 1000.0, b"{}", "verdict", key))
    print(key, flush=True)
"""


def test_kill_9_loses_no_acknowledged_sample_and_leaves_no_orphan(tmp_path: Path) -> None:
    choice = random.Random(7)
    acknowledged: list[str] = []
    root = Path(__file__).parents[2]
    for turn in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", CAPTURE_FOR_EVER, str(tmp_path), str(turn)],
            stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
        )  # fmt: skip
        assert child.stdout is not None
        wanted = choice.randint(1, 20)
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
