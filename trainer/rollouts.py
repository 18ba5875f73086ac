"""Runs the rollout table: observes the fleet, saves the new state together with the desired states that it asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Connection, insert, select, update

from edged.wire.manifest import ReleaseId, ReleaseRef
from trainer.adapters import misfits
from trainer.config import TrainerConfig
from trainer.config_text import TextModel
from trainer.core.canary import Judgement
from trainer.core.rollout import (
    ENDED,
    NAMED_MAX,
    Effect,
    Event,
    Observation,
    Outcome,
    Phase,
    Rollout,
    begin,
    join,
    observe,
    step,
)
from trainer.database import desired, devices, rollouts
from trainer.faults import Faults
from trainer.fleet import Member, members
from trainer.followed import Followed, going_to
from trainer.host import Host
from trainer.newcomers import Newcomers
from trainer.releases import StoredRelease
from trainer.signing import forgotten
from trainer.standing import Standing
from trainer.telling import references, runs_now, tell
from trainer.watch import Watch, audit_back, audit_more

Known = dict[tuple[str, str], dict[str, Member]]  # (model, part) -> device -> how it stands


def start_rollout(host: Host, connection: Connection, ref: ReleaseRef) -> Rollout | str:
    """Store a new rollout of a registered release to all devices of its model, of an adapter to all that run its base; or
    why there is none."""
    stored = host.registry.get(ref.release)
    model, part = slot_of(host.config, stored), "adapters" if stored.manifest.kind == "lora" else "models"
    running = connection.execute(
        select(rollouts.c.id, rollouts.c.release, rollouts.c.phase).where(
            rollouts.c.model == model, rollouts.c.phase.notin_([phase.value for phase in ENDED])
        )
    ).first()
    if running is not None:
        return f"rollout {running.id} of {running.release} is {running.phase}: promote or abort it first"
    settings = host.config.models.get(model)
    fleet = members(connection, model, settings.tier if settings else "", part, heard=host.lately())
    if part == "adapters":
        found = _on_base(host, stored, model, fleet)
        if isinstance(found, str):
            return found
        fleet = found
    previous = _ways_back(host, connection, [member.device for member in fleet], model, part)
    stray = {each.device: why for each in fleet if (why := _no_way_back(host, each, previous[each.device]))}
    if stray and 2 * len(stray) >= len(fleet):
        return next(iter(stray.values()))
    fleet = [member for member in fleet if member.device not in stray]
    if fleet and all(member.active == ref.release for member in fleet):
        return (
            f"{ref.release} is what all {len(fleet)} devices run in their slot {model!r}: there is nothing to roll out"
        )
    now = host.now()
    online = [member.device for member in fleet if member.online and member.pinned is None]
    devices = [member.device for member in fleet]
    try:
        rollout = begin(host.new_id(), ref.release, devices, host.config.rollout.rules(), now, online)
    except ValueError as error:
        return str(error)
    worn = _ways_back(host, connection, devices, model, "adapters") if part == "models" else {}
    off = {name: adapter for name, adapter in worn.items() if misfits(host, adapter, ref.model_dump(mode="json"))}
    rollout = replace(rollout, part=part, adapters=off)
    previous = {member.device: previous[member.device] for member in fleet}
    row = {"id": rollout.id, "model": model, "release": ref.release, "sha256": ref.sha256, "previous": previous}
    state = {"phase": rollout.phase.value, "state": rollout.to_dict(), "created": now, "updated": now}
    connection.execute(insert(rollouts).values(**row, **state))
    if stray:
        text = f"{ref.release} goes to {len(fleet)} devices without {len(stray)}: {'; '.join(list(stray.values())[:5])}"
        host.announce(
            connection, "rollout_left_out", text, rollout=rollout.id, release=ref.release, devices=list(stray)
        )
    return rollout


def _ways_back(
    host: Host, connection: Connection, names: list[str], model: str, part: str
) -> dict[str, dict[str, str] | None]:
    """What each device gets back when the rollout is aborted: what it runs, or should be running by now."""
    going = going_to(host, connection, model, part)
    return {name: going.get(name, ref) for name, ref in references(host, connection, names, model, part).items()}


def _no_way_back(host: Host, member: Member, previous: Mapping[str, str] | None) -> str:
    """Why a device could not be given back what it runs; empty when it could."""
    if member.active is not None and previous is None:
        return (
            f"{member.device} runs {member.active}, which is not registered, so there would be no way back: "
            "`trainer release add` its folder first"
        )
    if previous is not None and forgotten(host.config, previous["release"]):
        return (
            f"{previous['release']} runs and is not signed, so there would be no way back: "
            "`trainer release sign` it first"
        )
    return ""


def slot_of(config: TrainerConfig, stored: StoredRelease) -> str:
    """The slot that a release goes into: its own name; of an adapter the model that is configured to be improved by
    adapters of this name, else its base's."""
    name, base = ReleaseId(stored.ref.release).name, stored.manifest.base
    if stored.manifest.kind != "lora" or base is None:
        return name
    for model, settings in config.models.items():
        if isinstance(settings, TextModel) and settings.adapter_name(model) == name:
            return model
    return ReleaseId(base.release).name


