"""A worker: leases training jobs from the trainer's database and runs each in a child process.

`trainer serve` has one built in; `trainer worker` is one of its own, on the same database and the same folders. A worker
that dies takes its child with it, and its job goes to another when the lease has run out. One that only stands still keeps
its child, which holds a lock on the run's folder: whoever takes the job meanwhile finds it locked and gives it back.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

from sqlalchemy.exc import OperationalError

from edged.wire.manifest import TrainingManifest
from trainer import leases
from trainer.child import EXIT_BUSY, Child
from trainer.core.placement import HostFacts, Needs, misfit
from trainer.files import write_whole
from trainer.host import Host
from trainer.hostfacts import host_facts

log = logging.getLogger(__name__)

RENEWALS = 3  # of a lease, before it would run out
POLL_S = 0.5
BUSY_S = 2.0  # how soon a run that another process still holds is tried again


class Worker:
    """`tick` about once a second, from one thread; `stop` at the end."""

    def __init__(self, host: Host, name: str) -> None:
        self._host, self._name = host, name
        self._lease_s = host.config.worker.lease_s
        self._child: Child | None = None
        self._token = ""
        self._renewed = self._introduced = -1e9  # monotonic
        self._pause_until = -1e9
        self._began = False
        self.done = 0  # jobs that came to an end here
        self._misfits: set[str] = set()

    @property
    def job(self) -> str | None:
        """What is being trained."""
        return self._child.job if self._child is not None else None

    def facts(self) -> HostFacts:
        """What this host has now."""
        return host_facts(self._name, self._host.config.data_dir)

    def tick(self) -> None:
        """Watch the child, keep its lease, or look for a job."""
        if not self._began:
            with self._host.database.write() as connection:
                leases.forget(connection, self._name)
            self._began = True
        if self._child is not None:
            self._watch(self._child)
        if self._child is None and time.monotonic() >= self._pause_until:
            self._look()

    def stop(self) -> None:
        """End the child and give its job back."""
        if self._child is not None:
            self._child.stop()
            self._child = None
            with self._host.database.write() as connection:
                leases.give_back(connection, self._token)

    def _watch(self, child: Child) -> None:
        code = child.poll()
        if code is not None:
            self._child = None
            self.done += code != EXIT_BUSY
            with self._host.database.write() as connection:
                if code == EXIT_BUSY:
                    log.warning("training %s is still being run by another process", child.job)
                    leases.give_back(connection, self._token)
                    self._pause_until = time.monotonic() + BUSY_S
                else:
                    leases.end(connection, self._token, code)
            return
        if time.monotonic() - self._renewed < self._lease_s / RENEWALS:
            return
        with self._host.database.write() as connection:
            kept = leases.renew(connection, self._token, self._host.now(), self._lease_s)
            if kept:
                leases.introduce(connection, self.facts(), self._host.now(), child.job)
        self._renewed = time.monotonic()
        if not kept:
            log.error("training %s is ended: its lease ran out and another worker has it", child.job)
            child.stop()
            self._child = None

    def _look(self) -> None:
        host, facts = self._host, self.facts()
        needs = {n: m.placement_needs() for n, m in host.config.models.items()}
        self._say_misfits(needs, facts)
        introduce = time.monotonic() - self._introduced >= self._lease_s / RENEWALS
        with host.database.read() as connection:
            waiting = leases.waits(connection, host.now())
        if not waiting and not introduce:
            return
        with host.database.write() as connection:
            row = leases.take(connection, facts, needs, host.now(), self._lease_s)
            leases.introduce(connection, facts, host.now(), row["id"] if row else None)
            if row is not None:
                text = f"{row['id']} -> {row['target']} on {self._name}"
                host.announce(connection, "training_started", text, job=row["id"], worker=self._name)
        self._introduced = time.monotonic()
        if row is not None:
            self._start(row)

    def _start(self, row: dict[str, Any]) -> None:
        host = self._host
        run: Path = host.config.runs / row["id"]
        self._token, self._renewed = row["token"], time.monotonic()
        try:
            whole = TrainingManifest.model_validate(row["manifest"]).model_dump_json().encode()
            write_whole(run / "manifest.json", whole)
            self._child = Child(row["id"], row["model"], host.config_path, host.config.samples, run)
        except OSError as error:
            log.error("training %s cannot be started: %s", row["id"], error)
            with host.database.write() as connection:
                leases.give_back(connection, self._token)
            self._pause_until = time.monotonic() + BUSY_S

    def _say_misfits(self, needs: dict[str, Needs], facts: HostFacts) -> None:
        for model, need in needs.items():
            reason = misfit(need, facts)
            if reason and model not in self._misfits:
                log.warning("model %s: %s", model, reason)
            (self._misfits.add if reason else self._misfits.discard)(model)


def serve(worker: Worker, stopping: threading.Event, *, once: bool) -> None:
    """Work until `stopping` is set; with `once` until one job has ended, or at once when none waits."""
    try:
        while not stopping.is_set():
            try:
                worker.tick()
            except OperationalError as error:  # the disk is full, or the database is busy for too long
                log.error("the database cannot be written: %s", error.orig)
            if once and worker.job is None:
                return
            stopping.wait(POLL_S)
    finally:
        worker.stop()
