"""What is counted of samples and answers, per model, class, device and release (L2): for tools and people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Connection, select

from edged.wire.manifest import ReleaseId
from trainer import live
from trainer.config import TrainerConfig
from trainer.database import detections, measured, samples
from trainer.fleet import sample_counts

LATEST = 5
_SUMMED = [measured.c[name] for name in ("items", "audited", "escalated", "errors")]


def sample_figures(
    connection: Connection, model: str = "", state: str = "", names: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """How many samples there are of each model, device and state, how sure their labels are, and of which classes.

    What is empty does not narrow; `names`: these devices only. A sample counts once for each class that its label names.
    """
    query = select(samples.c.model, samples.c.device, samples.c.state, samples.c.label)
    query = query.where(*([samples.c.model == model] if model else []), *([samples.c.state == state] if state else []))
    classes: dict[tuple[str, str, str], Counter[str]] = {}
    for row in connection.execute(query):
        named = {str(box.get("label")) for box in row.label}
        classes.setdefault((row.model, row.device, row.state), Counter()).update(named)
    return [
        {**row, "classes": dict(sorted(classes[key].items()))}
        for row in sorted(sample_counts(connection), key=lambda row: (row["model"], row["device"], row["state"]))
        if (key := (row["model"], row["device"], row["state"])) in classes and (names is None or row["device"] in names)
    ]


def release_figures(
    connection: Connection, config: TrainerConfig, since: float, model: str = "",
    names: Collection[str] | None = None, group_by: Sequence[str] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """What devices answered with each release since then, in whole hours (trainer/live.py): sums, rates, how many devices,
    and how right it was, with its 95 % interval.

    `names`: these devices only. `group_by`: labels for whose values there are figures too. A rate is None where nothing was
    answered. Responders' answers count, but for accuracy: they are to other devices' questions.
    """
    query = select(measured).where(measured.c.start >= since // live.HOUR_S * live.HOUR_S)
    if model:
        query = query.where(measured.c.model == model)
    found: dict[str, Counter[str]] = {}
    who: dict[str, set[str]] = {}
    for row in connection.execute(query.with_only_columns(measured.c.device, measured.c.release, *_SUMMED)):
        if names is None or row.device in names:
            counts = {column.name: row._mapping[column.name] for column in _SUMMED}
            found.setdefault(row.release, Counter()).update(counts)
            who.setdefault(row.release, set()).add(row.device)
    grouped = live.groups(connection, config.site, group_by)
    rows = []
    for release, sums in sorted(found.items(), key=lambda each: ReleaseId(each[0])):
        told = live.report(
            connection, release, since, live.confidence_min(config, release), grouped=grouped, devices=names
        )
        rows.append({
            "release": release,
            "devices": len(who[release]),
            "items": sums["items"],
            "accepted": sums["items"] - sums["audited"] - sums["escalated"],
            **{name: sums[name] for name in ("audited", "escalated", "errors")},
            "escalation_rate": sums["escalated"] / sums["items"] if sums["items"] else None,
            "error_rate": sums["errors"] / (sums["items"] + sums["errors"]) if sums["items"] + sums["errors"] else None,
            "accuracy": _interval(told["fleet"]),
            "groups": {
                name: {**{key: part[key] for key in ("items", "escalation_rate")}, "accuracy": _interval(part)}
                for name, part in told["groups"].items()
            },
        })  # fmt: skip
    return rows


def _interval(part: dict[str, Any]) -> dict[str, Any]:
    """Live accuracy for those who do not want all that it was made of: `value` is None where nobody has checked."""
    found = part["accuracy"]
    return {
        **{name: found[name] for name in ("value", "low", "high")},
        "audits": found["accepted"]["checked"],
        "answered": found["escalated"]["checked"],
    }


def latest_detections(connection: Connection, model: str = "") -> list[dict[str, Any]]:
    """The newest detections of drift, with their evidence."""
    query = select(detections).order_by(detections.c.found_at.desc()).limit(LATEST)
    if model:
        query = query.where(detections.c.model == model)
    return [dict(row._mapping) for row in connection.execute(query)]
