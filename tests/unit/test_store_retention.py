"""What the store gives up, in which order, and what it says when nothing is left; on real SQLite files."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.core import retention as core
from edged.core.retention import CORRECTED, DOUBTED, STEADY_S, SURE, Candidate
from edged.store import StorageFull, Store, StoreError, StoreLimits
from edged.store.records import EVICTABLE
from edged.store.retention import EVICT_MAX, RESERVE_BYTES, TEND_MAX, TEND_S
from tests.support import disk
from tests.support.disk import fill
from tests.unit.store_cases import MODEL, SEVEN, files, image_of, label, new_sample

MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # many rows whose order counts here, not their fsync
PROTECTED = ("escalated", "labelled", "claimed")
DAY_S = 86400.0


def boxes(*labels: str) -> list[dict[str, Any]]:
    return [{"label": name, "box": [0, 0, 1, 1], "score": 0.9} for name in labels]


def bring(store: Store, sample_id: str, state: str, image: bytes | None = None, **changes: Any) -> None:
    """A sample in this state, by the moves that lead there."""
    image = image_of(sample_id) if image is None else image
    first = "captured" if state == "captured" else "escalated"
    store.capture(new_sample(sample_id, image, first, **({"label_by": 1e12} | changes)), image)
    if state in ("labelled", "claimed", "used", "archived"):
        label(store, sample_id, boxes=changes.get("prediction", SEVEN))
    if state in ("rejected", "unresolved"):
        label(store, sample_id, state)
    if state in ("claimed", "used", "archived"):
        store.claim([sample_id], "job")
    if state in ("used", "archived"):
        store.used([sample_id], "d@1.1")
    if state == "archived":
        store.archive([sample_id])


def ids(store: Store) -> set[str]:
    return {sample.id for sample in store.samples(limit=10_000)}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk.small_disk(tmp_path / "disk", "8m") as folder:
        yield folder


# The pure rules.


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], ""),
        (boxes("7"), "7"),
        (boxes("7", "3", "7"), "3\n7"),
        ([{"text": "an answer"}], "text"),
    ],
)
def test_what_a_sample_is_about(parts: list[dict[str, Any]], expected: str) -> None:
    assert core.classes(parts) == expected


@pytest.mark.parametrize(
    ("decision", "prediction", "labelled", "expected"),
    [
        ("audit", boxes("7"), boxes("7"), SURE),
        ("audit", boxes("7", "3"), boxes("3", "7"), SURE),
        ("audit", boxes("7"), None, SURE),
        ("audit", boxes("7"), boxes("1"), CORRECTED),
        ("audit", boxes("7"), [], CORRECTED),
        ("escalate", boxes("7"), None, DOUBTED),
        ("escalate", boxes("7"), boxes("7"), DOUBTED),
        ("escalate", boxes("7"), boxes("7", "7"), CORRECTED),
        ("escalate", [{"text": "a"}], [{"text": "b"}], CORRECTED),
        ("audit", [{"text": "a"}], [{"text": "a"}], SURE),
    ],
)
def test_what_a_sample_is_still_worth(decision: str, prediction: Any, labelled: Any, expected: int) -> None:
    assert core.worth(decision, prediction, labelled) == expected


@pytest.mark.parametrize(
    ("counts", "class_max", "expected"),
    [
        ({}, 2, {}),
        ({"7": 2, "3": 1}, 2, {}),
        ({"7": 5, "3": 1}, 2, {"7": 3}),
        ({"7": 3, "3\n7": 1}, 2, {"7": 2}),
        ({"7": 1, "3\n7": 3}, 2, {"7": 1, "3\n7": 1}),
        ({"": 4}, 1, {"": 3}),
        ({"3\n7": 9, "7": 1}, 20, {}),
    ],
)
def test_no_label_keeps_more_than_its_share(counts: dict[str, int], class_max: int, expected: dict[str, int]) -> None:
    assert core.excess(counts, class_max) == expected


LABELS = st.sets(st.sampled_from("abcd"), max_size=3).map(lambda names: core.BETWEEN.join(sorted(names)))


@given(counts=st.dictionaries(LABELS, st.integers(1, 30), max_size=8), class_max=st.integers(1, 20))
def test_what_is_over_a_share_also_shows_something_rare(counts: dict[str, int], class_max: int) -> None:
    left = dict(counts)
    for about, n in core.excess(counts, class_max).items():
        assert 0 < n <= counts[about]
        left[about] -= n
    totals = {
        name: sum(n for about, n in left.items() if name in about.split(core.BETWEEN))
        for name in {part for about in counts for part in about.split(core.BETWEEN)}
    }
    before = {name: sum(n for about, n in counts.items() if name in about.split(core.BETWEEN)) for name in totals}
    for name, total in totals.items():
        assert total >= min(class_max, before[name]), "no label may fall below its share"
    for about, n in left.items():
        if n:
            assert any(totals[name] <= class_max for name in about.split(core.BETWEEN))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 3)), max_size=12), st.integers(0, 60))
def test_no_more_is_chosen_than_it_takes(drawn: list[tuple[int, int, int]], wanted: int) -> None:
    sizes = {blob: size for blob, size, _ in drawn}
    candidates = [Candidate(str(n), str(blob), sizes[blob], shared) for n, (blob, _, shared) in enumerate(drawn)]
    chosen, freed = core.choose(candidates, wanted)
    assert chosen == candidates[: len(chosen)]
    assert freed >= wanted or len(chosen) == len(candidates)
    if chosen:
        assert core.choose(candidates[: len(chosen) - 1], wanted)[1] < wanted


def test_a_corrected_clock_makes_nothing_old_for_a_while() -> None:
    pace = core.keep_pace(None, 1000.0, 0.0)
    assert not core.steady(pace, STEADY_S - 1)
    pace = core.keep_pace(pace, 1000.0 + STEADY_S + 0.5, STEADY_S)  # half a second of drift
    assert core.steady(pace, STEADY_S)
    pace = core.keep_pace(pace, 1e9, STEADY_S + 1)  # set right
    assert not core.steady(pace, STEADY_S + 1)


# The store.


@settings(max_examples=25, deadline=None)
@given(
    drawn=st.lists(
        st.tuples(st.sampled_from((*EVICTABLE, *PROTECTED)), st.integers(0, 4), st.integers(0, 3)), max_size=14
    ),
    wanted=st.integers(1, 6000),
)
def test_only_what_may_be_is_given_up_and_enough_of_it(drawn: list[tuple[str, int, int]], wanted: int) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        store = Store(Path(name))
        for n, (state, blob, age) in enumerate(drawn):
            bring(store, f"s{n}", state, image_of(blob) * (blob + 1), captured=float(age))
        before = {sample.id: sample for sample in store.samples(limit=100)}
        kept_by_need = {s.sha256 for s in before.values() if s.state in PROTECTED}
        freeable = sum({s.sha256: s.bytes for s in before.values() if s.sha256 not in kept_by_need}.values())
        used = store.blob_bytes()
        done = store.evict(wanted)
        left = ids(store)
        gone = [sample for key, sample in before.items() if key not in left]
        assert all(sample.state in EVICTABLE for sample in gone)
        assert len(gone) == done.samples
        assert used - store.blob_bytes() == done.bytes >= min(wanted, freeable)
        assert bool(store.full) == (freeable < wanted)
        assert {file.name for file in files(Path(name))} == {store.sample(key).sha256 for key in left}  # type: ignore[union-attr]
        free_for_all = [s for key, s in before.items() if key in left and s.sha256 not in kept_by_need]
        worst_gone = max((EVICTABLE.index(sample.state) for sample in gone), default=-1)
        first_left = min((EVICTABLE.index(s.state) for s in free_for_all if s.state in EVICTABLE), default=99)
        assert worst_gone <= first_left
        store.close()


def test_within_a_state_the_least_informative_goes_first_then_the_oldest(folder: Path) -> None:
    store = Store(folder)
    bring(store, "doubted", "used", captured=1.0)
    bring(store, "sure-new", "used", decision="audit", captured=9.0)
    bring(store, "corrected", "used", decision="audit", captured=0.0, prediction=boxes("1"))
    store.capture(new_sample("x", state="captured", captured=-1.0), image_of("x"))
    bring(store, "sure-old", "used", decision="audit", captured=5.0)
    with store._db.write() as tables:
        tables.execute("UPDATE sample SET worth = ? WHERE id = 'corrected'", (CORRECTED,))
    order = []
    while gone := ids(store):
        store.evict(1)
        order += list(gone - ids(store))
    assert order == ["sure-old", "sure-new", "doubted", "corrected", "x"]
    store.close()


def test_a_label_that_contradicts_the_model_raises_what_a_sample_is_worth(folder: Path) -> None:
    store = Store(folder)
    for name, found in (("agrees", SEVEN), ("contradicts", boxes("1"))):
        store.capture(new_sample(name, decision="audit", prediction=SEVEN), image_of(name))
        label(store, name, boxes=found)
        store.claim([name], "j")
        store.used([name], "d@1.1")
    store.evict(1)
    assert ids(store) == {"contradicts"}
    store.close()


def test_one_call_gives_up_a_bounded_number(folder: Path) -> None:
    store = Store(folder)
    for n in range(EVICT_MAX + 10):
        bring(store, f"s{n:03}", "captured", f"{n:03}".encode(), captured=float(n))
    assert store.evict(1 << 30).samples == EVICT_MAX
    assert store.full == ""  # there is more to give up
    assert store.evict(1 << 30).samples == 10
    assert "nothing is left" in store.full
    store.close()


def test_a_full_store_says_so_and_says_when_there_is_room_again(folder: Path) -> None:
    size = len(image_of("s0"))
    store = Store(folder, StoreLimits(blob_bytes_max=3 * size))
    for n in range(3):
        bring(store, f"s{n}", "labelled")
    with pytest.raises(StorageFull):
        bring(store, "s3", "captured")
    store.evict(size)
    assert "blob_bytes_max=" in store.full
    assert store.storage().full == store.full
    store.tend(0.0, 0.0)
    assert store.full != ""
    store.claim(["s0"], "j")
    store.used(["s0"], "d@1.1")
    store.tend(2.0, 2.0)
    assert store.full == ""
    bring(store, "s3", "captured")
    assert store.counts() == {"captured": 1, "labelled": 2}
    store.close()


def test_the_last_bytes_of_the_file_system_are_not_taken(folder: Path) -> None:
    told = os.statvfs(folder)
    store = Store(folder, StoreLimits(free_bytes_min=told.f_bavail * told.f_frsize + (1 << 30)))
    with pytest.raises(StorageFull, match="free_bytes_min"):
        bring(store, "a", "captured")
    store.close()
    store = Store(folder)
    bring(store, "a", "captured")
    bring(store, "b", "labelled")
    store.close()
    store = Store(folder, StoreLimits(free_bytes_min=told.f_bavail * told.f_frsize + (1 << 30)))
    store.tend(0.0, 0.0)  # somebody else has filled the disk: what may go goes before anything new comes
    assert ids(store) == {"b"}
    assert "free_bytes_min=" in store.full
    store.close()


def test_what_is_too_old_goes_by_its_state_once_the_clock_is_trusted(folder: Path) -> None:
    store = Store(folder, StoreLimits(age_days={"used": 10, "captured": 1}))
    now = 100 * DAY_S
    for state, age in (
        ("used", 11),
        ("used", 9),
        ("captured", 2),
        ("captured", 0.5),
        ("archived", 99),
        ("labelled", 99),
    ):
        bring(store, f"{state}-{age}", state, captured=now - age * DAY_S)
    before = ids(store)
    store.tend(now, 0.0)
    assert ids(store) == before
    store.tend(now + STEADY_S, STEADY_S)
    assert before - ids(store) == {"used-11", "captured-2"}
    assert store.counters()["samples_too_old"] == 2
    store.close()


def test_a_frequent_class_gives_way_and_a_frame_with_something_rare_stays(folder: Path) -> None:
    store = Store(folder, StoreLimits(class_max=3))
    for n in range(6):
        bring(store, f"seven{n}", "captured", captured=float(n), prediction=boxes("7"))
    bring(store, "rare", "captured", captured=0.0, prediction=boxes("3", "7"))
    bring(store, "empty", "captured", prediction=[])
    bring(store, "waits", "labelled", captured=0.0, prediction=boxes("7"))
    store.tend(0.0, 0.0)
    assert ids(store) == {"seven4", "seven5", "rare", "empty", "waits"}
    assert store.counters()["samples_over_class_max"] == 4
    store.close()


def test_a_long_backlog_is_worked_off_tick_by_tick(folder: Path) -> None:
    store = Store(folder)
    for n in range(TEND_MAX + 20):
        bring(store, f"s{n:04}", "captured", f"{n}".encode(), captured=float(n))
    store.close()
    store = Store(folder, StoreLimits(class_max=5))
    store.tend(0.0, 0.0)
    assert store.counts() == {"captured": 20}
    store.tend(0.25, 0.25)
    assert store.counts() == {"captured": 5}
    bring(store, "late", "captured", captured=1e6)
    store.tend(0.5, 0.5)  # nothing was left over: not before a minute
    assert store.counts() == {"captured": 6}
    store.tend(TEND_S + 1, TEND_S + 1)
    assert store.counts() == {"captured": 5}
    store.close()


def test_a_disk_that_others_filled_can_still_be_tidied(small_disk: Path) -> None:
    store = Store(small_disk / "state")
    store.hold_reserve(small_disk / "state" / "edged.reserve")
    assert (small_disk / "state" / "edged.reserve").stat().st_size == RESERVE_BYTES
    image = random.Random(1).randbytes(40_000)
    for n in range(30):
        bring(store, f"s{n}", "captured", image + bytes([n]), captured=float(n))
    bring(store, "waits", "labelled", image)
    store._db.read("PRAGMA wal_checkpoint(TRUNCATE)")  # so that the log has to grow again
    fill(small_disk)
    with pytest.raises(StorageFull):
        bring(store, "new", "captured", random.Random(2).randbytes(100_000))
    assert store.counts() == {"captured": 30, "labelled": 1}
    assert store.evict(100_000).bytes >= 100_000
    bring(store, "new", "captured", random.Random(2).randbytes(100_000))
    assert store.full == ""
    sample = store.sample("new")
    assert sample is not None
    blob = store.blob(sample.sha256)
    assert blob is not None
    assert blob.read_bytes() == random.Random(2).randbytes(100_000)
    assert {"waits", "new"} <= ids(store)
    store.close()


def test_a_full_disk_is_an_error_of_the_store_and_passes(small_disk: Path) -> None:
    store = Store(small_disk / "state")
    bring(store, "a", "labelled")
    store._db.read("PRAGMA wal_checkpoint(TRUNCATE)")
    filler = fill(small_disk)
    for n in range(3):
        with pytest.raises(StorageFull, match=r"disk|room"):
            bring(store, f"b{n}", "captured", random.Random(n).randbytes(100_000))
    with pytest.raises(StorageFull):
        store.set_value("key", "x" * 200_000)
    store.count("still_counted")
    filler.unlink()
    store.set_value("key", "x" * 200_000)
    bring(store, "c", "captured")
    assert store.value("key") == "x" * 200_000
    assert ids(store) == {"a", "c"}
    store.close()
    reopened = Store(small_disk / "state")
    assert reopened.sweep().missing == []
    assert reopened.counters()["still_counted"] == 1
    reopened.close()


# The migration.


def test_an_older_store_learns_what_its_samples_show(folder: Path) -> None:
    store = Store(folder)
    bring(store, "seven", "captured", prediction=SEVEN)
    bring(store, "corrected", "used", prediction=boxes("7"), decision="audit")
    with store._db.write() as tables:  # as m004 left it
        tables.execute("UPDATE sample SET label = ? WHERE id = 'corrected'", (json.dumps(boxes("1")),))
        tables.execute("DROP INDEX sample_worth")
        tables.execute("DROP INDEX sample_classes")
        tables.execute("ALTER TABLE sample DROP COLUMN classes")
        tables.execute("ALTER TABLE sample DROP COLUMN worth")
        tables.execute("DELETE FROM _sqlite_migrations WHERE name = 'm005_retention'")
    store.close()
    store = Store(folder)
    rows = store._db.read("SELECT id, classes, worth FROM sample ORDER BY id")
    assert [tuple(row) for row in rows] == [("corrected", "1", CORRECTED), ("seven", "7", DOUBTED)]
    sample = store.sample("corrected")
    assert sample is not None
    assert sample.provenance == MODEL
    store.close()


def test_an_error_of_the_file_system_is_one_of_the_store_and_passes(folder: Path) -> None:
    store = Store(folder)
    bring(store, "a", "captured")
    shelf = folder / "blobs" / new_sample("b").sha256[:2]
    shelf.rmdir()
    shelf.write_bytes(b"no folder")
    with pytest.raises(StoreError) as refused:
        bring(store, "b", "captured")
    assert not isinstance(refused.value, StorageFull)
    assert str(shelf) in str(refused.value)
    shelf.unlink()
    shelf.mkdir()
    bring(store, "b", "captured")
    blob = store.blob(new_sample("a").sha256)
    assert blob is not None
    blob.unlink()
    blob.mkdir()  # cannot be unlinked
    assert store.evict(1).samples == 1
    assert ids(store) == {"b"}
    assert store.counters()["blobs_not_removed"] == 1
    store.close()
