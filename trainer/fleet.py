"""What the trainer knows of its devices: taken in from their messages, asked by jobs, rollouts and people.

Every function works inside the caller's transaction, so that a message is acknowledged only after all it says is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from sqlalchemy import Connection, bindparam, case, delete, func, insert, or_, select, update

from edged.wire.messages import CommandState, Event, Message, Metrics, Reported, SampleEntry, State, Text
from trainer import intake, live
from trainer.core.believed import REV_MAX
from trainer.core.presence import ALWAYS, Lately, present
from trainer.core.rollout import Outcome
from trainer.database import (
    commands,
    desired,
    devices,
    events,
    identities,
    note_changed,
    opinions,
    parts,
    predictions,
    pulls,
    put,
    removed,
    samples,
    seen,
    windows,
)
from trainer.retention import forget

SEEN_S_MAX = 2 * 86400.0  # since its receipt: longer than any message lives in the broker
WINDOWS_S_MAX = 14 * 86400.0  # as they came; added up by the hour they live longer (trainer/live.py)
COMMAND_S_MAX = 7 * 86400.0
UNFINISHED = ("open", "accepted", "failed")  # command states, of what is sent again
ENDED = ("done", "expired", "refused")  # and all others
OPEN = ("open", "accepted", "failed")  # all others
ORDERS = ("rollback", "pin", "unpin", "forget")  # commands of people: what a device refuses is not sent again
SETTLED = frozenset({"idle", "committed"})  # update states in which what is active is meant to stay
FAILED = frozenset({"failed", "reverted"})

# Made once: every message asks for them, and SQLAlchemy takes longer to build a statement than SQLite to run it.
_KNOWN = select(samples.c.entry_ts, samples.c.state, samples.c.device).where(samples.c.id == bindparam("of"))


@dataclass(frozen=True, slots=True)
class Member:
    """A device as a rollout sees it: what its slot runs, how its update stands, and the last desired state it saw."""

    device: str
    online: bool
    active: str | None
    adapter: str | None
    update: str
    reason: str
    desired_rev: int
    pinned: str | None = None
    base: str | None = None  # of a member of an adapter's fleet: what the slot runs, `active` is the adapter on it


def is_new(connection: Connection, message: Message, now: float) -> bool:
    """Note the message's id; false when it was taken in before."""
    return intake.news(connection, [message], now)[0]


def take_state(connection: Connection, device: str, state: State, now: float, *, retained: bool = False) -> bool:
    """A birth or a Will. True for a birth of a boot that was not known: the device has just started."""
    return bool(intake.take_states(connection, [(device, state)], now, {device} if retained else ()))


def take_reported(
    connection: Connection, device: str, reported: Reported, now: float, *, retained: bool = False
) -> None:
    """What a device runs now."""
    intake.take_reports(connection, [(device, reported)], now, {device} if retained else ())


def take_sample(connection: Connection, device: str, entry: SampleEntry) -> None:
    """A catalogue entry; one that is older than what is known, or another device's sample, changes nothing."""
    row = connection.execute(_KNOWN, {"of": entry.sample}).first()
    if row is not None and (row.device != device or row.entry_ts > entry.ts):
        return
    values = {
        "device": device,
        "model": entry.model,
        "pipeline": entry.pipeline,
        "release": entry.release,
        # The confirmation of a training is ours to say: an entry sent before the device heard of it does not undo it.
        "state": row.state
        if row is not None and row.state in ("used", "archived") and entry.state in ("labelled", "claimed")
        else entry.state,
        "sha256": entry.sha256,
        "bytes": entry.bytes,
        "label": [box.model_dump(mode="json") for box in entry.label],
        "label_confidence": entry.label_confidence,
        "provenance": entry.provenance.model_dump(mode="json") if entry.provenance else None,
        "captured": entry.captured,
        "entry_ts": entry.ts,
    }
    put(connection, samples, {"id": entry.sample}, values)
    if any(isinstance(part, Text) for part in entry.prediction):
        answered = [part.model_dump(mode="json") for part in entry.prediction]
        put(connection, predictions, {"sample": entry.sample}, {"label": answered})
    if len(entry.opinions) > 1:  # a single one is the label's own
        said = [opinion.model_dump(mode="json") for opinion in entry.opinions]
        put(connection, opinions, {"sample": entry.sample}, {"said": said})
    live.take_entry(connection, device, entry)


