"""Rows on SQLite and PostgreSQL alike: nobody's change is lost, one coordinator at a time, nothing half done."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text, update

from edged.link import Inbound
from edged.wire import messages, topics
from tests.support.postgres import Postgres
from trainer import dialects
from trainer.config import TrainerConfig
from trainer.coordinator import Coordinator
from trainer.database import Database, DatabaseError, Served, events, jobs, put, workers

BOTH = pytest.mark.usefixtures("each_database")
ROUNDS, PROCESSES = 40, 3
ENVELOPE = {"id": "m1", "ts": 1.0, "boot": "b", "seq": 1}


def count_up(where: Path | str) -> None:
    """Read a number, think, and write one more."""
    database = Database(where)
    for _ in range(ROUNDS):
        with database.write() as connection:
            found = connection.execute(select(workers.c.seen)).scalar_one()
            connection.execute(update(workers).values(seen=found + 1))
    database.close()


def address(database: Database) -> Path | str:
    if database.engine.dialect.name == "sqlite":
        return Path(str(database.engine.url.database))
    return database.engine.url.render_as_string(hide_password=False)


@BOTH
def test_nothing_is_lost_when_several_processes_read_and_then_write(tmp_path: Path) -> None:
    database = Database(tmp_path / "t.sqlite")
    with database.write() as connection:
        put(connection, workers, {"name": "w"}, {"facts": {}, "seen": 0.0})
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=count_up, args=(address(database),)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    with database.read() as connection:
        assert connection.execute(select(workers.c.seen)).scalar_one() == ROUNDS * PROCESSES
    database.close()


@BOTH
def test_a_reader_sees_one_state_of_everything(tmp_path: Path) -> None:
    database = Database(tmp_path / "t.sqlite")
    with database.write() as connection:
        put(connection, workers, {"name": "w"}, {"facts": {}, "seen": 1.0})
    other = threading.Thread(target=lambda: move(database))
    with database.read() as connection:
        before = connection.execute(select(workers.c.seen)).scalar_one()
        other.start()
        other.join(30)
        assert connection.execute(select(workers.c.seen)).scalar_one() == before
    with database.read() as connection:
        assert connection.execute(select(workers.c.seen)).scalar_one() == before + 1
    database.close()


def move(database: Database) -> None:
    with database.write() as connection:
        connection.execute(update(workers).values(seen=workers.c.seen + 1))


@BOTH
def test_a_reader_inside_a_writer_sees_what_that_wrote(tmp_path: Path) -> None:
    database = Database(tmp_path / "t.sqlite")
    with database.write() as connection:
        put(connection, workers, {"name": "w"}, {"facts": {"a": [1, None]}, "seen": 1.0})
        with database.read() as inner:
            assert inner.execute(select(workers.c.facts)).scalar_one() == {"a": [1, None]}
    database.close()


def break_within(database: Database, name: str, nested: bool = False) -> None:
    with database.write() as connection:
        if nested:
            with database.write() as inner:
                put(inner, workers, {"name": name}, {"facts": {}, "seen": 1.0})
        else:
            put(connection, workers, {"name": name}, {"facts": {}, "seen": 1.0})
        raise ZeroDivisionError


@BOTH
def test_a_write_inside_another_is_undone_alone_or_with_it(tmp_path: Path) -> None:
    database = Database(tmp_path / "t.sqlite")
    with database.write() as connection:
        put(connection, workers, {"name": "outer"}, {"facts": {}, "seen": 1.0})
        with pytest.raises(ZeroDivisionError):
            break_within(database, "inner")
    with pytest.raises(ZeroDivisionError):
        break_within(database, "lost", nested=True)
    with database.read() as connection:
        assert connection.execute(select(workers.c.name)).scalars().all() == ["outer"]
    database.close()


@BOTH
def test_two_coordinators_never_work_on_one_database(tmp_path: Path) -> None:
    first, second = Database(tmp_path / "t.sqlite"), Database(tmp_path / "t.sqlite")
    first.serve("host-a")
    with pytest.raises(Served, match="another `trainer serve` works on this database \\(host-a\\): stop it first"):
        second.serve("host-b")
    with second.write() as connection:  # a command line may write its orders all the same
        put(connection, workers, {"name": "w"}, {"facts": {}, "seen": 1.0})
    first.close()
    second.serve("host-b")
    second.close()


@BOTH
def test_who_lost_the_database_to_another_writes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Database(tmp_path / "t.sqlite"), Database(tmp_path / "t.sqlite")
    first.serve("host-a")
    with first.write() as connection:
        put(connection, workers, {"name": "w"}, {"facts": {}, "seen": 1.0})
    # The lock is gone without its holder's knowledge, as when PostgreSQL was restarted, or a disk was moved.
    held, first._lock = first._lock, open(tmp_path / "unlocked", "w")  # noqa: SIM115
    held.close()
    second.serve("host-b")
    with (
        pytest.raises(Served, match=r"was taken over by another `trainer serve` \(host-b\)"),
        first.write() as connection,
    ):
        connection.execute(update(workers).values(seen=2.0))
    with second.write() as connection:
        assert connection.execute(select(workers.c.seen)).scalar_one() == 1.0
    first.close()
    second.close()


@BOTH
def test_names_sort_by_their_bytes(tmp_path: Path) -> None:
    database = Database(tmp_path / "t.sqlite")
    with database.write() as connection:
        for name in ("b", "B", "a", "ä", "_", "A-1", "A1"):
            put(connection, workers, {"name": name}, {"facts": {}, "seen": 1.0})
    with database.read() as connection:
        found = connection.execute(select(workers.c.name).order_by(workers.c.name)).scalars().all()
    assert found == ["A-1", "A1", "B", "_", "a", "b", "ä"]
    database.close()


@BOTH
def test_a_database_of_the_future_is_refused(tmp_path: Path) -> None:
    database = Database(tmp_path / "t.sqlite")
    with database.write() as connection:
        dialects.set_schema_version(connection, 999)
    database.close()
    with pytest.raises(DatabaseError, match=r"has schema 999, this program knows .*: use the newer trainer"):
        Database(tmp_path / "t.sqlite")


def test_postgresql_that_was_restarted_is_used_again_and_its_lock_taken_again(postgres: Postgres) -> None:
    url = postgres.url("restarted").replace("postgresql:", "postgresql+psycopg:")
    database, other = Database(url), Database(url)
    database.serve("host-a")
    move(database)
    postgres.end()
    postgres.start()
    database.keep()
    move(database)
    with pytest.raises(Served):
        other.serve("host-b")
    database.close()
    other.close()


def test_a_writer_that_waits_too_long_says_so(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialects, "BUSY_MS_MAX", 200)
    url = postgres.url("busy").replace("postgresql:", "postgresql+psycopg:")
    first, second = Database(url), Database(url)
    began, done = threading.Event(), threading.Event()

    def hold() -> None:
        with first.write():
            began.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    began.wait(30)
    with pytest.raises(Exception, match="lock timeout"), second.write():
        pass
    done.set()
    thread.join()
    move(second)
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql+psycopg://ann:s3cret@127.0.0.1:1/fleet", "postgresql://ann:***@127.0.0.1:1/fleet"),
        ("postgresql+psycopg://ann:s3cret@/fleet?host=/nowhere", "postgresql://ann:***@/fleet"),
    ],
)
def test_a_database_that_is_not_there_is_named_without_its_password(url: str, said: str) -> None:
    with pytest.raises(DatabaseError) as caught:
        Database(url)
    assert said in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_an_address_that_is_none_is_not_repeated() -> None:
    with pytest.raises(DatabaseError, match="is no URL: use postgresql://") as caught:
        Database("postgresql+psycopg://ann:s3/cret@db:s3cret/fleet")
    assert "s3" not in str(caught.value)


def test_a_big_number_and_text_that_postgresql_does_not_take_are_errors_of_the_message(postgres: Postgres) -> None:
    database = Database(postgres.url("texts").replace("postgresql:", "postgresql+psycopg:"))
    with pytest.raises(Exception, match="NUL"), database.write() as connection:
        put(connection, workers, {"name": "a\0b"}, {"facts": {}, "seen": 1.0})
    with database.write() as connection:  # and the connection goes on
        put(connection, workers, {"name": "w"}, {"facts": {}, "seen": time.time()})
        assert connection.execute(text("select count(*) from workers")).scalar_one() == 1
    with database.write() as connection:
        row = {"id": "j", "model": "m", "source": "s", "target": "t", "reason": "", "status": "x", "manifest": {}}
        connection.execute(insert(jobs).values(**row, created=0.0, claim_until=0.0))
    database.close()


@BOTH
def test_a_message_that_the_database_does_not_take_ends_nothing(tmp_path: Path, each_database: str) -> None:
    config = TrainerConfig(name="host", data_dir=tmp_path / "data")
    coordinator = Coordinator(config, tmp_path / "trainer.toml")
    body = messages.SampleEntry(
        **ENVELOPE, sample="s1", pipeline="p", task="generate", model="m", release="m@1.0", state="labelled",
        sha256="0" * 64, bytes=1, label=[messages.Text(text="a\0b")], captured=1.0,
    )  # fmt: skip
    for sent in (body, messages.Event(**{**ENVELOPE, "id": "later"}, kind="k", text="later")):
        to = topics.EVENT if sent is not body else topics.SAMPLE
        payload = messages.encode(sent)
        coordinator.link.inbox.put(Inbound(to(site="default", dev="d1").topic, payload, False, (1, 0, 0)))
    coordinator.incoming.take_in()
    assert coordinator.counters.get("faults", 0) == 0, "a NUL is JSON in both databases"
    with coordinator.host.database.read() as connection:
        assert "later" in connection.execute(select(events.c.text)).scalars().all()
    coordinator.host.database.close()
