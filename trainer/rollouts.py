"""Runs the rollout table: observes the fleet, saves the new state together with the desired states that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from edged.wire.manifest import ReleaseId, ReleaseRef
from trainer.core.canary import Judgement
from trainer.core.rollout import (
    ENDED,
    Effect,
    Event,
    Observation,
    Outcome,
    Phase,
    Rollout,
    begin,
    observe,
    step,
)
from trainer.database import desired, devices, rollouts
from trainer.fleet import Member, desire, desired_of, members, outcome
from trainer.host import Host, new_id
from trainer.releases import ReleaseError
from trainer.signing import forgotten
from trainer.watch import Watch, audit_back, audit_more


def start_rollout(host: Host, connection: Connection, ref: ReleaseRef) -> Rollout | str:
    """Store a new rollout of a registered release to all devices of its model; or why there is none."""
    stored = host.registry.get(ref.release)
    model = ReleaseId(ref.release).name
    if stored.manifest.kind == "lora":
        return f"{ref.release} is an adapter: use `trainer fleet set DEVICE --adapter SLOT={ref.release}`"
    running = connection.execute(
        select(rollouts.c.id, rollouts.c.release, rollouts.c.phase).where(
            rollouts.c.model == model, rollouts.c.phase.notin_([phase.value for phase in ENDED])
        )
    ).first()
    if running is not None:
        return f"rollout {running.id} of {running.release} is {running.phase}: promote or abort it first"
    settings = host.config.models.get(model)
    fleet = members(connection, model, settings.tier if settings else "")
    now = host.now()
    online = [member.device for member in fleet if member.online and member.pinned is None]
    devices = [member.device for member in fleet]
    try:
        rollout = begin(new_id(), ref.release, devices, host.config.rollout.rules(), now, online)
    except ValueError as error:
        return str(error)
    previous = {member.device: _reference(host, connection, member.device, model) for member in fleet}
    for member in fleet:
        if member.active is not None and previous[member.device] is None:
            return (
                f"{member.device} runs {member.active}, which is not registered, so there would be no way back: "
                "`trainer release add` its folder first"
            )
    for release in {each["release"] for each in previous.values() if each is not None}:
        if forgotten(host.config, release):
            return f"{release} runs and is not signed, so there would be no way back: `trainer release sign` it first"
    row = {"id": rollout.id, "model": model, "release": ref.release, "sha256": ref.sha256, "previous": previous}
    state = {"phase": rollout.phase.value, "state": rollout.to_dict(), "created": now, "updated": now}
    connection.execute(insert(rollouts).values(**row, **state))
    return rollout


class Rollouts:
    """Drives every open rollout; `tick` is called about once a second by the coordinator's thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._watch = Watch(host)
        self._failed_since: dict[tuple[str, str], float] = {}  # (rollout, device) -> when a failure was first seen

    def tick(self) -> None:
        """Let every open rollout take the step that the fleet's state calls for, if any; and bring those who were away at
        the end of each model's last one to where the others are."""
        with self._host.database.read() as connection:
            ids = self._open(connection)
        for rollout_id in ids:
            with self._host.database.write() as connection:
                row = connection.execute(select(rollouts).where(rollouts.c.id == rollout_id)).one()
                rollout = Rollout.from_dict(row.state)
                rules = self._host.config.rollout.rules()
                seen = self._observation(connection, row, rollout)
                if seen.judged.findings:
                    rollout = replace(rollout, judged=shown(seen.judged))
                found = observe(rollout, seen, rules, self._host.now())
                if found is not None:
                    self._step(connection, row, rollout, *found, seen.outcomes)
                elif rollout.judged != row.state.get("judged", {}):
                    self._save(connection, row, rollout)

    def _open(self, connection: Connection) -> list[str]:
        """The rollouts that are not over, and the last of each model while somebody is away."""
        ended = [phase.value for phase in ENDED]
        found = list(connection.execute(select(rollouts.c.id).where(rollouts.c.phase.notin_(ended))).scalars())
        newest = (
            select(rollouts.c.model, func.max(rollouts.c.created).label("at")).group_by(rollouts.c.model).subquery()
        )
        last = select(rollouts.c.id, rollouts.c.state).join(
            newest, (rollouts.c.model == newest.c.model) & (rollouts.c.created == newest.c.at)
        )
        for row in connection.execute(last.where(rollouts.c.phase.in_(ended))):
            if row.state.get("left"):
                found.append(row.id)
        return found

    def order(self, rollout_id: str, event: Event, reason: str) -> dict[str, Any]:
        """An operator's word; the answer to show, or an `error`. A release or a model names its rollout too."""
        with self._host.database.write() as connection:
            row = _find(connection, rollout_id)
            if row is None:
                return {"error": f"rollout {rollout_id!r} does not exist; `trainer rollout status` lists them"}
            rollout = Rollout.from_dict(row.state)
            after = self._step(connection, row, rollout, event, reason, self._outcomes(connection, row, rollout)[0])
            if after.phase is rollout.phase:
                return {"error": f"rollout {row.id} is {rollout.phase.value}: {event.value} means nothing there"}
            answer = {"rollout": row.id, "release": row.release, "phase": after.phase.value}
            return answer | ({"going_back": list(after.given)} if after.phase is Phase.ABORTING else {})

    def _save(self, connection: Connection, row: Any, rollout: Rollout) -> None:
        changes = {"phase": rollout.phase.value, "state": rollout.to_dict(), "updated": self._host.now()}
        connection.execute(update(rollouts).where(rollouts.c.id == row.id).values(**changes))

    def _step(
        self, connection: Connection, row: Any, before: Rollout, event: Event, reason: str, seen: Mapping[str, Outcome]
    ) -> Rollout:
        host, now = self._host, self._host.now()
        after, effects = step(before, event, reason, host.config.rollout.rules(), now, seen)
        if after == before and not effects:
            return before
        ref = {"release": row.release, "sha256": row.sha256}
        for effect in effects:
            if effect is Effect.DESIRE:
                new = [device for device in after.devices if device in after.told and device not in before.told]
                self._desire(connection, row, dict.fromkeys(new, ref))
            elif effect is Effect.RESTORE:
                self._desire(connection, row, {device: row.previous.get(device) for device in before.given})
            elif effect is Effect.AUDIT_MORE:
                raised = audit_more(host, connection, row, after, lambda device: runs_now(host, connection, device))
                after = replace(after, raised=raised)
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
            self._failed_since = {key: at for key, at in self._failed_since.items() if key[0] != row.id}
        self._save(connection, row, after)
        return after

    def _desire(self, connection: Connection, row: Any, wanted: dict[str, dict[str, str] | None]) -> None:
        for device, ref in wanted.items():
            desire(connection, device, models={row.model: ref}, start_from=runs_now(self._host, connection, device))

    def _observation(self, connection: Connection, row: Any, rollout: Rollout) -> Observation:
        outcomes, reasons = self._outcomes(connection, row, rollout)
        judged = self._watch.judged(connection, row, rollout)
        return Observation(outcomes, reasons, judged) if judged is not None else Observation(outcomes, reasons)

    def _outcomes(
        self, connection: Connection, row: Any, rollout: Rollout
    ) -> tuple[dict[str, Outcome], dict[str, str]]:
        fleet = {member.device: member for member in members(connection, row.model)}
        outcomes: dict[str, Outcome] = {}
        revs = {row.device: row.rev for row in connection.execute(select(desired.c.device, desired.c.rev))}
        for device in rollout.devices:
            member = fleet.get(device)
            if member is None or (device not in rollout.told and not member.online):
                outcomes[device] = Outcome.OFFLINE
                continue
            found = outcome(member, _told(row, rollout, member), revs.get(device, 0))
            outcomes[device] = self._lasting(rollout, member, found)
        return outcomes, {device: fleet[device].reason for device in rollout.devices if device in fleet}

    def _lasting(self, rollout: Rollout, member: Member, found: Outcome) -> Outcome:
        """A failure counts when it lasts: a device tries again by itself after a fetch that broke off."""
        key, now = (rollout.id, member.device), self._host.now()
        if found is not Outcome.FAILED:
            self._failed_since.pop(key, None)
            return found
        since = self._failed_since.setdefault(key, now)
        if member.update == "reverted" or now - since >= self._host.config.rollout.failed_grace_s:
            return found
        return Outcome.ON_THE_WAY