def take_metrics(connection: Connection, device: str, metrics: Metrics) -> None:
    """One closed window of a pipeline; one that came before changes nothing."""
    intake.take_windows(connection, [(device, metrics)])


def take_event(connection: Connection, device: str, event: Event) -> None:
    """Something that a person should see; one that is known stays as it is."""
    if connection.execute(select(events.c.id).where(events.c.id == event.id)).first() is None:
        values = {"ts": event.ts, "source": device, "kind": event.kind, "text": event.text, "detail": event.detail}
        connection.execute(insert(events).values(id=event.id, **values))


def take_command_state(connection: Connection, device: str, command: str, state: CommandState) -> None:
    """How far a command of this device is; what is done stays done. One that failed is sent again, unless it is a person's:
    the reason may pass."""
    found = connection.execute(select(commands).where(commands.c.id == command, commands.c.device == device)).first()
    if found is None:
        return
    told = "refused" if state.state == "failed" and found.type in ORDERS else state.state
    connection.execute(
        update(commands)
        .where(commands.c.id == command, commands.c.state.notin_(ENDED))
        .values(state=told, reason=state.reason, detail=state.detail)
    )
    if found.body.get("action") == "release" and state.state == "done":
        _given_back(connection, device, state)


def _given_back(connection: Connection, device: str, state: CommandState) -> None:
    """The device holds these samples for nobody: an entry from before, in which they were claimed, says so no more. It may
    have come after the claim was ended here, and only the next listing, hours later, would undo it."""
    moved = state.detail.get("moved")
    for part in parts([each for each in moved if isinstance(each, str)] if isinstance(moved, list) else []):
        where = (samples.c.id.in_(part), samples.c.device == device, samples.c.job.is_(None))
        held = (samples.c.state.in_(("claimed", "labelled")), samples.c.entry_ts <= state.ts)
        connection.execute(update(samples).where(*where, *held).values(state="labelled", entry_ts=state.ts))


def prune(connection: Connection, now: float, own: str = "") -> None:
    """Forget what nobody needs any more, so that nothing grows for ever. `own`: the trainer's name."""
    connection.execute(delete(seen).where(seen.c.ts < now - SEEN_S_MAX))
    connection.execute(delete(windows).where(windows.c.end < now - WINDOWS_S_MAX))
    live.prune(connection, now)
    connection.execute(delete(commands).where(commands.c.state.in_(ENDED), commands.c.created < now - COMMAND_S_MAX))
    old = select(commands.c.id, commands.c.body).where(
        commands.c.state.in_(UNFINISHED), commands.c.created < now - COMMAND_S_MAX
    )
    # What ends a claim is sent until it is heard, however long the device is away: else its samples stay claimed.
    given_up = [row.id for row in connection.execute(old) if row.body.get("action") not in ("release", "used")]
    connection.execute(update(commands).where(commands.c.id.in_(given_up)).values(state="expired"))
    connection.execute(delete(pulls).where(pulls.c.state == "done", pulls.c.created < now - COMMAND_S_MAX))
    forget(connection, now, own)


def members(
    connection: Connection, slot: str, tier: str = "", part: str = "models", *, names: Sequence[str] | None = None,
    heard: Lately = ALWAYS,
) -> list[Member]:  # fmt: skip
    """The fleet of a model: the devices that report this slot (of `tier` only, when one is given), by name, without revoked
    ones. `part`: with "adapters" what is active and pinned is the adapter in the slot. `names`: only these, in order.
    `heard`: who is online by it; else whoever sent no will message."""
    table, out = devices.c, revoked(connection)
    columns = (table.device, table.online, table.seen_at, table.tier, table.desired_rev, table.models)
    query = select(*columns).order_by(table.device)
    asked = [query] if names is None else [query.where(table.device.in_(some)) for some in parts(names)]
    found = []
    for row in (row for each in asked for row in connection.execute(each)):
        report = row.models.get(slot) if row.device not in out else None
        if report is not None and (not tier or row.tier == tier):
            member = Member(
                row.device, present(row.online, row.seen_at, heard), report.get("active"), report.get("adapter"),
                report.get("update", "idle"), report.get("reason", ""), row.desired_rev, report.get("pinned"),
            )  # fmt: skip
            if part == "adapters":
                member = replace(
                    member, active=member.adapter, pinned=report.get("adapter_pinned"), base=member.active
                )  # fmt: skip
            found.append(member)
    return found


