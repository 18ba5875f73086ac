"""Births, reports and windows of many devices taken in with few statements.

A batch comes to the same rows as its messages one after the other (tests/unit/test_intake.py). Statements, not rows, are
what a batch costs: a fleet of 100 000 devices says more in a minute than one statement a message can take in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, update

from edged.wire import topics
from edged.wire.manifest import ReleaseId
from edged.wire.measured import REASONS_MAX, added
from edged.wire.messages import Message, Metrics, Reported, State
from trainer.core.believed import ITEMS_A_SECOND_MAX
from trainer.database import devices, labels, measured, note_changed, parts, put_all, seen, windows
from trainer.inventory import good_labels
from trainer.live import HOUR_S

TOGETHER = (topics.STATE, topics.REPORTED, topics.METRICS)  # the routes that are taken in by batches
STREAMS_MAX = 64  # pipelines and releases of a device in one hour: what is more makes no rows
HOUR_COUNT_MAX = int(ITEMS_A_SECOND_MAX * HOUR_S)
OTHER = "other"  # reasons beyond the first REASONS_MAX of an hour
LAST = (topics.COMMAND_STATE,)  # these too, after all others: what a device gave back is newer than its entries before
COUNTS = ("items", "audited", "escalated", "errors")
_AWAY = update(devices).where(devices.c.device == bindparam("of_device"))


def news(connection: Connection, messages: Iterable[Message], now: float) -> list[bool]:
    """Of each message whether it is new; the ids of those that are, are noted, with the time of receipt: the sender's clock
    may be years behind."""
    said = list(messages)
    known: set[str] = set()
    for part in parts([each.id for each in said]):
        known.update(connection.execute(select(seen.c.id).where(seen.c.id.in_(part))).scalars())
    found, rows = [], []
    for each in said:
        found.append(each.id not in known)
        if each.id not in known:
            known.add(each.id)
            rows.append({"id": each.id, "ts": now})
    if rows:
        connection.execute(insert(seen), rows)
    return found


def take_states(
    connection: Connection, said: Sequence[tuple[str, State]], now: float, retained: Collection[str] = ()
) -> list[str]:
    """Births and Wills, in this order; the devices that have just started. `retained`: of these the broker has told again
    what it kept, which is no sign of life where the boot was known."""
    names = list(dict.fromkeys(device for device, _ in said))
    boots: dict[str, str] = {}
    for part in parts(names):
        query = select(devices.c.device, devices.c.boot).where(devices.c.device.in_(part))
        boots.update((row.device, row.boot) for row in connection.execute(query))
    before = dict(boots)
    born: dict[str, dict[str, Any]] = {}
    away: dict[str, dict[str, Any]] = {}
    label_rows: dict[str, dict[str, Any]] = {}
    started = []
    for device, state in said:
        if state.state == "offline":
            if device in born and born[device]["boot"] == state.boot:
                born[device] |= {"online": False, "seen_at": now}
            elif device not in born and boots.get(device) == state.boot:  # else it is older than the last birth
                away[device] = {"of_device": device, "online": False, "seen_at": now}
            continue
        if boots.get(device) != state.boot:
            started.append(device)
        boots[device] = state.boot
        away.pop(device, None)
        born[device] = {
            "device": device, "online": True, "boot": state.boot, "tier": state.tier, "profile": state.profile,
            "capabilities": state.capabilities, "seen_at": now,
        }  # fmt: skip
        label_rows[device] = {"device": device, "born": good_labels(device, state.labels)}
    note_changed(connection, devices, [*born, *away])
    _put_seen(connection, born, {name for name in retained if name in born and before.get(name) == boots[name]})
    put_all(connection, labels, ["device"], list(label_rows.values()))
    if away:
        connection.execute(_AWAY, list(away.values()))
    return started


def _put_seen(connection: Connection, rows: Mapping[str, dict[str, Any]], again: Collection[str]) -> None:
    """Write rows of `devices`; of those that were said again without the date of a sign of life."""
    put_all(connection, devices, ["device"], [row for device, row in rows.items() if device not in again])
    without = ({key: value for key, value in rows[device].items() if key != "seen_at"} for device in sorted(again))
    put_all(connection, devices, ["device"], list(without))


def take_reports(
    connection: Connection, said: Sequence[tuple[str, Reported]], now: float, retained: Collection[str] = ()
) -> None:
    """What devices run now; of each the last word. `retained`: what of these the broker has kept."""
    last = dict(said)
    rows = {
        device: {
            "device": device,
            "desired_rev": report.desired_rev,
            "models": {slot: each.model_dump(mode="json") for slot, each in report.models.items()},
            "health": report.health,
            "seen_at": now,
        }
        for device, report in last.items()
    }
    note_changed(connection, devices, last)
    _put_seen(connection, rows, set(retained) & rows.keys())


def take_windows(connection: Connection, said: Sequence[tuple[str, Metrics]]) -> int:
    """Closed windows; one that came before changes nothing. Returns how many were of more streams than a device can have."""
    known: set[str] = set()
    for part in parts([window.id for _, window in said]):
        known.update(connection.execute(select(windows.c.id).where(windows.c.id.in_(part))).scalars())
    new = []
    for device, window in said:
        if window.id not in known:
            known.add(window.id)
            new.append((device, window))
    taken, rows = _take_hours(connection, new), []
    for device, window in taken:
        counts = {name: getattr(window, name) for name in ("accepted", *COUNTS)}
        rows.append(
            {"id": window.id, "device": device, "body": window.model_dump(mode="json"), "pipeline": window.pipeline,
             "release": window.release, "start": window.start, "end": window.end, **counts}
        )  # fmt: skip
    if rows:
        connection.execute(insert(windows), rows)
    return len(new) - len(taken)


def _take_hours(connection: Connection, said: Sequence[tuple[str, Metrics]]) -> list[tuple[str, Metrics]]:
    """Add windows to their hours; those that were taken in."""
    hours = _hours(connection, said) if said else {}
    streams = Counter((device, start) for device, _, _, start in hours)
    changed: dict[tuple[str, str, str, float], dict[str, Any]] = {}
    taken = []
    for device, window in said:
        try:
            model = ReleaseId(window.release).name
        except ValueError:
            taken.append((device, window))  # errors before any release was loaded
            continue
        key = (device, window.pipeline, window.release, window.start // HOUR_S * HOUR_S)
        row = changed.get(key) or hours.get(key)
        if row is None:
            if streams[device, key[3]] >= STREAMS_MAX:
                continue
            streams[device, key[3]] += 1
            row = _empty(*key, model)
        taken.append((device, window))
        changed[key] = row | {name: _sum(row[name], getattr(window, name)) for name in COUNTS}
        changed[key] |= {
            "suppressed": _sum(row["suppressed"], sum(window.suppressed.values())),
            "reasons": _reasons(row["reasons"], window.reasons),
            "confidence": added(row["confidence"], window.confidence_histogram),
            "latency": added(row["latency"], window.latency_histogram),
        }
        for name in ("memory_mib_max", "temperature_c_max"):
            found = [value for value in (row[name], getattr(window.machine, name)) if value is not None]
            changed[key][name] = max(found, default=None)
    put_all(connection, measured, ["device", "pipeline", "release", "start"], list(changed.values()))
    return taken


def _sum(known: int, more: int) -> int:
    return min(int(known) + more, HOUR_COUNT_MAX)


def _reasons(known: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Both together; of more than REASONS_MAX the rest is one."""
    found = dict(known)
    for name, count in more.items():
        key = name if name in found or len(found) < REASONS_MAX else OTHER
        found[key] = found.get(key, 0) + count
    return {name: count for name, count in found.items() if count > 0}


def _hours(
    connection: Connection, said: Sequence[tuple[str, Metrics]]
) -> dict[tuple[str, str, str, float], dict[str, Any]]:
    """What is known of the devices' hours in which these windows began."""
    starts = sorted({window.start // HOUR_S * HOUR_S for _, window in said})
    found: dict[tuple[str, str, str, float], dict[str, Any]] = {}
    for names in parts(list(dict.fromkeys(device for device, _ in said))):
        query = select(measured).where(measured.c.device.in_(names), measured.c.start.in_(starts))
        for row in connection.execute(query):
            found[(row.device, row.pipeline, row.release, row.start)] = dict(row._mapping)
    return found


def _empty(device: str, pipeline: str, release: str, start: float, model: str) -> dict[str, Any]:
    key = {"device": device, "pipeline": pipeline, "release": release, "start": start, "model": model}
    nothing: dict[str, Any] = {"reasons": {}, "confidence": [], "latency": []}
    return {
        **key,
        **dict.fromkeys((*COUNTS, "suppressed"), 0),
        **nothing,
        "memory_mib_max": None,
        "temperature_c_max": None,
    }