def shown(judged: Judgement) -> dict[str, Any]:
    """A look at the canary as it is stored and shown."""
    findings = [each.to_dict() for each in judged.findings]
    return {"verdict": judged.verdict.value, "reason": judged.reason, "audited": judged.audited, "findings": findings}


def progress(connection: Connection, row: Any) -> dict[str, Any]:
    """How far a rollout is, for people: `{status, progress: "1/3 nodes", canary_result, ...}` (L17)."""
    rollout = Rollout.from_dict(row.state)
    fleet = {member.device: member for member in members(connection, row.model)}
    running = [
        device
        for device in rollout.devices
        if (member := fleet.get(device)) is not None and member.active == row.release
    ]
    passed = rollout.phase in (Phase.ROLLING, Phase.DONE)
    pending = rollout.phase in (Phase.PENDING, Phase.CANARY, Phase.WATCHING, Phase.PAUSED)
    return {
        "status": rollout.phase.value,
        "progress": f"{len(running)}/{len(rollout.devices)} nodes",
        "canary_result": "passed" if passed else "pending" if pending else rollout.phase.value,
        "canary": list(rollout.canary),
        "reason": rollout.reason,
        "rollout_id": row.id,
        "release": row.release,
        "watch_until": rollout.watch_until,
        "running": running,
        "model": row.model,
        "step": f"{rollout.stage + 1}/{len(rollout.cohorts)}",
        "devices": len(rollout.devices),
        "told": len(rollout.told),
        "since": rollout.since,
        "watch_from": rollout.watch_from,
        "extended": rollout.extended,
        "judged": dict(rollout.judged),
        "away": list(rollout.left),
    }