def _on_base(host: Host, stored: StoredRelease, slot: str, fleet: list[Member]) -> list[Member] | str:
    """The members that run what an adapter is for; or why it can go to nobody."""
    base, release = stored.manifest.base, stored.ref.release
    if base is None or host.registry.get(base.release).ref != base:
        return f"{release} is for another {base.release if base else 'base'} than the registered one: train it anew"
    fitting = [member for member in fleet if member.base == base.release]
    if fitting:
        return fitting
    runs = ", ".join(sorted({str(member.base) for member in fleet})) or "nothing"
    return f"{release} is an adapter for {base.release}, and no device runs that in its slot {slot!r}, but {runs}"


class Rollouts:
    """Drives every open rollout; `tick` is called about once a second by the coordinator's thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._watch = Watch(host)
        self._followed, self._newcomers = Followed(host), Newcomers(host)
        self.faults = Faults(host, "rollout")
        self._changed = host.database.changed(devices, desired)
        self._standing: dict[str, Standing] = {}  # by rollout
        self._left: dict[
            str, tuple[float, bool]
        ] = {}  # rollout that is over -> (its `updated`, whether somebody is away)

    def tick(self) -> None:
        """Let every open rollout take the step that the fleet's state calls for, if any; and bring those who were away at
        the end of each model's last one, or came after it, to where the others are."""
        heard = self._changed.take()
        for standing in self._standing.values():
            standing.heard(heard)
        with self._host.database.read() as connection:
            over, done = self._followed.read(connection)
        self._newcomers.heard(heard, done)
        for rollout_id in done:
            with self.faults.of(rollout_id):
                self._join(rollout_id)
        with self._host.database.read() as connection:
            open_ = self._open(connection, over)
        self._standing = {name: standing for name, standing in self._standing.items() if name in open_}
        self.faults.keep([*open_, *over])
        for rollout_id, updated in open_.items():
            known = self._standing.get(rollout_id)
            if known is not None and known.row.updated == updated and not known.due(self._host.now()):
                continue
            with self.faults.of(rollout_id):
                try:
                    with self._host.database.write() as connection:
                        self._look(connection, rollout_id, updated)
                except BaseException:
                    self._standing.pop(rollout_id, None)  # it may say what was not committed
                    raise

    def _look(self, connection: Connection, rollout_id: str, updated: float) -> None:
        standing = self._standing.get(rollout_id)
        if standing is None or standing.row.updated != updated:
            standing = self._standing[rollout_id] = self._read(connection, rollout_id)
        row, rollout, rules = standing.row, standing.rollout, self._host.config.rollout.rules()
        seen = self._observation(connection, standing)
        if seen.judged.findings:
            rollout = replace(rollout, judged=shown(seen.judged))
        found = observe(rollout, seen, rules, self._host.now())
        if found is not None:
            self._step(connection, row, rollout, *found, seen.outcomes)
        elif rollout.judged != standing.rollout.judged:
            self._save(connection, row, rollout)

    def _read(self, connection: Connection, rollout_id: str) -> Standing:
        row = connection.execute(select(rollouts).where(rollouts.c.id == rollout_id)).one()
        return Standing(_stored(row), Rollout.from_dict(row.state), _told)

    def _join(self, rollout_id: str) -> None:
        """Bring devices that a rollout, which is done, did not know into it."""
        with self._host.database.read() as connection:
            new = self._newcomers.find(connection, rollout_id)
        if new:
            with self._host.database.write() as connection:
                stored = self._read(connection, rollout_id)
                joined, text = join(stored.rollout, new), f"{len(new)} new devices: {', '.join(new[:NAMED_MAX])}"
                self._step(connection, stored.row, joined, Event.JOINED, text, {})
        self._newcomers.joined(rollout_id, new)

    def _open(self, connection: Connection, over: Iterable[str]) -> dict[str, float]:
        """The rollouts that are not over, and of `over` those that somebody was away from; each with its `updated`."""
        ended = [phase.value for phase in ENDED]
        asked = select(rollouts.c.id, rollouts.c.updated)
        found = {row.id: row.updated for row in connection.execute(asked.where(rollouts.c.phase.notin_(ended)))}
        for row in connection.execute(asked.where(rollouts.c.phase.in_(ended), rollouts.c.id.in_(list(over)))).all():
            if self._somebody_is_away(connection, row.id, row.updated):
                found[row.id] = row.updated
        return found

    def _somebody_is_away(self, connection: Connection, rollout_id: str, updated: float) -> bool:
        """Of a rollout that is over; its state, as large as its fleet, is read once."""
        if self._left.get(rollout_id, (None, False))[0] != updated:
            state = connection.execute(select(rollouts.c.state).where(rollouts.c.id == rollout_id)).scalar_one()
            self._left[rollout_id] = (updated, bool(state.get("left")))
        return self._left[rollout_id][1]

    def order(self, rollout_id: str, event: Event, reason: str) -> dict[str, Any]:
        """An operator's word; the answer to show, or an `error`. A release or a model names its rollout too."""
        with self._host.database.write() as connection:
            row = find_rollout(connection, rollout_id)
            if row is None:
                return {"error": no_rollout(connection, rollout_id)}
            self._standing.pop(row.id, None)  # the caller's transaction may yet be undone
            standing = Standing(_stored(row), Rollout.from_dict(row.state), _told)
            rollout = standing.rollout
            self._refresh(connection, standing)
            after = self._step(connection, standing.row, rollout, event, reason, standing.outcomes)
            if after.phase is rollout.phase:
                more = _to_go_back(row) if event is Event.ABORT else ""
                return {"error": f"rollout {row.id} is {rollout.phase.value}: {event.value} means nothing there{more}"}
            answer = {"rollout": row.id, "release": row.release, "phase": after.phase.value}
            return answer | ({"going_back": list(after.given)} if after.phase is Phase.ABORTING else {})

    def _save(self, connection: Connection, row: Any, rollout: Rollout) -> None:
        changes = {"phase": rollout.phase.value, "state": rollout.to_dict(), "updated": self._host.now()}
        connection.execute(update(rollouts).where(rollouts.c.id == row.id).values(**changes))
        self._left.pop(row.id, None)
        standing = self._standing.get(row.id)
        if standing is not None:
            standing.row.updated = changes["updated"]
            standing.becomes(rollout)

    def _step(
        self, connection: Connection, row: Any, before: Rollout, event: Event, reason: str, seen: Mapping[str, Outcome]
    ) -> Rollout:
        host, now = self._host, self._host.now()
        after, effects = step(before, event, reason, host.config.rollout.rules(), now, seen)
        if after == before and not effects:
            return before
        ref, part = {"release": row.release, "sha256": row.sha256}, before.part
        for effect in effects:
            if effect is Effect.DESIRE:
                new = [device for device in after.devices if device in after.told and device not in before.told]
                self._desire(connection, row, part, dict.fromkeys(new, ref))
            elif effect is Effect.RESTORE:
                self._desire(connection, row, part, {device: row.previous.get(device) for device in before.given})
                worn = {device: before.adapters[device] for device in before.given if device in before.adapters}
                self._desire(connection, row, "adapters", worn)
            elif effect is Effect.AUDIT_MORE:
                raised, planned = audit_more(
                    host, connection, row, after, lambda device: runs_now(host, connection, device)
                )
                after = replace(after, raised=raised, planned=planned)
            elif effect is Effect.AUDIT_BACK:
                audit_back(connection, after.raised)
                after = replace(after, raised={})
            elif effect is Effect.ANNOUNCE:
                text = f"{row.release} {before.phase.value} -> {after.phase.value}: {reason}"
                detail = {"rollout": row.id, "release": row.release, "model": row.model, "event": event.value}
                host.announce(connection, f"rollout_{after.phase.value}", text, **detail)
            # CONFIRM and GIVE_BACK are the job's, which reads this rollout's phase: samples belong to jobs alone.
        if after.phase in ENDED:
            self._watch.forget(row.id)
        self._save(connection, row, after)
        return after

    def _desire(
        self, connection: Connection, row: Any, part: str, wanted: Mapping[str, Mapping[str, str] | None]
    ) -> None:
        tell(self._host, connection, row.model, wanted, part)

    def _refresh(self, connection: Connection, standing: Standing) -> None:
        grace_s = self._host.config.rollout.failed_grace_s
        standing.refresh(connection, self._host.now(), grace_s, self._host.lately())

    def _observation(self, connection: Connection, standing: Standing) -> Observation:
        self._refresh(connection, standing)
        judged = self._watch.judged(connection, standing.row, standing.rollout)
        outcomes, reasons = standing.outcomes, standing.reasons
        return Observation(outcomes, reasons, judged) if judged is not None else Observation(outcomes, reasons)


