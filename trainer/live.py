"""What devices answered and how right it was, kept by the hour and by the answer: the ground of live accuracy and drift.

Every function works inside the caller's transaction. Responders' windows count as well, under their own release.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Select, delete, func, select

from edged.wire.manifest import ReleaseId
from edged.wire.measured import added, latency_quantile
from edged.wire.messages import Box, Label, SampleEntry
from trainer.config import TrainerConfig
from trainer.config_text import TextModel
from trainer.core.accuracy import Accuracy, Checked, Totals, live_accuracy
from trainer.core.believed import INCLUSION_MIN
from trainer.core.provenance import agree, is_own
from trainer.core.selectors import Term
from trainer.core.streams import Block, Verdict
from trainer.database import detections, judged, looks, measured, put
from trainer.inventory import labels_of

log = logging.getLogger(__name__)

HOUR_S = 3600.0
KEEP_S = 180 * 86400.0
DETECTIONS_S_MAX = 2 * 365 * 86400.0
LABELLED = frozenset({"labelled", "claimed", "used", "archived"})
GROUPS_MAX = 64  # of one label
RESPONDER = "responder-"  # so the pipelines of responders begin in metrics: their items are other devices' questions


def take_entry(connection: Connection, device: str, entry: SampleEntry) -> None:
    """What a catalogue entry says of the answer: how it was chosen, and whether whoever labelled it agrees."""
    if entry.decision not in ("audit", "escalate") or not INCLUSION_MIN <= entry.inclusion_probability <= 1:
        return
    said_by = entry.provenance.model_dump(mode="json") if entry.provenance else None
    values = {
        "device": device,
        "pipeline": entry.pipeline,
        "release": entry.release,
        "decision": entry.decision,
        "inclusion": entry.inclusion_probability,
        "right": _right(device, entry),
        "confidence": entry.label_confidence,
        "said_by": said_by,
        "captured": entry.captured,
    }
    put(connection, judged, {"id": entry.sample}, values)


def _right(device: str, entry: SampleEntry) -> bool | None:
    """Whether the answer is what the label says; None without a label by somebody else than the model itself."""
    if entry.state not in LABELLED or entry.provenance is None:
        return None
    said_by = entry.provenance.model_dump(mode="json")
    # An adapter answers under its own name, in the slot of its base.
    if any(is_own(name, said_by, device) for name in {entry.model, entry.release.partition("@")[0]}):
        return None
    answer, truth = _of_task(entry.task, entry.prediction), _of_task(entry.task, entry.label)
    return agree([part.model_dump() for part in answer], [part.model_dump() for part in truth])


def _of_task(task: str, label: Label) -> Sequence[Any]:
    """What of a label is compared: of a classification the best one, whatever its box."""
    if task != "classify":
        return label
    boxes = [part for part in label if isinstance(part, Box)]
    best = max(boxes, key=lambda box: box.score, default=None)
    return [] if best is None else [best.model_copy(update={"box": (0.0, 0.0, 1.0, 1.0)})]


def prune(connection: Connection, now: float) -> None:
    """Forget what is older than any question about it."""
    connection.execute(delete(measured).where(measured.c.start < now - KEEP_S))
    connection.execute(delete(judged).where(judged.c.captured < now - KEEP_S))
    connection.execute(delete(looks).where(looks.c.at < now - KEEP_S))
    connection.execute(delete(detections).where(detections.c.found_at < now - DETECTIONS_S_MAX))


def groups(connection: Connection, site: str, keys: Iterable[str]) -> dict[str, frozenset[str]]:
    """Selector -> the devices it means, for every value of each of these labels (`line=a`); devices without a label are in
    no group of it. A label with more than GROUPS_MAX values makes none: that is no group but a name."""
    known = labels_of(connection, site)
    found: dict[str, frozenset[str]] = {}
    for key in dict.fromkeys(keys):
        members: dict[str, set[str]] = {}
        for device, its in known.items():
            if key in its:
                members.setdefault(its[key], set()).add(device)
        if len(members) > GROUPS_MAX:
            log.warning(
                "%d values of the label %r, at most %d make groups: none is looked at", len(members), key, GROUPS_MAX
            )
            continue
        found |= {str(Term(key, (value,))): frozenset(each) for value, each in sorted(members.items())}
    return found


def confidence_min(config: TrainerConfig, release: str) -> float:
    """The least confidence of a label of this release's model that counts."""
    name = ReleaseId(release).name
    for model, settings in config.models.items():
        if name == model or (isinstance(settings, TextModel) and settings.adapter_name(model) == name):
            return settings.label_confidence_min
    return 0.0


def device_of(place: str) -> str:
    """The device of a place, DEVICE/PIPELINE."""
    return place.rpartition("/")[0]


def releases(connection: Connection, since: float) -> list[str]:
    """The releases that answered anything on devices' own pipelines since then, by name."""
    query = select(measured.c.release).where(
        measured.c.start >= since, measured.c["items"] > 0, ~measured.c.pipeline.startswith(RESPONDER)
    )
    return sorted(connection.execute(query.distinct()).scalars(), key=ReleaseId)


def blocks(
    connection: Connection, release: str, *, devices: Collection[str] | None = None, since: float = 0.0,
    until: float | None = None,
) -> list[Block]:  # fmt: skip
    """A release's hours of devices' own pipelines that began from `since` on and before `until`."""
    query = _between(select(measured).where(*_own(release)), measured.c.start, since, until)
    return [_block(row) for row in connection.execute(query) if devices is None or row.device in devices]


