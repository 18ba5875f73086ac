"""What is counted of samples and answers, per model, class, device and release (L2): for tools and people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, select

from trainer.database import detections, samples, windows
from trainer.fleet import sample_counts

LATEST = 5
_SUMS = ("items", "accepted", "audited", "escalated", "errors")


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
    connection: Connection, since: float, model: str = "", names: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """What devices answered with each release in windows that ended after `since`: sums, rates and how many devices.

    `names`: these devices only. A rate is None where nothing was answered.
    """
    query = select(windows.c.device, windows.c.release, *(windows.c[name] for name in _SUMS)).where(
        windows.c.end > since
    )
    if model:
        query = query.where(windows.c.release.startswith(f"{model}@", autoescape=True))
    found: dict[str, Counter[str]] = {}
    who: dict[str, set[str]] = {}
    for row in connection.execute(query):
        if names is None or row.device in names:
            told = row._mapping
            found.setdefault(row.release, Counter()).update({name: told[name] for name in _SUMS})
            who.setdefault(row.release, set()).add(row.device)
    return [
        {
            "release": release,
            "devices": len(who[release]),
            **{name: sums[name] for name in _SUMS},
            "escalation_rate": sums["escalated"] / sums["items"] if sums["items"] else None,
            "error_rate": sums["errors"] / (sums["items"] + sums["errors"]) if sums["items"] + sums["errors"] else None,
        }
        for release, sums in sorted(found.items())
    ]


def latest_detections(connection: Connection, model: str = "") -> list[dict[str, Any]]:
    """The newest detections of drift, with their evidence."""
    query = select(detections).order_by(detections.c.found_at.desc()).limit(LATEST)
    if model:
        query = query.where(detections.c.model == model)
    return [dict(row._mapping) for row in connection.execute(query)]
