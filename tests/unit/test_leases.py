"""Leases of training jobs: one worker at a time, also when one dies or only stands still."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select

from trainer import dialects, leases
from trainer.core.placement import MIB, Gpu, HostFacts, Needs, misfit
from trainer.database import Database, jobs, workers
from trainer.hostfacts import gpus, host_facts, parse_gpus

pytestmark = pytest.mark.usefixtures("each_database")

GIB = 1024 * MIB
LEASE_S = 60.0


def host(name: str, gpu_gib: int = 0, memory_gib: int = 8, disk_gib: int = 100) -> HostFacts:
    found = (Gpu("card", gpu_gib * GIB, gpu_gib * GIB),) if gpu_gib else ()
    return HostFacts(name, 4, memory_gib * GIB, memory_gib * GIB, disk_gib * GIB, found)


A, B = host("a"), host("b")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    found = Database(tmp_path / "t.sqlite")
    yield found
    found.close()


def add(database: Database, job: str, created: float = 0.0, model: str = "digits", **values: Any) -> None:
    row = {"source": "digits@1.0", "target": "digits@1.1", "reason": "", "manifest": {}, "status": "training", **values}
    with database.write() as connection:
        connection.execute(insert(jobs).values(id=job, model=model, created=created, claim_until=0.0, **row))


def take(database: Database, worker: HostFacts, now: float, **needs: Needs) -> dict[str, Any] | None:
    with database.write() as connection:
        return leases.take(connection, worker, needs, now, LEASE_S)


def starts(database: Database, job: str = "j") -> int:
    with database.read() as connection:
        return int(connection.execute(select(jobs.c.starts).where(jobs.c.id == job)).scalar_one())


def test_a_job_has_one_worker_and_the_oldest_goes_first(database: Database) -> None:
    add(database, "younger", 2.0)
    add(database, "older", 1.0)
    add(database, "elsewhere", 0.0, status="claiming")
    first, second = take(database, A, 0.0), take(database, B, 0.0)
    assert first is not None and second is not None
    assert (first["id"], second["id"]) == ("older", "younger")
    assert take(database, B, 0.0) is None


def test_a_lease_that_is_renewed_stays_and_one_that_is_not_goes_to_another(database: Database) -> None:
    add(database, "j")
    mine = take(database, A, 0.0)
    assert mine is not None
    with database.write() as connection:
        assert leases.renew(connection, mine["token"], 50.0, LEASE_S)
    assert take(database, B, 109.0) is None
    theirs = take(database, B, 110.0)
    assert theirs is not None and theirs["starts"] == 2
    with database.write() as connection:  # A wakes up
        assert not leases.renew(connection, mine["token"], 111.0, LEASE_S)
        leases.end(connection, mine["token"], 1)
        leases.give_back(connection, mine["token"])
        assert leases.of(connection, "j").worker == "b"
        assert leases.of(connection, "j").ended is None


def test_what_ended_is_not_begun_again_and_what_is_given_back_is(database: Database) -> None:
    add(database, "j")
    mine = take(database, A, 0.0)
    assert mine is not None
    with database.write() as connection:
        leases.end(connection, mine["token"], 0)
    assert take(database, B, 1000.0) is None
    with database.write() as connection:
        leases.drop(connection, "j")
    again = take(database, B, 1000.0)
    assert again is not None and again["starts"] == 2
    with database.write() as connection:
        leases.give_back(connection, again["token"])
    assert starts(database) == 1


def test_a_worker_that_begins_again_frees_what_it_held(database: Database) -> None:
    add(database, "j")
    assert take(database, A, 0.0) is not None
    with database.write() as connection:
        leases.forget(connection, "b")
        assert not leases.waits(connection, 1.0)
        leases.forget(connection, "a")
        assert leases.waits(connection, 1.0)


def test_a_job_that_ended_every_worker_is_given_to_no_more(database: Database) -> None:
    add(database, "j", starts=leases.STARTS_MAX)
    assert take(database, A, 0.0) is None
    with database.read() as connection:
        assert not leases.waits(connection, 0.0)


def test_a_host_takes_what_it_can_train(database: Database) -> None:
    """L8: a job goes to a worker that has what it needs."""
    needs = {"large": Needs(gpu_mib=20 * 1024), "digits": Needs()}
    add(database, "l", 0.0, model="large")
    add(database, "j", 1.0)
    found = take(database, A, 0.0, **needs)
    assert found is not None and found["id"] == "j"
    assert take(database, A, 0.0, **needs) is None
    found = take(database, host("gpu", gpu_gib=24), 0.0, **needs)
    assert found is not None and found["id"] == "l"


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        (Needs(), ""),
        (Needs(gpu_mib=1), "1 MiB of GPU memory, 0 MiB are free"),
        (Needs(memory_mib=8 * 1024), ""),
        (Needs(memory_mib=8 * 1024 + 1), "8193 MiB of memory, 8192 MiB are free"),
        (Needs(disk_mib=200 * 1024), "MiB of disk, 102400 MiB are free"),
    ],
)
def test_why_a_host_cannot_train_a_model(needs: Needs, said: str) -> None:
    assert said in misfit(needs, A)
    assert bool(misfit(needs, A)) == bool(said)


def test_the_list_of_workers_forgets_who_is_gone(database: Database) -> None:
    with database.write() as connection:
        leases.introduce(connection, A, 0.0, None)
        leases.introduce(connection, B, leases.SEEN_S + 1, "j")
        rows = connection.execute(select(workers)).all()
    assert [(row.name, row.job, row.facts["cores"]) for row in rows] == [("b", "j", 4)]


def test_what_the_driver_says_of_gpus() -> None:
    text = "NVIDIA H200, 143771, 143000\nOrin (nvgpu), [N/A], [N/A]\n\n"
    assert parse_gpus(text) == (Gpu("NVIDIA H200", 143771 * MIB, 143000 * MIB), Gpu("Orin (nvgpu)", 0, 0))
    assert gpus("no-such-program") == ()


def test_what_this_host_has(tmp_path: Path) -> None:
    facts = host_facts("here", tmp_path / "not" / "there" / "yet")
    assert facts.cores >= 1
    assert 0 < facts.memory_free_bytes <= facts.memory_bytes
    assert facts.disk_free_bytes > 0


def test_a_database_of_an_earlier_version_gets_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    first = Database(path)
    with first.write() as connection:
        connection.exec_driver_sql("DROP TABLE leases")
        connection.exec_driver_sql("DROP TABLE workers")
        dialects.set_schema_version(connection, 1)
    first.close()
    add(again := Database(path), "j")
    assert take(again, A, 0.0) is not None
    again.close()
