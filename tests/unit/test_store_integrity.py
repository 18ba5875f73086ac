"""A damaged database: found at start, set aside with its blobs, read as far as it can be; real files, really damaged."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.store import BrokenStore, LanguageRequest, OutboxMessage, Store, StoreLimits
from edged.store.integrity import BROKEN_MAX, MARKER, SUSPECT, Opened, open_store, set_asides
from edged.store.pages import Damaged, Pages, record, varint
from tests.unit.store_cases import SEVEN, escalation_of, files, image_of, label, message, new_sample

NOW = 500.0
STATES = ("captured", "escalated", "labelled", "claimed", "used", "rejected", "unresolved")
PAGE = 4096


def opened(folder: Path, now: float = NOW) -> Opened:
    return open_store(folder, StoreLimits(), now)


def populate(store: Store, count: int = 70) -> dict[str, str]:
    """Samples in every state, of which the last rows are in the log only; id -> state."""
    for n in range(count):
        state, name = STATES[n % len(STATES)], f"s{n:03}"
        first: Any = "captured" if state == "captured" else "escalated"
        # Evidence of some length: rows that spill over to other pages are recovered too.
        evidence = {"boxes": [0.5] * (n % 5) * 400}
        sample = new_sample(name, state=first, captured=float(n), evidence=evidence)
        store.capture(sample, image_of(name), None if state == "captured" else escalation_of(name))
        if state in ("labelled", "claimed", "used"):
            label(store, name)
        if state in ("rejected", "unresolved"):
            label(store, name, state)
        if state in ("claimed", "used"):
            store.claim([name], "job")
        if state == "used":
            store.used([name], "d@1.1")
    store.save_update("eye", {"target": "eye", "state": "committed", "active": None})
    store.remember_bad("d@9", "b" * 64, "crashed", 5.0)
    store.record_request(LanguageRequest("r1", "chat", 9.0, prompt="why?", answer="so", options={"seed": 1}))
    return {sample.id: sample.state for sample in store.samples(limit=1000)}


def truncate(database: Path) -> None:
    os.truncate(database, database.stat().st_size * 3 // 4)


def zero_a_page_in_the_middle(database: Path) -> None:
    content = database.read_bytes()
    pages = range(len(content) // PAGE // 2, len(content) // PAGE)
    # Not one that only holds the rest of a long row: SQLite has no checksums, and zeros are a value like any other.
    overwrite(database, next(page for page in pages if content[page * PAGE] in (0x0A, 0x0D)), bytes(PAGE))


def garbage_header(database: Path) -> None:
    overwrite(database, 0, b"this is no database " * 10)


def garbage_pages(database: Path) -> None:
    choice = random.Random(3)
    for page in range(3, database.stat().st_size // PAGE, 3):
        overwrite(database, page, choice.randbytes(300))


def zero_the_schema(database: Path) -> None:
    overwrite(database, 0, bytes(PAGE))


def overwrite(path: Path, page: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(page * PAGE)
        file.write(content)


DAMAGE = [truncate, zero_a_page_in_the_middle, garbage_header, garbage_pages, zero_the_schema]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
def test_a_broken_database_is_set_aside_and_what_can_be_read_comes_back(
    tmp_path: Path, damage: Callable[[Path], None], clean: bool
) -> None:
    live = tmp_path / "live"
    first = opened(live)
    states = populate(first.store)
    pixels = {file.name: file.read_bytes() for file in files(live)}
    if not clean:  # as kill -9 leaves it: the marker and the log are there
        first.store._db.read("PRAGMA wal_checkpoint(PASSIVE)")
        label(first.store, "s001", "rejected")  # in the log only
        states["s001"] = "rejected"
        first.store.flush_counters()
        folder = tmp_path / "killed"
        shutil.copytree(live, folder)
        first.store.close()
    else:
        folder = live
        first.store.close()
    damage(folder / "edged.db")

    again = opened(folder)
    store, broken = again.store, again.broken
    assert broken is not None
    assert store.counts() == {}
    assert broken.database.name == "edged.db.broken-19700101T000820Z"
    assert broken.database.is_file()
    assert {file.name: file.read_bytes() for file in broken.blobs.glob("*/*")} == pixels
    assert str(broken.database) in broken.describe()
    assert str(broken.blobs) in broken.describe()
    store.capture(new_sample("fresh"), image_of("fresh"), escalation_of("fresh"))
    store.close()

    store = Store(folder)
    report = store.recover(broken.database, NOW)
    assert report.samples >= len(states) // 5, report
    found = {sample.id: sample.state for sample in store.samples(limit=1000)}
    assert found.pop("fresh") == "escalated"
    assert found.items() <= states.items()
    assert report.samples == len(found)
    assert report.states == {state: list(found.values()).count(state) for state in report.states}
    for sample_id in found:
        sample = store.sample(sample_id)
        assert sample is not None
        blob = store.blob(sample.sha256)
        assert blob is not None
        assert blob.read_bytes() == image_of(sample_id)
        assert sample.evidence == {"boxes": [0.5] * (int(sample_id[1:]) % 5) * 400}
        has_label = sample.state not in ("captured", "escalated") and sample.label_reason != "no verdict in time"
        assert sample.label == (SEVEN if has_label else [])
    waiting = {row.message.sample for row in store.due(600.0, 1000)}
    assert waiting == {sample.id for sample in store.samples(limit=1000) if sample.state == "escalated"}
    assert store._db.read("PRAGMA integrity_check")[0][0] == "ok"
    # What was not recovered keeps its pixels beside the broken file; what was, moved.
    assert {file.name for file in broken.blobs.glob("*/*")} == {
        sha256 for sha256 in pixels if store.blob(sha256) is None
    }
    twice = store.recover(broken.database, NOW)
    assert (twice.samples, twice.already) == (0, report.samples)
    assert store.sweep().missing == []
    store.close()


def test_with_nothing_but_the_header_gone_everything_comes_back(tmp_path: Path) -> None:
    first = opened(tmp_path)
    states = populate(first.store)
    first.store.close()
    garbage_header(tmp_path / "edged.db")
    again = opened(tmp_path)
    assert again.store.updates() == {"eye": {"target": "eye", "state": "committed", "active": None}}
    assert again.store.bad("b" * 64) == "crashed"
    assert again.store.counters()["store_broken"] == 1
    assert again.broken is not None
    report = again.store.recover(again.broken.database, NOW)
    assert (report.samples, report.lost, report.requests) == (len(states), {}, 1)
    assert {sample.id: sample.state for sample in again.store.samples(limit=1000)} == states
    assert again.store.requests(9)[0] == LanguageRequest(
        "r1", "chat", 9.0, prompt="why?", answer="so", options={"seed": 1}
    )
    again.store.close()


def test_lost_and_damaged_pixels_and_questions_are_told_apart(tmp_path: Path) -> None:
    first = opened(tmp_path)
    for name in ("whole", "gone", "damaged"):
        first.store.capture(new_sample(name, state="captured"), image_of(name))
    first.store.capture(new_sample("asked", label_by=9e9), image_of("asked"), escalation_of("asked"))
    first.store.capture(new_sample("late", label_by=NOW - 1), image_of("late"), escalation_of("late"))
    first.store.capture(new_sample("unasked", label_by=9e9), image_of("unasked"))
    first.store.close()
    blobs = {
        sample: next((tmp_path / "blobs").glob(f"*/{new_sample(sample).sha256}")) for sample in ("gone", "damaged")
    }
    blobs["gone"].unlink()
    blobs["damaged"].write_bytes(image_of("damagee"))
    garbage_header(tmp_path / "edged.db")
    store, broken = opened(tmp_path).store, set_asides(tmp_path)[0]
    report = store.recover(broken, NOW)
    assert report.lost == {"its pixels are gone": 1, "its pixels are damaged": 1}
    assert sorted(report.lost_ids) == ["damaged", "gone"]
    assert report.states == {"captured": 1, "escalated": 1, "unresolved": 2}
    reasons = {sample.id: sample.label_reason for sample in store.samples("unresolved")}
    assert reasons == {"late": "no verdict in time", "unasked": "its question was lost with the database"}
    assert [row.message for row in store.due(600.0, 9)] == [escalation_of("asked")]
    store.close()


def test_what_was_deleted_before_does_not_come_back(tmp_path: Path) -> None:
    first = opened(tmp_path)
    populate(first.store)
    while first.store.evict(1 << 30).samples:
        pass
    left = {sample.id for sample in first.store.samples(limit=1000)}
    first.store.close()
    with Pages(tmp_path / "edged.db") as pages:
        assert {values[0] for values in pages.rows() if len(values) > 20} == left  # nothing out of a free page
    garbage_header(tmp_path / "edged.db")
    again = opened(tmp_path)
    assert again.broken is not None
    again.store.recover(again.broken.database, NOW)
    assert {sample.id for sample in again.store.samples(limit=1000)} == left
    again.store.close()


def test_a_deleted_log_loses_rows_but_no_pixels(tmp_path: Path) -> None:
    first = opened(tmp_path / "live")
    populate(first.store, 14)
    first.store._db.read("PRAGMA wal_checkpoint(TRUNCATE)")
    first.store.capture(new_sample("last", state="captured"), image_of("last"))
    shutil.copytree(tmp_path / "live", tmp_path / "killed")
    first.store.close()
    (tmp_path / "killed" / "edged.db-wal").unlink()
    again = opened(tmp_path / "killed")
    assert again.broken is not None
    assert "edged.db-wal is gone" in again.broken.describe()
    assert sum(again.store.counts().values()) == 14
    assert [file.read_bytes() for file in again.broken.blobs.glob("*/*")] == [image_of("last")]
    again.store.close()


def test_pixels_outlive_a_database_that_somebody_moved_away(tmp_path: Path) -> None:
    first = opened(tmp_path)
    populate(first.store, 7)
    first.store.close()
    elsewhere = tmp_path / "edged.db.old"
    (tmp_path / "edged.db").rename(elsewhere)
    again = opened(tmp_path)
    assert again.broken is not None
    assert len(list(again.broken.blobs.glob("*/*"))) == 7
    report = again.store.recover(elsewhere, NOW)
    assert report.samples == 7
    again.store.close()


def test_a_crash_leaves_orphans_that_are_swept_as_ever(tmp_path: Path) -> None:
    first = opened(tmp_path / "live")
    populate(first.store, 7)
    shutil.copytree(tmp_path / "live", tmp_path / "killed")
    first.store.close()
    (tmp_path / "killed" / "blobs" / "ab" / ("ab" + "0" * 62)).write_bytes(b"orphan")
    again = opened(tmp_path / "killed")
    assert (again.broken, again.swept.orphans) == (None, 1)
    assert len(files(tmp_path / "killed")) == 7
    again.store.close()
    assert not (tmp_path / "killed" / MARKER).exists()


def test_no_more_than_some_broken_databases_are_kept(tmp_path: Path) -> None:
    for n in range(BROKEN_MAX + 2):
        store = opened(tmp_path).store
        store.capture(new_sample(f"s{n}", state="captured"), image_of((n and f"s{n}") or "s0"))
        store.close()
        garbage_header(tmp_path / "edged.db")
    opened(tmp_path, NOW + 60).store.close()
    kept = set_asides(tmp_path)
    assert len(kept) == BROKEN_MAX
    assert kept[0].name == "edged.db.broken-19700101T000920Z"
    assert all(path.is_file() for path in kept)
    assert len(list(tmp_path.glob("edged.db.broken-*.blobs"))) == BROKEN_MAX


@pytest.mark.parametrize("damage", [garbage_header, garbage_pages], ids=lambda damage: damage.__name__)
def test_who_cannot_open_a_damaged_database_lets_go_of_it(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store = opened(tmp_path).store
    populate(store)
    store.close()
    damage(tmp_path / "edged.db")
    with pytest.raises(BrokenStore) as caught:
        Store(tmp_path)
    # While the error is still in somebody's hands: what closes later would delete a log by its name.
    held = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [path for path in held if path.startswith(str(tmp_path))], caught.value


def test_a_large_database_is_read_whole_only_after_an_end_out_of_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edged.store.database.CHECK_ALWAYS_BYTES", 0)
    store = opened(tmp_path).store
    for n in range(20):
        store.enqueue(message(f"m{n}", payload=os.urandom(4000)), 1.0)
    store.close()
    database = tmp_path / "edged.db"
    pages = database.stat().st_size // PAGE
    for page in range(pages - 8, pages):  # the rest of long payloads
        overwrite(database, page, os.urandom(200))
    again = opened(tmp_path)
    assert again.broken is None  # closed in order, and large: nobody looked
    assert (tmp_path / MARKER).exists()
    shutil.copytree(tmp_path, tmp_path / "killed")
    again.store.close()
    after_a_kill = opened(tmp_path / "killed")
    assert after_a_kill.broken is not None
    after_a_kill.store.close()


def test_damage_that_is_met_in_service_is_searched_for_at_the_next_start(tmp_path: Path) -> None:
    store = opened(tmp_path).store
    populate(store, 14)
    store.close()
    # An index that still has a row that its table lacks: each page is whole, so a quick check finds nothing.
    entry = "FROM sqlite_master WHERE name = 'sample_sha256'"
    with_schema(tmp_path, f"CREATE TABLE kept AS SELECT * {entry}", f"DELETE {entry}")
    with_schema(tmp_path, "DELETE FROM sample WHERE id = 's003'")
    with_schema(tmp_path, "INSERT INTO sqlite_master SELECT * FROM kept", "DROP TABLE kept")
    first = opened(tmp_path)
    assert first.broken is None
    store = first.store
    store.suspect()
    assert (tmp_path / MARKER).read_text() == SUSPECT
    shutil.copytree(tmp_path, tmp_path / "killed")
    store.close()
    again = opened(tmp_path / "killed")
    assert again.broken is not None
    again.store.close()


def with_schema(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / "edged.db", isolation_level=None)) as raw:
        raw.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            raw.execute(statement)


def test_a_page_that_goes_bad_in_service_is_an_error_of_the_store(tmp_path: Path) -> None:
    store = opened(tmp_path).store
    populate(store)
    store._db.read("PRAGMA wal_checkpoint(TRUNCATE)")
    os.truncate(tmp_path / "edged.db", 3 * PAGE)
    with ThreadPoolExecutor() as another, pytest.raises(BrokenStore, match=r"edged\.db"):
        another.submit(store.samples, limit=1000).result()  # its own connection has nothing in its cache
    assert store.broken
    store.close()
    assert (tmp_path / MARKER).read_text() == SUSPECT
    assert opened(tmp_path).broken is not None


def test_verify_finds_what_is_wrong_with_pixels_and_pages(tmp_path: Path) -> None:
    store = opened(tmp_path).store
    populate(store, 7)
    assert store.verify().bad_blobs == []
    victim = files(tmp_path)[0]
    victim.write_bytes(b"other pixels")
    assert store.verify().bad_blobs == [victim.name]
    store.close()


# The reader of pages, against SQLite itself.

VALUES = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=9000),
    st.binary(max_size=9000),
)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(VALUES, VALUES), max_size=30), log=st.booleans(), page=st.sampled_from([512, 4096, 65536])
)
def test_every_row_that_sqlite_wrote_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, Any]], log: bool, page: int
) -> None:
    path = tmp_path_factory.mktemp("pages") / "t.db"
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute(f"PRAGMA page_size={page}")
    writer.execute("PRAGMA journal_mode=WAL" if log else "PRAGMA journal_mode=DELETE")
    writer.execute("CREATE TABLE t (a BLOB, b BLOB)")
    writer.executemany("INSERT INTO t VALUES (?, ?)", rows)
    writer.execute("BEGIN")
    writer.execute("INSERT INTO t VALUES ('never', 'committed')")
    with Pages(path) as pages:
        found = [tuple(values) for values in pages.rows() if len(values) == 2]
    writer.execute("ROLLBACK")
    expected = [tuple(row) for row in writer.execute("SELECT a, b FROM t ORDER BY rowid")]
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    assert pages.damaged == 0
    writer.close()


@given(st.binary(max_size=60))
def test_no_bytes_make_the_reader_of_records_do_anything_but_refuse(content: bytes) -> None:
    try:
        record(content)
        varint(content, 0)
    except (Damaged, IndexError, ValueError, struct.error):
        pass


def test_an_outbox_message_survives_whole(tmp_path: Path) -> None:
    first = opened(tmp_path)
    question = OutboxMessage("m-a", "t/esc", 1, False, 1000.5, os.urandom(50_000), "verdict", "a", b"\x00\xff")
    first.store.capture(new_sample("a", label_by=1000.5), image_of("a"), question)
    first.store.close()
    garbage_header(tmp_path / "edged.db")
    again = opened(tmp_path)
    assert again.broken is not None
    again.store.recover(again.broken.database, NOW)
    assert [row.message for row in again.store.due(600.0, 9)] == [question]
    again.store.close()


def test_rows_of_free_pages_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA secure_delete = OFF")  # else nothing would be left to read there
        writer.execute("CREATE TABLE t (a INTEGER, b TEXT)")
        writer.executemany("INSERT INTO t VALUES (?, ?)", [(n, "x" * 100) for n in range(2000)])
        writer.execute("DELETE FROM t WHERE a >= 10")
        assert writer.execute("PRAGMA freelist_count").fetchone()[0] > 10
    with Pages(path) as pages:
        assert [values[0] for values in pages.rows() if len(values) == 2] == list(range(10))