def revoked(connection: Connection) -> frozenset[str]:
    """Who may not connect any more."""
    return frozenset(connection.execute(select(identities.c.name).where(identities.c.revoked > 0)).scalars())


def gone(connection: Connection, names: Sequence[str]) -> set[str]:
    """Those of these devices that are revoked, or that nobody knows any more."""
    known: set[str] = set()
    for part in parts(names):
        known.update(connection.execute(select(devices.c.device).where(devices.c.device.in_(part))).scalars())
    return {name for name in names if name not in known} | (revoked(connection) & frozenset(names))


def outcome(member: Member, release: str | None, rev: int) -> Outcome:
    """How far a device is with running `release` (None: no adapter), which desired state `rev` told it to."""
    if member.active == release and member.update not in FAILED and member.update in SETTLED:
        return Outcome.RUNNING
    if member.pinned is not None and release not in (member.pinned, member.active):
        return Outcome.PINNED
    if member.update in FAILED and member.desired_rev >= rev:
        # Back on the release it was told to go back to: reverted is then as good as running.
        return Outcome.RUNNING if member.active == release else Outcome.FAILED
    return Outcome.ON_THE_WAY if member.online else Outcome.OFFLINE


def current_release(fleet: Sequence[Member]) -> str | None:
    """The release that most devices run; None when none runs any."""
    running = [member.active for member in fleet if member.active]
    return max(sorted(set(running)), key=running.count) if running else None


def running_release(connection: Connection, slot: str, tier: str = "") -> str | None:
    """`current_release` of a model's fleet, counted by the database: for who asks often."""
    active = devices.c.models[(slot, "active")].as_string()
    query = select(active.label("active"), func.count().label("count")).where(active.is_not(None)).group_by(active)
    query = query.where(devices.c.device.notin_(select(identities.c.name).where(identities.c.revoked > 0)))
    rows = connection.execute(query.where(devices.c.tier == tier) if tier else query).all()
    return min(rows, key=lambda row: (-int(row._mapping["count"]), row.active)).active if rows else None


def find_samples(
    connection: Connection, *, model: str = "", state: str = "", device: str = "", label: str = "",
    confidence_min: float = 0.0, confidence_max: float = 1.0, limit: int = 100,
) -> list[dict[str, Any]]:  # fmt: skip
    """Samples that devices keep, newest first; what is empty does not narrow. `label`: a class that the label names."""
    query = select(samples).order_by(samples.c.captured.desc(), samples.c.id)
    for column, value in ((samples.c.model, model), (samples.c.state, state), (samples.c.device, device)):
        if value:
            query = query.where(column == value)
    query = query.where(samples.c.label_confidence.between(confidence_min, confidence_max))
    if not label:
        return [dict(row._mapping) for row in connection.execute(query.limit(limit))]
    found = (row for row in connection.execute(query) if any(box.get("label") == label for box in row.label))
    return [dict(row._mapping) for row in islice(found, limit)]


def free_samples(connection: Connection, model: str, names: Sequence[str], limit: int) -> list[str]:
    """The newest labelled samples of a model that these devices keep and no job holds, newest first."""
    table, found = samples.c, list[Any]()
    query = select(table.captured, table.id).where(table.model == model, table.state == "labelled", table.job.is_(None))
    for some in parts(names):
        newest = query.where(table.device.in_(some)).order_by(table.captured.desc(), table.id).limit(limit)
        found += connection.execute(newest).all()
    return [row.id for row in sorted(found, key=lambda row: (-row.captured, row.id))[:limit]]


def sample_counts(connection: Connection) -> list[dict[str, Any]]:
    """How many samples there are of each model, device and state, with the mean confidence of their labels."""
    count, quality = func.count().label("count"), func.avg(samples.c.label_confidence).label("label_confidence_mean")
    query = select(samples.c.model, samples.c.device, samples.c.state, count, quality).group_by(
        samples.c.model, samples.c.device, samples.c.state
    )
    return [dict(row._mapping) for row in connection.execute(query)]


def training_counts(
    connection: Connection, model: str, confidence_min: float, names: Sequence[str] = ()
) -> tuple[int, int]:
    """(new, usable) labelled samples of a model that are sure enough to train, as `core.triggers.decide` takes them."""
    usable = trainable(model, confidence_min, names)
    counts = select(func.count(), func.sum(case((samples.c.tried == 0, 1), else_=0)))
    both, new = connection.execute(counts.select_from(samples).where(*usable)).one()
    return int(new or 0), int(both)


