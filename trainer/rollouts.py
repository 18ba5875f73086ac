"""Runs the rollout table: observes the fleet, saves the new state together with the desired states that it asks for."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, insert, select, update

from edged.wire.manifest import ReleaseId, ReleaseRef
from trainer.core.rollout import (
    Effect,
    Event,
    Observation,
    Outcome,
    Phase,
    Rollout,
    Window,
    begin,
    observe,
    step,
)
from trainer.database import devices, rollouts
from trainer.fleet import Member, desire, desired_of, members, outcome, window
from trainer.host import Host, new_id
from trainer.releases import ReleaseError
from trainer.signing import forgotten

OWN_PAST_S_MIN = 900.0  # a fleet of one is compared with at least this much of its own past
ENDED = (Phase.DONE.value, Phase.ABORTED.value)


def start_rollout(host: Host, connection: Connection, ref: ReleaseRef) -> Rollout | str:
    """Store a new rollout of a registered release to all devices of its model; or why there is none."""
    stored = host.registry.get(ref.release)
    model = ReleaseId(ref.release).name
    if stored.manifest.kind == "lora":
        return f"{ref.release} is an adapter: use `trainer fleet set DEVICE --adapter SLOT={ref.release}`"
    running = connection.execute(
        select(rollouts.c.id, rollouts.c.release, rollouts.c.phase).where(
            rollouts.c.model == model, rollouts.c.phase.notin_(ENDED)
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
        self._failed_since: dict[tuple[str, str], float] = {}  # (rollout, device) -> when a failure was first seen

    def tick(self) -> None:
        """Let every open rollout take the step that the fleet's state calls for, if any."""
        with self._host.database.read() as connection:
            ids = connection.execute(select(rollouts.c.id).where(rollouts.c.phase.notin_(ENDED))).scalars().all()
        for rollout_id in ids:
            with self._host.database.write() as connection:
                row = connection.execute(select(rollouts).where(rollouts.c.id == rollout_id)).one()
                rollout = Rollout.from_dict(row.state)
                rules = self._host.config.rollout.rules()
                found = observe(rollout, self._observation(connection, row, rollout), rules, self._host.now())
                if found is not None:
                    self._step(connection, row, rollout, *found)

    def order(self, rollout_id: str, event: Event, reason: str) -> dict[str, Any]:
        """An operator's word; the answer to show, or an `error`."""
        with self._host.database.write() as connection:
            row = connection.execute(select(rollouts).where(rollouts.c.id == rollout_id)).first()
            if row is None:
                return {"error": f"rollout {rollout_id!r} does not exist; `trainer rollout status` lists them"}
            rollout = Rollout.from_dict(row.state)
            after = self._step(connection, row, rollout, event, reason)
            if after.phase is rollout.phase:
                return {"error": f"rollout {rollout_id} is {rollout.phase.value}: {event.value} means nothing there"}
            return {"rollout": rollout_id, "release": row.release, "phase": after.phase.value}

    def _step(self, connection: Connection, row: Any, before: Rollout, event: Event, reason: str) -> Rollout:
        host, now = self._host, self._host.now()
        after, effects = step(before, event, reason, host.config.rollout.rules(), now)
        if after == before:
            return before
        changes = {"phase": after.phase.value, "state": after.to_dict(), "updated": now}
        connection.execute(update(rollouts).where(rollouts.c.id == row.id).values(**changes))
        ref = {"release": row.release, "sha256": row.sha256}
        for effect in effects:
            if effect is Effect.DESIRE_CANARY:
                self._desire(connection, row, dict.fromkeys(after.canary, ref))
            elif effect is Effect.DESIRE_ALL:
                self._desire(connection, row, dict.fromkeys(after.devices, ref))
            elif effect is Effect.RESTORE:
                given = [device for device in before.devices if device in before.given]
                self._desire(connection, row, {device: row.previous.get(device) for device in given})
            elif effect is Effect.ANNOUNCE:
                text = f"{row.release} {before.phase.value} -> {after.phase.value}: {reason}"
                host.announce(connection, f"rollout_{after.phase.value}", text, rollout=row.id, release=row.release)
            # CONFIRM and GIVE_BACK are the job's, which reads this rollout's phase: samples belong to jobs alone.
        return after

    def _desire(self, connection: Connection, row: Any, wanted: dict[str, dict[str, str] | None]) -> None:
        for device, ref in wanted.items():
            desire(connection, device, models={row.model: ref}, start_from=runs_now(self._host, connection, device))

    def _observation(self, connection: Connection, row: Any, rollout: Rollout) -> Observation:
        fleet = {member.device: member for member in members(connection, row.model)}
        outcomes: dict[str, Outcome] = {}
        for device in rollout.devices:
            member = fleet.get(device)
            if member is None:
                outcomes[device] = Outcome.OFFLINE
                continue
            told = (desired_of(connection, device) or {"rev": 0})["rev"]
            outcomes[device] = self._lasting(rollout, member, outcome(member, _told(row, rollout, member), told))
        reasons = {device: fleet[device].reason for device in rollout.devices if device in fleet}
        canary, control = self._windows(connection, row, rollout)
        return Observation(outcomes, reasons, canary, control)

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

    def _windows(self, connection: Connection, row: Any, rollout: Rollout) -> tuple[Window, Window]:
        if rollout.phase is not Phase.WATCHING:
            return Window(), Window()
        canary = window(connection, rollout.canary, rollout.watch_from, model=row.model, release=row.release)
        others = [device for device in rollout.devices if device not in rollout.canary]
        if others:
            return canary, window(connection, others, rollout.watch_from, model=row.model)
        # Nobody is left to compare with: the same devices before, on their previous release.
        rules = self._host.config.rollout
        start = row.created - max(rules.watch_s * (1 + rules.extend_max), OWN_PAST_S_MIN)
        return canary, window(connection, rollout.canary, start, model=row.model, until=row.created)


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
    pending = rollout.phase in (Phase.PENDING, Phase.CANARY, Phase.WATCHING)
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
    }


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
    if rollout.phase is not Phase.ABORTING and member.device in rollout.given:
        return str(row.release)
    previous = row.previous.get(member.device)
    # With nothing to go back to, whatever it runs is where it stays.
    return str(previous["release"]) if previous else member.active
