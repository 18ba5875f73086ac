"""The folder as a source, with real files: each exactly one item, none lost, none half written."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from watchdog.events import FileModifiedEvent, FileMovedEvent

from edged.clock import FastClock, SystemClock
from edged.sources import Item
from edged.sources.directory import DirectorySource

WAIT_S = 10.0


class Sink:
    """Takes items as a pipeline's queue does."""

    def __init__(self) -> None:
        self.items: queue.Queue[Item] = queue.Queue()
        self.open = True

    def put(self, item: Item) -> bool:
        if self.open:
            self.items.put(item)
        return self.open

    def next(self) -> Item:
        return self.items.get(timeout=WAIT_S)

    def rest(self) -> list[str]:
        """The names of what else has come; waits for a fence that comes after everything before it."""
        names = []
        while not self.items.empty():
            names.append(self.items.get_nowait().name)
        return names


@contextmanager
def watching(path: Path, sink: Sink, after: str = "move") -> Iterator[DirectorySource]:
    source = DirectorySource(path, after, sink.put, SystemClock())
    source.start()
    try:
        yield source
    finally:
        source.stop()


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "in"


def rename_in(folder: Path, name: str, data: bytes) -> None:
    (folder / f".{name}").write_bytes(data)
    (folder / f".{name}").rename(folder / name)


def until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_files_come_in_the_order_they_were_written_whether_closed_or_renamed(folder: Path, sink: Sink) -> None:
    with watching(folder, sink):
        rename_in(folder, "b.png", b"one")
        assert (item := sink.next()).name == "b.png"
        assert item.image == b"one"
        (folder / "a.png").write_bytes(b"two")
        assert sink.next().image == b"two"


def test_what_lies_there_at_the_start_comes_oldest_first(folder: Path, sink: Sink) -> None:
    folder.mkdir()
    for age, name in ((30, "c"), (10, "a"), (20, "b")):
        (folder / name).write_bytes(name.encode())
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    with watching(folder, sink):
        assert [sink.next().name for _ in range(3)] == ["c", "b", "a"]


def test_half_written_and_hidden_files_are_not_looked_at(folder: Path, sink: Sink) -> None:
    with watching(folder, sink):
        for name in (".hidden", "x.part", "x.tmp", "x.crdownload"):
            (folder / name).write_bytes(b"half")
        (folder / "folder").mkdir()
        rename_in(folder, "fence.png", b"whole")
        assert sink.next().name == "fence.png"
        (folder / "x.part").rename(folder / "x.png")
        assert sink.next().name == "x.png"
        assert not sink.rest()


def test_a_file_that_is_still_open_waits_until_it_is_closed(folder: Path, sink: Sink) -> None:
    with watching(folder, sink), (folder / "slow.png").open("wb") as file:
        file.write(b"first half")
        file.flush()
        rename_in(folder, "fence.png", b"")
        assert sink.next().name == "fence.png"
        file.write(b", second half")
        file.close()
        assert sink.next().image == b"first half, second half"


def test_a_name_whose_file_was_renamed_while_open_is_nobodys_any_more(folder: Path, sink: Sink) -> None:
    still = FastClock(1e-9)
    source = DirectorySource(folder, "move", sink.put, still)
    source.on_modified(FileModifiedEvent(str(folder / "a.png")))
    source.on_moved(FileMovedEvent(str(folder / "a.png"), str(folder / "b.png")))
    folder.mkdir()
    (folder / "a.png").write_bytes(b"another")
    os.utime(folder / "a.png", (still.now() - 5, still.now() - 5))  # long enough, unless its writer only seems slow
    source.start()
    try:
        assert sink.next().image == b"another"
    finally:
        source.stop()


def test_settled_files_are_moved_rejected_ones_set_aside(folder: Path, sink: Sink) -> None:
    with watching(folder, sink):
        rename_in(folder, "good.png", b"good")
        sink.next().settle("")
        rename_in(folder, "bad.png", b"bad")
        sink.next().settle("it is no picture")
        assert (folder / "done" / "good.png").read_bytes() == b"good"
        assert (folder / "rejected" / "bad.png").read_bytes() == b"bad"
        rename_in(folder, "good.png", b"another of that name")
        assert sink.next().image == b"another of that name"


def test_settled_files_are_deleted_when_nobody_wants_them(folder: Path, sink: Sink) -> None:
    with watching(folder, sink, "delete"):
        rename_in(folder, "good.png", b"good")
        sink.next().settle("")
        rename_in(folder, "bad.png", b"bad")
        sink.next().settle("it is no picture")
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == ["rejected/bad.png"]


def test_what_was_not_settled_comes_again_after_a_restart_as_the_same_item(folder: Path, sink: Sink) -> None:
    with watching(folder, sink):
        for name in ("a.png", "b.png"):
            rename_in(folder, name, name.encode())
        first, second = sink.next(), sink.next()
        first.settle("")
        assert not sink.rest()
    with watching(folder, sink):
        again = sink.next()
        assert (again.id, again.name, again.captured) == (second.id, second.name, second.captured)
        assert first.id != second.id
        again.settle("")
        rename_in(folder, "b.png", b"b.png")  # the same name and bytes later is another item
        assert sink.next().id != second.id


def test_a_file_written_anew_while_it_is_answered_is_another_item(folder: Path, sink: Sink) -> None:
    with watching(folder, sink):
        rename_in(folder, "latest.png", b"one")
        first = sink.next()
        os.utime(folder / "latest.png", (1e9, 1e9))  # so that the clock's grain does not matter
        rename_in(folder, "latest.png", b"two")
        first.settle("")
        second = sink.next()
        assert second.image == b"two"
        second.settle("")
        until(lambda: not (folder / "latest.png").exists())


def test_a_file_that_somebody_takes_away_is_no_fault(folder: Path, sink: Sink) -> None:
    with watching(folder, sink) as source:
        rename_in(folder, "gone.png", b"one")
        item = sink.next()
        (folder / "gone.png").unlink()
        item.settle("")
        rename_in(folder, "gone.png", b"two")
        assert sink.next().image == b"two"
        assert source.alive()


def test_a_sink_that_takes_nothing_more_loses_nothing(folder: Path, sink: Sink) -> None:
    with ExitStack() as stack:
        source = stack.enter_context(watching(folder, sink))
        sink.open = False
        rename_in(folder, "a.png", b"a")
        rename_in(folder, "b.png", b"b")
        assert source.alive()
        sink.open = True
        source.on_closed(type("Event", (), {"src_path": str(folder / "b.png")})())
        assert {sink.next().name, sink.next().name} == {"a.png", "b.png"}
    assert not source.alive()


def test_more_files_than_notifications_are_all_found(folder: Path, sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edged.sources.directory.RESCAN_S", 0.05)
    with watching(folder, sink) as source:
        monkeypatch.setattr(source, "_note", lambda _path: None)  # every notification is lost
        for number in range(50):
            (folder / f"{number:02}").write_bytes(b"x")
            os.utime(folder / f"{number:02}", (1e9 + number, 1e9 + number))
        assert sorted(sink.next().name for _ in range(50)) == [f"{number:02}" for number in range(50)]
