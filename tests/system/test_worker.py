"""`trainer worker` as processes of their own: a killed worker's job goes to another, and none runs twice at once."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import insert, select

from edged.wire.manifest import TrainingManifest
from tests.support.device import until
from tests.support.disk import fill, small_disk
from tests.support.models import make_release
from trainer.child import EXIT_UNWRITTEN, LOCK, METADATA, PROGRESS
from trainer.config import TrainerConfig, load_config
from trainer.database import Database, events, jobs, leases
from trainer.host import Host
from trainer.jobs import Jobs
from trainer.locks import held, is_held
from trainer.releases import Registry

LEASE_S = 2.0


class Hall:
    """A trainer's folder with a job to train, and workers. The job fails in the end: its checkpoint is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "trainer.toml"
        self.path.write_text(
            f'data_dir = "data"\n[worker]\nlease_s = {LEASE_S}\n[models.digits]\ncheckpoint = "missing.pt"\n'
            'labels = ["1"]\nholdout = "h"\nholdout_clean = "hc"\ncalibration = "c"\n'
        )
        self.config: TrainerConfig = load_config(self.path)
        self.database = Database(self.config.database_at)
        self.database_file = self.config.data_dir / "trainer.sqlite"
        self.processes: list[subprocess.Popen[str]] = []

    def add(self, job: str) -> Path:
        manifest = TrainingManifest(
            job=job, model="digits", source="digits@1.0", target="digits@1.1", created="", config={}, samples=[]
        )
        row = {"source": "digits@1.0", "target": "digits@1.1", "reason": "operator", "status": "training"}
        with self.database.write() as connection:
            values = {"created": 0.0, "claim_until": 0.0, "manifest": manifest.model_dump(mode="json")}
            connection.execute(insert(jobs).values(id=job, model="digits", **row, **values))
        return self.config.runs / job

    def worker(self, name: str, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "trainer", "worker", "--name", name, "--config", str(self.path), *flags]
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.processes.append(process)
        return process

    def lease(self, job: str) -> Any:
        with self.database.read() as connection:
            return connection.execute(select(leases).where(leases.c.job == job)).first()

    def children(self, run: Path) -> list[int]:
        """Processes that train in `run`."""
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            line = process.info["cmdline"] or []
            if str(run) in line and "train" in line and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(int(process.info["pid"]))
        return found

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def stand_still(self, worker: subprocess.Popen[str]) -> None:
        """Stop it as a suspended host does, between two writes: who holds SQLite's lock keeps everybody from writing."""

        def between() -> bool:
            worker.send_signal(signal.SIGSTOP)
            connection = sqlite3.connect(self.database_file, timeout=0.5, isolation_level=None)
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
            except sqlite3.OperationalError:
                worker.send_signal(signal.SIGCONT)
                return False
            finally:
                connection.close()
            return True

        until("it stands between two writes", between)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        self.database.close()


@pytest.fixture
def hall(tmp_path: Path) -> Iterator[Hall]:
    found = Hall(tmp_path)
    yield found
    found.close()


@pytest.mark.timeout(180)
def test_a_killed_workers_job_goes_to_another_and_never_runs_twice_at_once(hall: Hall) -> None:
    run, workers = hall.add("j1"), {name: hall.worker(name) for name in ("a", "b")}
    first = until(
        "one has leased it, and its child runs", lambda: hall.lease("j1") and hall.children(run) and hall.lease("j1")
    )
    (child,) = hall.children(run)
    workers[first.worker].send_signal(signal.SIGKILL)
    until("the child went with its worker", lambda: not psutil.pid_exists(child) or child not in hall.children(run))
    assert not (run / METADATA).exists(), "it was killed before its end, or this test shows nothing"
    other = "b" if first.worker == "a" else "a"
    most = 0

    def ended() -> Any:
        nonlocal most
        most = max(most, len(hall.children(run)))
        lease = hall.lease("j1")
        return lease if lease.ended is not None else None

    last = until("the other has trained it", ended, 60)
    assert (last.worker, last.ended) == (other, 1)
    assert last.taken >= first.taken + LEASE_S, "nobody took it while the lease held"
    assert most <= 1
    assert json.loads((run / METADATA).read_text())["outcome"] == "failed"
    with hall.database.read() as connection:
        assert connection.execute(select(jobs.c.starts)).scalar_one() == 2
        told = [row.detail["worker"] for row in connection.execute(select(events).order_by(events.c.ts))]
    assert told == [first.worker, other]


@pytest.mark.timeout(180)
def test_a_run_that_another_process_still_works_in_is_left_to_it(hall: Hall) -> None:
    """As when a worker stood still for longer than its lease: its child goes on, and holds the folder."""
    run = hall.add("j1")
    with held(run / LOCK):
        hall.worker("late")
        until("it has given the job back", lambda: "still being run by another process" in hall.log("late"))
        assert not (run / METADATA).exists()
    ended = until("then it may", lambda: (lease := hall.lease("j1")) and lease.ended is not None and lease, 60)
    assert ended.ended == 1
    with hall.database.read() as connection:
        assert connection.execute(select(jobs.c.starts)).scalar_one() == 1, "what never began does not count"