def shown(judged: Judgement) -> dict[str, Any]:
    """A look at the canary as it is stored and shown."""
    findings = [each.to_dict() for each in judged.findings]
    return {"verdict": judged.verdict.value, "reason": judged.reason, "audited": judged.audited, "findings": findings}


def progress(connection: Connection, row: Any, known: Known | None = None) -> dict[str, Any]:
    """How far a rollout is, for people: `{status, progress: "1/3 nodes", canary_result, ...}` (L17). `known`: given to all
    calls for several rollouts, the fleet of each model is read once."""
    rollout, known = Rollout.from_dict(row.state), {} if known is None else known
    if (row.model, rollout.part) not in known:
        found = members(connection, row.model, part=rollout.part)
        known[row.model, rollout.part] = {member.device: member for member in found}
    fleet = known[row.model, rollout.part]
    running = [
        device
        for device in rollout.devices
        if (member := fleet.get(device)) is not None and member.active == row.release
    ]
    # One that was stored by the version before has no result.
    result = rollout.result or ("passed" if rollout.phase in (Phase.ROLLING, Phase.DONE) else "pending")
    return {
        "status": rollout.phase.value,
        "progress": f"{len(running)}/{len(rollout.devices)} nodes",
        "canary_result": result,
        "canary": list(rollout.canary),
        "reason": rollout.reason,
        "rollout_id": row.id,
        "release": row.release,
        "watch_until": rollout.watch_until,
        "running": running,
        "model": row.model,
        "part": rollout.part,
        "step": f"{rollout.stage + 1}/{len(rollout.cohorts)}",
        "devices": len(rollout.devices),
        "told": len(rollout.told),
        "since": rollout.since,
        "watch_from": rollout.watch_from,
        "extended": rollout.extended,
        "judged": dict(rollout.judged),
        "away": list(rollout.left),
        "stalled": list(rollout.stalled),
    }