def trainable(model: str, confidence_min: float, names: Sequence[str] = ()) -> list[Any]:
    """The condition on a sample row: labelled, sure enough, in no job, of no device that was removed, and not by the model
    itself (core.provenance), under whichever of its `names`."""
    kind, release = (samples.c.provenance[key].as_string() for key in ("kind", "release"))
    ours = [func.coalesce(release, "").startswith(f"{name}@", autoescape=True) for name in names or (model,)]
    own = (func.coalesce(kind, "") == "model") & or_(*ours)
    return [
        ~own,
        samples.c.model == model,
        samples.c.state == "labelled",
        samples.c.job.is_(None),
        samples.c.label_confidence >= confidence_min,
        samples.c.device.notin_(select(removed.c.device)),
    ]


def opinions_of(connection: Connection, given: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Sample -> all that was said about it, for those of which more than one said something."""
    found: dict[str, list[dict[str, Any]]] = {}
    for part in parts(given):
        query = select(opinions).where(opinions.c.sample.in_(part))
        found.update((row.sample, row.said) for row in connection.execute(query))
    return found


def answers_of(connection: Connection, given: Sequence[str]) -> dict[str, str]:
    """Sample -> what the device's own model had answered, of texts."""
    found: dict[str, str] = {}
    for part in parts(given):
        rows = connection.execute(select(predictions).where(predictions.c.sample.in_(part)))
        found.update((row.sample, row.label[0]["text"]) for row in rows)
    return found


def desired_of(connection: Connection, device: str) -> dict[str, Any] | None:
    """The desired state of a device as a dictionary of its row; None when it was never told anything."""
    row = connection.execute(select(desired).where(desired.c.device == device)).first()
    return dict(row._mapping) if row is not None else None


def desire(
    connection: Connection,
    device: str,
    *,
    models: dict[str, dict[str, str] | None] | None = None,
    adapters: dict[str, dict[str, str] | None] | None = None,
    start_from: dict[str, Any] | None = None,
    policy: dict[str, dict[str, Any]] | None = None,
) -> int:
    """Change a device's desired state (None removes a slot's entry; `policy` replaces all of it) and return its `rev`;
    without a difference the old. Nothing is desired of a device that was removed (`trainer.removed`): 0.

    `start_from` (`models`, `adapters`) is what a device that was never told anything runs, so that the first word to
    it does not take anything away.
    """
    if connection.execute(select(removed.c.device).where(removed.c.device == device)).first() is not None:
        return 0
    row = desired_of(connection, device)
    reported = connection.execute(select(devices.c.desired_rev).where(devices.c.device == device)).scalar()
    after = desired_after(
        row, int(reported or 0), models=models, adapters=adapters, start_from=start_from, policy=policy
    )
    if after is None:
        return int((row or {"rev": 0})["rev"])
    note_changed(connection, desired, [device])
    put(connection, desired, {"device": device}, after)
    return int(after["rev"])


def desired_after(
    row: dict[str, Any] | None,
    reported: int,
    *,
    models: Mapping[str, Mapping[str, str] | None] | None = None,
    adapters: Mapping[str, Mapping[str, str] | None] | None = None,
    start_from: Mapping[str, Any] | None = None,
    policy: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any] | None:
    """The columns of a desired state after a change of `row` (None: the device was never told anything), as `desire` makes
    it; None without a difference. `reported`: the highest `rev` that the device says it has seen."""
    base = row or {"rev": 0, "models": {}, "adapters": {}, **(start_from or {})}
    told = (row or {}).get("policy", {})
    after: dict[str, Any] = {"models": dict(base["models"]), "adapters": dict(base["adapters"])}
    after["policy"] = told if policy is None else policy
    for name, changes in (("models", models or {}), ("adapters", adapters or {})):
        for slot, ref in changes.items():
            if ref is None:
                after[name].pop(slot, None)
            else:
                after[name][slot] = dict(ref)
    if row is not None and all(after[name] == row[name] for name in after):
        return None
    # Above what the device has seen, too: a trainer that lost its database must still be heard.
    return {"rev": max(int(base["rev"]), reported if reported <= REV_MAX else 0) + 1, **after}