def compared(connection: Connection, release: str, baseline_s: float, since: float) -> list[Block]:
    """A release's hours in which a place was new to it (for `baseline_s`), and those from `since` on."""
    first = (
        select(measured.c.device, measured.c.pipeline, func.min(measured.c.start).label("began"))
        .where(*_own(release))
        .group_by(measured.c.device, measured.c.pipeline)
        .subquery()
    )
    same = (measured.c.device == first.c.device) & (measured.c.pipeline == first.c.pipeline)
    query = select(measured).join(first, same).where(*_own(release))
    query = query.where((measured.c.start < first.c.began + baseline_s) | (measured.c.start >= since))
    return [_block(row) for row in connection.execute(query)]


def course(connection: Connection, release: str, since: float) -> list[Block]:
    """A release's hours from `since` on, without histograms."""
    columns = (measured.c.device, measured.c.pipeline, measured.c.start, measured.c["items"], measured.c.escalated)
    query = select(*columns).where(*_own(release), measured.c.start >= since)
    return [Block(f"{device}/{pipeline}", *counts) for device, pipeline, *counts in connection.execute(query)]


def _own(release: str) -> list[Any]:
    """The condition on a row of `measured`: of this release on devices' own pipelines."""
    return [measured.c.release == release, ~measured.c.pipeline.startswith(RESPONDER)]


def _block(row: Any) -> Block:
    return Block(f"{row.device}/{row.pipeline}", row.start, row._mapping["items"], row.escalated, tuple(row.confidence))


def verdicts(
    connection: Connection, release: str, *, devices: Collection[str] | None = None, since: float = 0.0,
    until: float | None = None, confidence_min: float = 0.0,
) -> list[Verdict]:  # fmt: skip
    """The checked answers of a release that somebody, sure enough, has called right or wrong."""
    query = select(judged).where(
        judged.c.release == release, judged.c.right.is_not(None), judged.c.confidence >= confidence_min,
        judged.c.inclusion >= INCLUSION_MIN,  # rows of earlier versions may say less
    )  # fmt: skip
    query = _between(query, judged.c.captured, since, until)
    return [
        Verdict(
            f"{row.device}/{row.pipeline}", row.captured, Checked(row.right, row.inclusion, row.decision == "escalate")
        )
        for row in connection.execute(query)
        if devices is None or row.device in devices
    ]  # fmt: skip


def _between(query: Select[Any], column: Any, since: float, until: float | None) -> Select[Any]:
    query = query.where(column >= since)
    return query if until is None else query.where(column < until)


def accuracy(
    connection: Connection, release: str, *, devices: Collection[str] | None = None, since: float = 0.0,
    until: float | None = None, confidence_min: float = 0.0,
) -> Accuracy:  # fmt: skip
    """How right a release's answers of these whole hours were, with a 95 % interval (core.accuracy)."""
    since = since // HOUR_S * HOUR_S  # the counts are by the hour, so the verdicts must be
    counted = blocks(connection, release, devices=devices, since=since, until=until)
    checked = verdicts(
        connection, release, devices=devices, since=since, until=until, confidence_min=confidence_min
    )  # fmt: skip
    return of_period(counted, checked)


def of_period(counted: Sequence[Block], checked: Sequence[Verdict]) -> Accuracy:
    """The same from what has been read."""
    items, escalated = sum(block.items for block in counted), sum(block.escalated for block in counted)
    # A verdict of a place that counted nothing would weigh with nothing: its window was lost.
    places = {block.place for block in counted}
    known = [each.checked for each in checked if each.place in places]
    return live_accuracy(known, Totals(items - escalated, escalated))


def report(
    connection: Connection, release: str, since: float, confidence_min: float = 0.0, *,
    grouped: Mapping[str, Collection[str]] | None = None, devices: Collection[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A release's live figures since then: of all (or of these `devices`), of each group and of each device; JSON-able."""
    since_hour = since // HOUR_S * HOUR_S
    counted = blocks(connection, release, since=since_hour, devices=devices)
    checked = verdicts(connection, release, since=since_hour, confidence_min=confidence_min, devices=devices)

    def part(members: Collection[str]) -> dict[str, Any]:
        return _figures([b for b in counted if device_of(b.place) in members],
                        [v for v in checked if device_of(v.place) in members])  # fmt: skip

    there = {device_of(block.place) for block in counted}
    return {
        "release": release,
        "since": since,
        "fleet": _figures(counted, checked) | _machine(connection, release, since, devices),
        "groups": {name: part(members) for name, members in (grouped or {}).items() if there & {*members}},
        "devices": {device: part([device]) for device in sorted(there)},
    }


def _figures(counted: Sequence[Block], checked: Sequence[Verdict]) -> dict[str, Any]:
    found = asdict(of_period(counted, checked))
    items, escalated = found["items"], found["escalated"]["items"]
    return {"items": items, "escalation_rate": escalated / items if items else None, "accuracy": found}


def _machine(connection: Connection, release: str, since: float, devices: Collection[str] | None) -> dict[str, Any]:
    query = select(measured).where(*_own(release), measured.c.start >= since)
    latency: list[int] = []
    reasons: Counter[str] = Counter()
    memory: list[float] = []
    celsius: list[float] = []
    for row in connection.execute(query):
        if devices is not None and row.device not in devices:
            continue
        latency = added(latency, row.latency)
        reasons.update(row.reasons)
        memory += [] if row.memory_mib_max is None else [row.memory_mib_max]
        celsius += [] if row.temperature_c_max is None else [row.temperature_c_max]
    return {
        "reasons": dict(reasons.most_common()),
        "latency_ms_p50": latency_quantile(latency, 0.5),
        "latency_ms_p95": latency_quantile(latency, 0.95),
        "memory_mib_max": max(memory, default=None),
        "temperature_c_max": max(celsius, default=None),
    }


def began(connection: Connection) -> float | None:
    """The start of the first hour that is known; None before any."""
    found = connection.execute(select(func.min(measured.c.start))).scalar()
    return None if found is None else float(found)