def _find(connection: Connection, name: str) -> Any:
    """The rollout of this id; or the newest open one of this release or model, or of all for ""."""
    row = connection.execute(select(rollouts).where(rollouts.c.id == name)).first()
    if row is not None:
        return row
    still = rollouts.c.phase.notin_([phase.value for phase in ENDED])
    named = [rollouts.c.release == name] if "@" in name else [rollouts.c.model == name] if name else []
    return connection.execute(select(rollouts).where(still, *named).order_by(rollouts.c.created.desc())).first()


def runs_now(host: Host, connection: Connection, device: str) -> dict[str, Any]:
    """What all slots of a device run, as the start of its first desired state."""
    found: dict[str, Any] = {"models": {}, "adapters": {}}
    reported = connection.execute(select(devices.c.models).where(devices.c.device == device)).scalar() or {}
    for slot, report in reported.items():
        for name, release in (("models", report.get("active")), ("adapters", report.get("adapter"))):
            if release:
                try:
                    found[name][slot] = host.registry.get(release).ref.model_dump(mode="json")
                except ReleaseError:
                    continue  # not ours to name: without an entry the device keeps it
    return found


def _reference(host: Host, connection: Connection, device: str, slot: str) -> dict[str, str] | None:
    """The release to go back to: what the device runs, else what it was last told; None when both are unknown."""
    now: dict[str, str] | None = runs_now(host, connection, device)["models"].get(slot)
    if now is not None:
        return now
    told: dict[str, str] | None = (desired_of(connection, device) or {"models": {}})["models"].get(slot)
    return told


def _told(row: Any, rollout: Rollout, member: Member) -> str | None:
    """The release that this device should be running in this phase."""
    if rollout.phase not in (Phase.ABORTING, Phase.ABORTED) and member.device in rollout.told:
        return str(row.release)
    previous = row.previous.get(member.device)
    # With nothing to go back to, whatever it runs is where it stays.
    return str(previous["release"]) if previous else member.active
