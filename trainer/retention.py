"""What the trainer forgets of what is over, so that no table grows for ever, whatever devices send."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table, delete, func, select

from trainer.core.rollout import ENDED, Phase
from trainer.database import events, jobs, opinions, predictions, rollouts, samples, windows

DAY_S = 86400.0
EVENTS_MAX = 10_000  # of ours, and as many of all devices together
EVENTS_A_DEVICE_MAX = 2000
SAMPLES_S_MAX = 180 * DAY_S  # after the last word about one that no training can have any more
SAMPLES_A_DEVICE_MAX = 100_000
WINDOWS_A_DEVICE_MAX = 200_000
OVER_S_MAX = 2 * 365 * DAY_S  # of jobs and rollouts; the last of each model stays, and the last that is done
WANTED = ("labelled", "claimed", "escalated", "unresolved")  # states of samples that may yet train
OPEN = ("claiming", "training", "deploying")  # statuses of jobs


def forget(connection: Connection, now: float, own: str = "") -> None:
    """Remove what is over at `now`; `own`: the trainer's name, whose events devices cannot push out."""
    _events(connection, own)
    old = (samples.c.state.notin_(WANTED), samples.c.entry_ts < now - SAMPLES_S_MAX, samples.c.job.is_(None))
    gone = connection.execute(delete(samples).where(*old)).rowcount
    gone += _over(connection, samples, samples.c.entry_ts, SAMPLES_A_DEVICE_MAX, samples.c.job.is_(None))
    if gone:
        for table in (opinions, predictions):
            connection.execute(delete(table).where(table.c.sample.notin_(select(samples.c.id))))
    _over(connection, windows, windows.c.end, WINDOWS_A_DEVICE_MAX)
    ended = [phase.value for phase in ENDED]
    _old(connection, jobs, now, jobs.c.status.notin_(OPEN))
    # Whom the last one that is done did not reach follows it yet, however many were aborted since.
    done = select(func.max(rollouts.c.created)).where(rollouts.c.phase == Phase.DONE).group_by(rollouts.c.model)
    _old(connection, rollouts, now, rollouts.c.phase.in_(ended) & rollouts.c.created.notin_(done))


def _events(connection: Connection, own: str) -> None:
    """The newest stay; what was not sent yet stays in any case."""
    sent, ours = events.c.published.is_(True), events.c.source == own
    rank = func.row_number().over(partition_by=events.c.source, order_by=events.c.ts.desc())
    ranked = select(events.c.id, rank.label("place")).where(~ours).subquery()
    excess = select(ranked.c.id).where(ranked.c.place > EVENTS_A_DEVICE_MAX)
    connection.execute(delete(events).where(sent, events.c.id.in_(excess)))
    for mine in (ours, ~ours):
        newest = select(events.c.id).where(mine).order_by(events.c.ts.desc()).limit(EVENTS_MAX)
        connection.execute(delete(events).where(sent, mine, events.c.id.notin_(newest)))


def _over(connection: Connection, table: Table, at: Any, most: int, *only: Any) -> int:
    """Remove the oldest rows of each device that has more than `most`; how many."""
    count = func.count()
    many = connection.execute(select(table.c.device, count).group_by(table.c.device).having(count > most)).all()
    gone = 0
    for device, rows in many:
        oldest = select(table.c.id).where(table.c.device == device, *only).order_by(at).limit(rows - most)
        gone += connection.execute(delete(table).where(table.c.id.in_(oldest))).rowcount
    return gone


def _old(connection: Connection, table: Table, now: float, over: Any) -> None:
    newest = select(func.max(table.c.created)).group_by(table.c.model)
    where = (over, table.c.created < now - OVER_S_MAX, table.c.created.notin_(newest))
    connection.execute(delete(table).where(*where))