@pytest.mark.timeout(180)
def test_a_worker_says_what_the_host_has_and_an_orderly_end_gives_the_job_back(hall: Hall) -> None:
    """L8: workers say what they have, and lease jobs."""
    idle = hall.worker("idle", "--once", "--json")
    out, _ = idle.communicate(timeout=60)
    assert idle.returncode == 0
    facts = json.loads(out)
    assert facts["name"] == "idle"
    assert {"cores", "memory_bytes", "memory_free_bytes", "disk_free_bytes", "gpus"} <= facts.keys()
    run = hall.add("j1")
    stopped = hall.worker("stopped")
    until("its child runs", lambda: hall.children(run))
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=60)
    assert stopped.returncode == 0
    assert hall.children(run) == []
    assert hall.lease("j1") is None
    once = hall.worker("once", "--once")
    once.communicate(timeout=120)
    assert once.returncode == 0
    assert hall.lease("j1").ended == 1


def at_work(hall: Hall) -> None:
    """Let a training get as far as its holdout, whose list of labels is a pipe: it waits there for whoever writes."""
    make_release(hall.folder / "digits-1.0", "digits@1.0")
    Registry(hall.config.releases).register(hall.folder / "digits-1.0")
    (hall.folder / "missing.pt").write_bytes(b"weights")
    (hall.folder / "h").mkdir()
    os.mkfifo(hall.folder / "h" / "labels.jsonl")


def training(run: Path) -> psutil.Process | None:
    """The process that trains in `run`, below the one that watches it, once it is at work."""
    if not (run / PROGRESS).is_file():
        return None
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []  # none of one that is ending
        if {"trainer.watched", str(run)} <= set(line) and process.info["status"] != psutil.STATUS_ZOMBIE:
            return process
    return None


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.timeout(180)
def test_a_killed_worker_takes_the_training_itself_with_it(hall: Hall) -> None:
    """L8: training is a child process."""
    at_work(hall)
    run, worker = hall.add("j1"), hall.worker("a")
    process = until("it trains", lambda: training(run), 60)
    assert process.ppid() in hall.children(run), "a process watches it"
    worker.send_signal(signal.SIGKILL)
    until("the training and who watched it are gone", lambda: gone(process) and not hall.children(run))
    assert not (run / METADATA).exists()
    until("the folder is free for the next one", lambda: not is_held(run / LOCK))


@pytest.mark.timeout(180)
def test_a_worker_that_stood_still_ends_its_training_before_another_begins(hall: Hall) -> None:
    at_work(hall)
    run, late = hall.add("j1"), hall.worker("late")
    process = until("it trains", lambda: training(run), 60)
    hall.stand_still(late)
    hall.worker("other")
    until("the other has found the folder locked", lambda: "still being run by another" in hall.log("other"), 60)
    assert not gone(process) and training(run) == process
    late.send_signal(signal.SIGCONT)
    until("it has ended its training", lambda: "its lease ran out and another worker has it" in hall.log("late"), 60)
    until("its training has ended", lambda: gone(process))
    second = until("one of the two trains", lambda: training(run), 60)
    assert second.pid != process.pid


@pytest.mark.timeout(180)
def test_a_full_disk_in_the_runs_folder_fails_the_job_with_that_reason(hall: Hall) -> None:
    at_work(hall)
    hall.config.runs.parent.mkdir(parents=True, exist_ok=True)
    with small_disk(hall.config.runs, "1m"):
        run = hall.add("j1")
        hall.worker("a")
        until("it trains", lambda: training(run), 60)
        fill(hall.config.runs)
        (hall.folder / "h" / "labels.jsonl").write_text("no labels\n")  # what it waited for: now it must say so
        lease = until("it has ended", lambda: (found := hall.lease("j1")) and found.ended is not None and found, 60)
        assert lease.ended == EXIT_UNWRITTEN
        assert not (run / METADATA).exists()
        host = Host(hall.config, hall.path, hall.database, Registry(hall.config.releases))
        Jobs(host).tick()
        with hall.database.read() as connection:
            job = connection.execute(select(jobs)).one()
        assert job.status == "failed"
        assert f"{run} cannot be written; is its disk full?" in job.detail
        for process in hall.processes:
            process.kill()
            process.wait()


@pytest.mark.timeout(180)
def test_a_job_that_a_full_disk_keeps_from_beginning_waits_for_room(hall: Hall) -> None:
    hall.config.runs.parent.mkdir(parents=True, exist_ok=True)
    with small_disk(hall.config.runs, "1m"):
        filler = fill(hall.config.runs)
        run = hall.add("j1")
        hall.worker("a", "--once")
        until("it says why", lambda: "cannot be started" in hall.log("a") and "No space left" in hall.log("a"), 60)
        assert not (run / METADATA).exists()
        with hall.database.read() as connection:
            assert connection.execute(select(jobs.c.status, jobs.c.starts)).one() in (("training", 0), ("training", 1))
        filler.unlink()
        hall.worker("b", "--once")
        ended = until("with room it goes on", lambda: (f := hall.lease("j1")) and f.ended is not None and f, 60)
        assert ended.ended == 1
        assert (run / METADATA).is_file()
        for process in hall.processes:
            process.kill()
            process.wait()
