"""Who trains what: rows that expire, so that a job whose worker died goes to another one, and never to two at once.

Law of this file: a job is taken, kept and given back inside one transaction that may write, and only its token's holder
changes a lease. A lease that has expired is nobody's, also when its worker wakes up again: `renew` tells it so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, delete, select, update

from trainer.core.placement import HostFacts, Needs, misfit
from trainer.database import jobs, leases, put, workers
from trainer.host import new_id

STARTS_MAX = 3  # of a job's training, when it was killed or its worker was
SEEN_S = 7 * 86400.0  # a worker that has not been heard of for so long is forgotten


def take(
    connection: Connection, host: HostFacts, needs: Mapping[str, Needs], now: float, lease_s: float
) -> dict[str, Any] | None:
    """Lease the oldest job that waits and that this host can train: its row, with `token`; None: there is none."""
    rows = connection.execute(
        select(jobs, leases.c.expires, leases.c.ended)
        .outerjoin(leases, leases.c.job == jobs.c.id)
        .where(jobs.c.status == "training", jobs.c.starts < STARTS_MAX)
        .order_by(jobs.c.created)
    )
    for row in rows:
        waits = row.expires is None or (row.ended is None and row.expires <= now)
        if not waits or misfit(needs.get(row.model, Needs()), host):
            continue
        token = new_id()
        values = {"worker": host.name, "token": token, "taken": now, "expires": now + lease_s, "ended": None}
        put(connection, leases, {"job": row.id}, values)
        connection.execute(update(jobs).where(jobs.c.id == row.id).values(starts=row.starts + 1, started=now))
        return {**row._mapping, "starts": row.starts + 1, "token": token}
    return None


def waits(connection: Connection, now: float) -> bool:
    """Whether there is a job that nobody works on."""
    query = (
        select(jobs.c.id)
        .outerjoin(leases, leases.c.job == jobs.c.id)
        .where(jobs.c.status == "training", jobs.c.starts < STARTS_MAX)
        .where(leases.c.job.is_(None) | (leases.c.ended.is_(None) & (leases.c.expires <= now)))
    )
    return connection.execute(query.limit(1)).first() is not None


def renew(connection: Connection, token: str, now: float, lease_s: float) -> bool:
    """Keep a lease; False: it is not ours any more, because it expired and was taken by another."""
    mine = (leases.c.token == token, leases.c.ended.is_(None))
    return bool(connection.execute(update(leases).where(*mine).values(expires=now + lease_s)).rowcount)


def end(connection: Connection, token: str, code: int) -> None:
    """The training has ended with this exit status (negative: the signal)."""
    connection.execute(update(leases).where(leases.c.token == token).values(ended=code))


def give_back(connection: Connection, token: str) -> None:
    """Let another worker have the job at once; that it was begun here does not count."""
    job = select(leases.c.job).where(leases.c.token == token).scalar_subquery()
    connection.execute(update(jobs).where(jobs.c.id == job).values(starts=jobs.c.starts - 1))
    connection.execute(delete(leases).where(leases.c.token == token))


def forget(connection: Connection, worker: str) -> None:
    """This worker has just begun, and so works on nothing: what it held in an earlier life is free at once."""
    connection.execute(delete(leases).where(leases.c.worker == worker, leases.c.ended.is_(None)))


def drop(connection: Connection, job: str) -> None:
    """The job's training is over, or is to be begun again."""
    connection.execute(delete(leases).where(leases.c.job == job))


def of(connection: Connection, job: str) -> Any:
    """The lease of a job; None: it waits for a worker."""
    return connection.execute(select(leases).where(leases.c.job == job)).first()


def introduce(connection: Connection, host: HostFacts, now: float, job: str | None) -> None:
    """A worker says what it has and does."""
    put(connection, workers, {"name": host.name}, {"facts": asdict(host), "seen": now, "job": job})
    connection.execute(delete(workers).where(workers.c.seen < now - SEEN_S))