def no_rollout(connection: Connection, name: str) -> str:
    """Why nothing can be said to a rollout of this name."""
    named = rollouts.c.release == name if "@" in name else rollouts.c.model == name
    row = connection.execute(select(rollouts).where(named).order_by(rollouts.c.created.desc())).first()
    if row is None:
        return f"rollout {name!r} does not exist; `trainer rollout status` lists them"
    return f"no rollout of {name} is open: the last one, {row.id} of {row.release}, is {row.phase}{_to_go_back(row)}"


def _to_go_back(row: Any) -> str:
    """How to undo a rollout that is done."""
    before = Counter(ref["release"] for ref in row.previous.values() if ref is not None)
    if row.phase != Phase.DONE or not before:
        return ""
    return f"; to go back: `trainer rollout start {min(before, key=lambda each: (-before[each], each))}`"


def find_rollout(connection: Connection, name: str) -> Any:
    """The rollout of this id; or the newest open one of this release or model, or of all for ""."""
    row = connection.execute(select(rollouts).where(rollouts.c.id == name)).first()
    if row is not None:
        return row
    still = rollouts.c.phase.notin_([phase.value for phase in ENDED])
    named = [rollouts.c.release == name] if "@" in name else [rollouts.c.model == name] if name else []
    return connection.execute(select(rollouts).where(still, *named).order_by(rollouts.c.created.desc())).first()


def _stored(row: Any) -> SimpleNamespace:
    """The row of a rollout without its state, which is as large as its fleet."""
    fields = ("id", "model", "release", "sha256", "previous", "created", "updated")
    return SimpleNamespace(**{name: getattr(row, name) for name in fields})


def _told(row: Any, rollout: Rollout, member: Member) -> str | None:
    """The release that this device should be running in this phase."""
    if rollout.phase not in (Phase.ABORTING, Phase.ABORTED) and member.device in rollout.told:
        return str(row.release)
    previous = row.previous.get(member.device)
    if rollout.part == "adapters":
        return str(previous["release"]) if previous else None
    # With nothing to go back to, whatever it runs is where it stays.
    return str(previous["release"]) if previous else member.active
