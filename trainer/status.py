"""What people ask about a trainer: its fleet, jobs, rollouts and samples, as plain data."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, select

from trainer.child import read_progress
from trainer.config import TrainerConfig
from trainer.core.presence import Lately, present
from trainer.database import desired, devices, events, jobs, rollouts, workers
from trainer.enrolment import revoked_names
from trainer.fleet import sample_counts
from trainer.host import Host
from trainer.ready import OPEN
from trainer.rollouts import Known, progress

LATEST = 20
FAULT_S = 86400.0


def status(host: Host, counters: dict[str, int], connected: bool) -> dict[str, Any]:
    """Everything at once, as /status shows it."""
    known: Known = {}
    with host.database.read() as connection:
        return {
            "trainer": host.config.name,
            "site": host.config.site,
            "broker_connected": connected,
            "counters": dict(counters),
            "faults": faults(connection, host.now()),
            "devices": fleet_status(connection, host.lately()),
            "samples": sample_counts(connection),
            "jobs": [job_status(connection, host.config, row) for row in _latest(connection, jobs)],
            "workers": [dict(row._mapping) for row in connection.execute(select(workers).order_by(workers.c.name))],
            "rollouts": [progress(connection, row, known) for row in _latest(connection, rollouts)],
            "events": [
                {"ts": row.ts, "source": row.source, "kind": row.kind, "text": row.text}
                for row in connection.execute(select(events).order_by(events.c.ts.desc()).limit(LATEST))
            ],
        }


def faults(connection: Connection, now: float) -> list[str]:
    """What was said within a day of rollouts and jobs that cannot go on for a fault of their own and are not over."""
    known = {
        row.id for row in connection.execute(select(rollouts.c.id).where(rollouts.c.phase.notin_(("done", "aborted"))))
    }
    known |= {row.id for row in connection.execute(select(jobs.c.id).where(jobs.c.status.in_(OPEN)))}
    query = select(events.c.text, events.c.detail).where(
        events.c.kind.in_(("rollout_fault", "job_fault")), events.c.ts > now - FAULT_S
    )
    return [row.text for row in connection.execute(query.order_by(events.c.ts)) if row.detail.get("name") in known]


def fleet_status(connection: Connection, heard: Lately) -> list[dict[str, Any]]:
    """Each device: whether it is there (`silent`: it should be, and nothing was heard of it for too long), what its slots
    run, and what it was told to run."""
    told = {row.device: row for row in connection.execute(select(desired))}
    revoked = revoked_names(connection)
    found = []
    for row in connection.execute(select(devices).order_by(devices.c.device)):
        want = told.get(row.device)
        found.append(
            {
                "device": row.device,
                "online": present(row.online, row.seen_at, heard),
                "silent": row.online and not heard.holds(row.seen_at),
                "revoked": revoked.get(row.device),
                "tier": row.tier,
                "profile": row.profile,
                "models": row.models,
                "seen_at": row.seen_at,
                "desired_rev_seen": row.desired_rev,
                "desired": {"rev": want.rev, "models": want.models, "adapters": want.adapters} if want else None,
            }
        )
    return found


def job_status(connection: Connection, config: TrainerConfig, row: Any) -> dict[str, Any]:
    """One job, with the fields of L17, and what else is known of it."""
    result = row.result or {}
    new, old = result.get("accuracy"), result.get("accuracy_before")
    minutes = (row.finished - row.started) / 60 if row.finished and row.started else None
    rollout = connection.execute(select(rollouts).where(rollouts.c.id == row.rollout)).first() if row.rollout else None
    nothing = {"status": "none", "progress": "0/0 nodes", "canary_result": None}
    return {
        "job_id": row.id,
        "status": row.status,
        "metrics": {
            "accuracy": new,
            "improvement": f"{(new - old) * 100:+.1f}%" if new is not None and old is not None else None,
            "samples_used": result.get("samples_used", len(row.manifest["samples"])),
            "training_time_minutes": round(minutes, 2) if minutes is not None else None,
        },
        "deployment": progress(connection, rollout) if rollout is not None else nothing,
        "reason": row.reason,
        "detail": row.detail,
        "source_model": row.source,
        "target_model": row.target,
        "created": row.created,
        "training": read_progress(config.runs / row.id) if row.status == "training" else None,
    }


def promised(status: dict[str, Any]) -> dict[str, Any]:
    """Of a job's status exactly the fields of L17, for programs that were made for them."""
    deployment = {key: status["deployment"][key] for key in ("status", "progress", "canary_result")}
    return {**{key: status[key] for key in ("job_id", "status", "metrics")}, "deployment": deployment}


def _latest(connection: Connection, table: Any) -> list[Any]:
    return list(connection.execute(select(table).order_by(table.c.created.desc()).limit(LATEST)))
