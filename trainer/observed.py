"""What devices reported of themselves, as `core.canary` compares it: sums and values of closed windows, and audits.

`tallies` is the only place that knows where each of it is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, case, func, or_, select

from trainer.core.believed import INCLUSION_MIN
from trainer.core.canary import Tally
from trainer.core.checked import Part, pooled
from trainer.database import events, judged, parts, windows

VALUES_MAX = 240  # windows of a device whose latency, memory and temperature are read, the newest
CRASH = "engine_ended"  # kind of the event that a device sends when an engine's process ends by itself


@dataclass(frozen=True, slots=True)
class Period:
    """Closed windows of a model that began at `start` or later and ended by `until` (None: whenever).

    `others`: further names that answer in the slot, of an adapter those of its base and of the adapters before it. Then all
    answers that were checked count, escalated ones too, and engines that ended with any of them.
    """

    model: str
    start: float
    until: float | None = None
    release: str | None = None  # only of this one
    without: str | None = None  # not of this one
    others: tuple[str, ...] = ()
    confidence_min: float = 0.0  # of a label: what is less sure judges nothing

    def of(self, start: Any, end: Any, release: Any) -> list[Any]:
        """The condition on rows with these columns."""
        found = self.when(start, end, release)
        found += [] if self.release is None else [release == self.release]
        return found + ([] if self.without is None else [release != self.without])

    def when(self, start: Any, end: Any, release: Any) -> list[Any]:
        """The same of whichever release."""
        named = [release.startswith(f"{name}@", autoescape=True) for name in (self.model, *self.others)]
        return [start >= self.start, or_(*named)] + ([] if self.until is None else [end <= self.until])

    def windows(self) -> list[Any]:
        """The condition on a row of `windows`."""
        return self.of(windows.c.start, windows.c.end, windows.c.release)

    def audits(self) -> list[Any]:
        """The condition on a row of `judged` that was checked and has a verdict, by when the item was seen."""
        decisions = ("audit", "escalate") if self.others else ("audit",)
        verdict: list[Any] = [judged.c.decision.in_(decisions), judged.c.right.is_not(None)]
        verdict += [judged.c.confidence >= self.confidence_min, judged.c.inclusion >= INCLUSION_MIN]
        return verdict + self.of(judged.c.captured, judged.c.captured, judged.c.release)


def tallies(connection: Connection, names: Sequence[str], period: Period) -> dict[str, Tally]:
    """What each of these devices did in the period; those of whom nothing is known are left out."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts(names):
        _sums(connection, part, period, found)
        _values(connection, part, period, found)
        _audits(connection, part, period, found)
        _crashes(connection, part, period, found)
    return {device: Tally(**fields) for device, fields in found.items()}


def _audits(connection: Connection, names: Sequence[str], period: Period, found: dict[str, dict[str, Any]]) -> None:
    """Each answer counts as many as it stands for: Hajek's estimator, with Kish's effective size; of texts accepted and
    escalated ones apart (`core.checked`)."""
    weight = 1.0 / judged.c.inclusion
    right = func.sum(case((judged.c.right, weight), else_=0.0)).label("right")
    sums = (
        func.count().label("audited"),
        right,
        func.sum(weight).label("all"),
        func.sum(weight * weight).label("squares"),
    )
    query = select(judged.c.device, judged.c.decision, *sums).where(judged.c.device.in_(names), *period.audits())
    rows: dict[str, dict[str, Any]] = {}
    for row in connection.execute(query.group_by(judged.c.device, judged.c.decision)):
        rows.setdefault(row.device, {})[row.decision] = row
    for device, checked in rows.items():
        if not period.others:
            row = checked["audit"]
            said = row.audited, row.audited * row.right / row.all, row.all**2 / row.squares
        else:
            counted = found.get(device, {})
            escalated = counted.get("escalated", 0)
            items = {"audit": counted.get("items", 0) - escalated, "escalate": escalated}
            said = pooled([_part(items[decision], checked.get(decision)) for decision in items]) or (0, 0.0, None)
        found.setdefault(device, {}).update(zip(("audited", "agreed", "effective"), said, strict=True))


def _part(items: int, row: Any) -> Part:
    return Part(items) if row is None else Part(items, row.audited, row.right, row.all, row.squares)


def _sums(connection: Connection, names: Sequence[str], period: Period, found: dict[str, dict[str, Any]]) -> None:
    table = windows.c
    sums = [func.sum(column).label(name) for name, column in (
        ("counted", table["items"]), ("escalated", table.escalated), ("errors", table.errors),
        ("seconds", table.end - table.start),
    )]  # fmt: skip
    query = select(table.device, *sums).where(table.device.in_(names), *period.windows()).group_by(table.device)
    for row in connection.execute(query):
        found.setdefault(row.device, {}).update(
            items=row.counted, escalated=row.escalated, errors=row.errors, hours=max(0.0, row.seconds) / 3600
        )


def _values(connection: Connection, names: Sequence[str], period: Period, found: dict[str, dict[str, Any]]) -> None:
    query = select(windows.c.device, windows.c.body).where(windows.c.device.in_(names), *period.windows())
    read: dict[str, list[Mapping[str, Any]]] = {}
    for row in connection.execute(query.order_by(windows.c.start.desc()).limit(VALUES_MAX * len(names))):
        read.setdefault(row.device, []).append(row.body)
    for device, bodies in read.items():
        machine = [body.get("machine") or {} for body in bodies]
        found.setdefault(device, {}).update(
            latency_ms=_numbers((body.get("latency_ms_p95") for body in bodies), above=0.0),
            memory_mib=_numbers((each.get("memory_mib_max") for each in machine), above=0.0),
            temperature_c=_numbers(each.get("temperature_c_max") for each in machine),
        )


def _crashes(connection: Connection, names: Sequence[str], period: Period, found: dict[str, dict[str, Any]]) -> None:
    """Engines that ended by themselves. A daemon that crashes again and again reverts its release, which counts apart."""
    release = events.c.detail["release"].as_string()
    query = select(events.c.source, func.count().label("count")).where(
        events.c.source.in_(names), events.c.kind == CRASH,
        # An engine that ends is named by its base, whatever adapter was on it.
        *(period.when if period.others else period.of)(events.c.ts, events.c.ts, release),
    )  # fmt: skip
    counts = {row.source: row.count for row in connection.execute(query.group_by(events.c.source))}
    for device, fields in found.items():
        if "hours" in fields and device in names:
            fields["crashes"] = counts.get(device, 0)


def _numbers(values: Iterable[Any], above: float | None = None) -> list[float]:
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return [value for value in numbers if above is None or value > above]


def accepting(
    connection: Connection, names: Sequence[str], period: Period
) -> dict[str, dict[str, tuple[int, int, float]]]:
    """device -> pipeline -> (accepted and audited answers, audited ones, seconds), to plan how many are to be checked."""
    table, found = windows.c, dict[str, dict[str, tuple[int, int, float]]]()
    sums = (func.sum(table.accepted), func.sum(table.audited), func.sum(table.end - table.start))
    for part in parts(names):
        query = select(table.device, table.pipeline, *sums).where(table.device.in_(part), *period.windows())
        for device, pipeline, accepted, audited, seconds in connection.execute(
            query.group_by(table.device, table.pipeline)
        ):
            found.setdefault(device, {})[pipeline] = (accepted + audited, audited, max(0.0, seconds))
    return found
