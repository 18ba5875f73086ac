"""The life of a rollout, as a table: (phase, event) -> (phase, effects), and what turns observations into its events.

The coordinator saves the new state and what its effects ask for (desired states, the fate of samples) in one
transaction, so that a restart finds both or neither. Time is an argument. A canary passes on evidence only: too little of
it extends the watch, and then holds the rollout for a person.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from hashlib import sha256
from typing import Any

from trainer.core.canary import Judgement, Verdict
from trainer.core.rollout_rules import RolloutRules as RolloutRules


class Phase(StrEnum):
    """Where a rollout stands."""

    PENDING = "pending"
    CANARY = "canary"  # the devices of a step are being given the release
    WATCHING = "watching"  # they run it, and are compared with the others
    ROLLING = "rolling"  # everybody is being given it
    DONE = "done"
    ABORTING = "aborting"  # everybody who was given it is being given the previous release
    ABORTED = "aborted"
    HELD = "held"  # waits for a person
    PAUSED = "paused"  # by a person: nobody else is given it, and no watch ends


class Event(StrEnum):
    """What happened to it."""

    START = "start"
    ROOM = "room"  # further devices may be on their way
    CANARY_RUNNING = "canary_running"  # every device of the step committed the release
    DEVICE_FAILED = "device_failed"  # too many devices reverted or could not install it
    STALLED = "stalled"  # devices of the step did not get there in time
    SAMPLED = "sampled"  # the planned audits are there
    STEP_PASSED = "step_passed"  # not worse, and a further step comes before everybody
    BETTER_OR_SAME = "better_or_same"
    WORSE = "worse"
    TOO_LITTLE = "too_little"  # evidence, and the watch may be extended
    UNDECIDED = "undecided"  # too little evidence, and no extension left
    ALL_SETTLED = "all_settled"  # no reachable device is still on its way
    CAME_BACK = "came_back"  # who was away at the end got there too
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    PROMOTE = "promote"  # a person says: go on


class Effect(StrEnum):
    """What to do about it; all idempotent."""

    DESIRE = "desire"  # tell those whom `told` has gained
    RESTORE = "restore"  # previous release back to whoever was given this one
    AUDIT_MORE = "audit_more"  # canaries and the others have more answers checked, for as long as the watch needs it
    AUDIT_BACK = "audit_back"  # as before
    CONFIRM = "confirm"  # the samples that trained it are used up
    GIVE_BACK = "give_back"  # the samples that trained it may train again
    ANNOUNCE = "announce"


P, E, F = Phase, Event, Effect

_BACK = (P.ABORTING, (F.AUDIT_BACK, F.RESTORE, F.ANNOUNCE))
_HOLD = (P.HELD, (F.AUDIT_BACK, F.ANNOUNCE))
_GO = (P.ROLLING, (F.AUDIT_BACK, F.DESIRE, F.ANNOUNCE))
_PAUSE = (P.PAUSED, (F.ANNOUNCE,))

# The phase None: the one in which it was paused.
TABLE: dict[tuple[Phase, Event], tuple[Phase | None, tuple[Effect, ...]]] = {
    (P.PENDING, E.START): (P.CANARY, (F.DESIRE, F.ANNOUNCE)),
    (P.PENDING, E.ABORT): (P.ABORTED, (F.GIVE_BACK, F.ANNOUNCE)),
    #
    (P.CANARY, E.ROOM): (P.CANARY, (F.DESIRE,)),
    (P.CANARY, E.CANARY_RUNNING): (P.WATCHING, (F.AUDIT_MORE, F.ANNOUNCE)),
    (P.CANARY, E.DEVICE_FAILED): _BACK,
    (P.CANARY, E.STALLED): _HOLD,
    (P.CANARY, E.PAUSE): _PAUSE,
    (P.CANARY, E.ABORT): _BACK,
    #
    (P.WATCHING, E.SAMPLED): (P.WATCHING, (F.AUDIT_BACK,)),
    (P.WATCHING, E.STEP_PASSED): (P.CANARY, (F.AUDIT_BACK, F.DESIRE, F.ANNOUNCE)),
    (P.WATCHING, E.BETTER_OR_SAME): _GO,
    (P.WATCHING, E.WORSE): _BACK,
    (P.WATCHING, E.DEVICE_FAILED): _BACK,
    (P.WATCHING, E.TOO_LITTLE): (P.WATCHING, (F.AUDIT_MORE, F.ANNOUNCE)),
    (P.WATCHING, E.UNDECIDED): _HOLD,
    (P.WATCHING, E.PAUSE): _PAUSE,
    (P.WATCHING, E.ABORT): _BACK,
    (P.WATCHING, E.PROMOTE): _GO,
    #
    (P.ROLLING, E.ROOM): (P.ROLLING, (F.DESIRE,)),
    (P.ROLLING, E.ALL_SETTLED): (P.DONE, (F.CONFIRM, F.ANNOUNCE)),
    (P.ROLLING, E.DEVICE_FAILED): _BACK,
    (P.ROLLING, E.PAUSE): _PAUSE,
    (P.ROLLING, E.ABORT): _BACK,
    #
    (P.HELD, E.PROMOTE): _GO,
    (P.HELD, E.WORSE): _BACK,
    (P.HELD, E.DEVICE_FAILED): _BACK,
    (P.HELD, E.ABORT): _BACK,
    #
    (P.PAUSED, E.RESUME): (None, (F.ANNOUNCE,)),
    (P.PAUSED, E.WORSE): _BACK,
    (P.PAUSED, E.DEVICE_FAILED): _BACK,
    (P.PAUSED, E.ABORT): _BACK,
    #
    (P.ABORTING, E.ALL_SETTLED): (P.ABORTED, (F.GIVE_BACK, F.ANNOUNCE)),
    #
    (P.DONE, E.ROOM): (P.DONE, (F.DESIRE,)),
    (P.DONE, E.CAME_BACK): (P.DONE, (F.ANNOUNCE,)),
    (P.ABORTED, E.CAME_BACK): (P.ABORTED, (F.ANNOUNCE,)),
}

ENDED = frozenset({P.DONE, P.ABORTED})
OPEN = frozenset(Phase) - ENDED
_GIVING = frozenset({P.CANARY, P.ROLLING, P.DONE})  # who is in reach and has not been told may be told now


@dataclass(frozen=True, slots=True)
class Rollout:
    """A rollout as it is stored; times are seconds since the epoch.

    `devices` is the fleet at its start, in the order in which it is reached: the first `cohorts[n]` of them are step n.
    `told`: whom it was given to, and when. `raised`: device -> pipeline -> the policy that was told before, and what was
    added to it. `left`: who was away at the end.
    """

    id: str
    release: str
    devices: tuple[str, ...]
    cohorts: tuple[int, ...]
    phase: Phase = Phase.PENDING
    stage: int = 0
    since: float = 0.0  # when this phase began
    watch_from: float = 0.0  # 0: no watch has begun in this step
    watch_until: float = 0.0
    extended: int = 0
    paused_in: Phase | None = None
    reason: str = ""
    told: Mapping[str, float] = field(default_factory=dict)
    raised: Mapping[str, Any] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    judged: Mapping[str, Any] = field(default_factory=dict)  # the last look at the canary, for people

    @property
    def canary(self) -> tuple[str, ...]:
        """The devices that this step is judged by."""
        return self.devices[: self.cohorts[min(self.stage, len(self.cohorts) - 2)]]

    @property
    def reach(self) -> tuple[str, ...]:
        """The devices that may have the release in this step."""
        return self.devices[: self.cohorts[self.stage]]

    @property
    def given(self) -> tuple[str, ...]:
        """The devices that have been told to run the release."""
        return tuple(device for device in self.devices if device in self.told)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rollout:
        """The rollout that `to_dict` wrote; raises TypeError or KeyError for another form."""
        fields = dict(values)
        if "cohorts" not in fields:
            fields = _upgraded(fields)
        for name in ("devices", "cohorts", "left"):
            fields[name] = tuple(fields[name])
        fields["phase"] = Phase(fields["phase"])
        fields["paused_in"] = Phase(fields["paused_in"]) if fields["paused_in"] else None
        return cls(**fields)


class Outcome(StrEnum):
    """How far one device is with what it was told to run."""

    RUNNING = "running"
    ON_THE_WAY = "on_the_way"
    OFFLINE = "offline"  # on the way, and not reachable
    FAILED = "failed"
    PINNED = "pinned"  # a person keeps it on another release: it is waited for no more than it is counted


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything an event may be made of: each device's outcome, why devices failed, and how the canaries compare."""

    outcomes: Mapping[str, Outcome]
    reasons: Mapping[str, str]
    judged: Judgement = field(default_factory=Judgement)


def begin(
    rollout_id: str, release: str, devices: Iterable[str], rules: RolloutRules, now: float, online: Iterable[str] = ()
) -> Rollout:
    """A rollout to `devices` with its cohorts: the ceilings of the shares, chosen by hash, the same at every call.

    Devices that are `online` are chosen first: a canary that is away tells nothing. Raises ValueError without a device.
    """
    there = frozenset(online)
    fleet = set(devices)
    if not fleet:
        raise ValueError(f"rollout of {release}: no device runs this model; wait until devices report")
    # Ten per cent of 10 is exactly 1, though 0.1 * 10 may come out a little above.
    cohorts = tuple(min(len(fleet), max(1, math.ceil(round(share * len(fleet), 9)))) for share in rules.steps)
    order = sorted(fleet, key=lambda device: (device not in there, sha256(f"{rollout_id}/{device}".encode()).digest()))
    return Rollout(rollout_id, release, tuple(order), cohorts, since=now)


def step(
    rollout: Rollout,
    event: Event,
    reason: str,
    rules: RolloutRules,
    now: float,
    fleet: Mapping[str, Outcome] | None = None,
) -> tuple[Rollout, tuple[Effect, ...]]:
    """The rollout after `event` and the effects to run; an event that means nothing in this phase changes nothing.

    `fleet`: how far each device is, for whom to tell next.
    """
    row = TABLE.get((rollout.phase, event))
    if row is None:
        return rollout, ()
    target, effects = row
    phase = target or rollout.paused_in or rollout.phase
    after = replace(rollout, phase=phase, since=rollout.since if phase is rollout.phase else now)
    if event not in (E.ROOM, E.SAMPLED):
        after = replace(after, reason=reason)
    watch_s = rules.watches[min(rollout.stage, len(rules.watches) - 1)]
    if event is E.CANARY_RUNNING:
        after = replace(after, watch_from=now, watch_until=now + watch_s, extended=0)
    elif event is E.TOO_LITTLE:
        after = replace(after, extended=rollout.extended + 1, watch_until=now + watch_s)
    elif event is E.STEP_PASSED:
        after = replace(after, stage=rollout.stage + 1, watch_from=0.0, watch_until=0.0, extended=0)
    elif phase is P.ROLLING and rollout.phase is not P.PAUSED:
        after = replace(after, stage=len(rollout.cohorts) - 1)
    elif event is E.PAUSE:
        after = replace(after, paused_in=rollout.phase)
    elif event is E.RESUME:
        # What the watch still had to go when it was paused, it has to go now.
        rest = max(0.0, rollout.watch_until - rollout.since) if phase is P.WATCHING else 0.0
        after = replace(after, paused_in=None, watch_until=now + rest if rest else rollout.watch_until)
    if event in (E.ALL_SETTLED, E.CAME_BACK):
        after = replace(after, left=_away(after, fleet or {}))
    if F.DESIRE in effects:
        told = dict.fromkeys(admitted(after, fleet or {}, rules, now), now)
        after = replace(after, told={**after.told, **told})
    return after, effects


def admitted(rollout: Rollout, fleet: Mapping[str, Outcome], rules: RolloutRules, now: float) -> tuple[str, ...]:
    """Who is told next: in the rollout's order, those in reach, as many as may be on their way at once.

    Who is away is told when he comes back, except a canary: the step waits for it, and its desired state waits at the
    broker. Who went away on its way counts as on its way for as long as an installation may take.
    """
    waiting = [device for device in rollout.reach if device not in rollout.told]
    if rollout.phase is not P.CANARY:
        waiting = [device for device in waiting if fleet.get(device) is not Outcome.OFFLINE]
    if rules.disruption_max <= 0:
        return tuple(waiting)
    busy = sum(
        fleet.get(device) is Outcome.ON_THE_WAY
        or (fleet.get(device, Outcome.OFFLINE) is Outcome.OFFLINE and now - at < rules.install_s_max)
        for device, at in rollout.told.items()
    )
    return tuple(waiting[: max(0, rules.disruption_max - busy)])


def observe(rollout: Rollout, seen: Observation, rules: RolloutRules, now: float) -> tuple[Event, str] | None:
    """The event that the observation amounts to in this phase, with its reason; None when there is nothing to do."""
    if rollout.phase is P.PENDING:
        names = ", ".join(rollout.canary[:5]) + (", ..." if len(rollout.canary) > 5 else "")
        return E.START, f"canary: {len(rollout.canary)} of {len(rollout.devices)} devices: {names}"
    if rollout.phase in (P.CANARY, P.WATCHING, P.ROLLING, P.HELD, P.PAUSED):
        failed = _too_many_failed(rollout, seen, rules)
        if failed is not None:
            return failed
    if (
        rollout.watch_from > 0
        and seen.judged.verdict is Verdict.WORSE
        and rollout.phase in (P.WATCHING, P.HELD, P.PAUSED)
    ):
        return E.WORSE, seen.judged.reason
    if rollout.phase in _GIVING and admitted(rollout, seen.outcomes, rules, now):
        return E.ROOM, "further devices may be on their way"
    if rollout.phase is P.CANARY:
        return _observe_canary(rollout, seen, rules, now)
    if rollout.phase is P.WATCHING:
        return _observe_watch(rollout, seen.judged, rules, now)
    if rollout.phase in (P.ROLLING, P.ABORTING):
        return _observe_settled(rollout, seen)
    if rollout.phase in ENDED and rollout.left:
        return _observe_left(rollout, seen)
    return None


def look_of(rollout: Rollout, now: float) -> int | None:
    """The number of the planned look that is due, from 0; None between them."""
    due = rollout.phase is P.WATCHING and now >= rollout.watch_until
    return rollout.extended if due else None


def _observe_watch(rollout: Rollout, judged: Judgement, rules: RolloutRules, now: float) -> tuple[Event, str] | None:
    planned = rules.canary.audits_planned
    if now < rollout.watch_until:
        if rollout.raised and judged.audited >= planned:
            return E.SAMPLED, f"{judged.audited} of {planned} planned audits are there"
        return None
    if judged.verdict is Verdict.FINE:
        last = rollout.stage + 2 >= len(rollout.cohorts)
        return (E.BETTER_OR_SAME if last else E.STEP_PASSED), judged.reason
    if rollout.extended < rules.extend_max:
        return E.TOO_LITTLE, f"inconclusive, watching longer: {judged.reason}"
    return E.UNDECIDED, f"inconclusive: promote or abort it by hand: {judged.reason}"


def _too_many_failed(rollout: Rollout, seen: Observation, rules: RolloutRules) -> tuple[Event, str] | None:
    failed = [device for device in rollout.given if seen.outcomes.get(device) is Outcome.FAILED]
    canary = frozenset(rollout.canary)
    of_canary = [device for device in failed if device in canary]
    if (
        len(of_canary) <= rules.canary_failed_fraction_max * len(canary)
        and len(failed) <= rules.failed_fraction_max * len(rollout.devices)
    ):  # fmt: skip
        return None
    first = (of_canary or failed)[0]
    return E.DEVICE_FAILED, f"{len(failed)} failed; {first}: {seen.reasons.get(first) or 'no reason given'}"


def _observe_canary(rollout: Rollout, seen: Observation, rules: RolloutRules, now: float) -> tuple[Event, str] | None:
    settled = (Outcome.RUNNING, Outcome.PINNED)
    outcomes = {device: seen.outcomes.get(device) for device in rollout.canary}
    # A failure that is not yet too many is not waited for: it does not run the release, and does not count as if it did.
    waiting = [name for name, found in outcomes.items() if found not in settled and found is not Outcome.FAILED]
    if not waiting and Outcome.RUNNING not in outcomes.values():
        return E.STALLED, f"every canary is pinned to another release: {', '.join(rollout.canary)}"
    if not waiting:
        running = [name for name, found in outcomes.items() if found is Outcome.RUNNING]
        return E.CANARY_RUNNING, f"{len(running)} of {len(rollout.canary)} canaries run {rollout.release}; watching"
    latest = max([rollout.since, *(rollout.told.get(device, 0.0) for device in waiting)])
    if now - latest > rules.install_s_max:
        return E.STALLED, f"{', '.join(waiting)} did not commit the release within {rules.install_s_max:.0f} s"
    return None


def _observe_settled(rollout: Rollout, seen: Observation) -> tuple[Event, str] | None:
    rolling = rollout.phase is P.ROLLING
    outcomes = [
        seen.outcomes.get(device, Outcome.OFFLINE) for device in (rollout.devices if rolling else rollout.given)
    ]
    untold = [name for name in rollout.devices if rolling and name not in rollout.told]
    if Outcome.ON_THE_WAY in outcomes or any(
        seen.outcomes.get(name, Outcome.OFFLINE) is not Outcome.OFFLINE for name in untold
    ):
        return None
    running = outcomes.count(Outcome.RUNNING)
    what = "run the release" if rollout.phase is P.ROLLING else "are back on the previous release"
    # A device that is off finds its retained desired state when it comes back, or is told then.
    return E.ALL_SETTLED, (
        f"{running}/{len(outcomes)} {what}, {outcomes.count(Outcome.OFFLINE)} offline, "
        f"{outcomes.count(Outcome.FAILED)} failed, {outcomes.count(Outcome.PINNED)} pinned"
        + (f"; {rollout.reason}" if rollout.phase is P.ABORTING else "")
    )


def _observe_left(rollout: Rollout, seen: Observation) -> tuple[Event, str] | None:
    """Those who were away at the end: each that has come back and got there is said once."""
    away = (Outcome.OFFLINE, Outcome.ON_THE_WAY, None)
    there = [name for name in rollout.left if name in rollout.told and seen.outcomes.get(name) not in away]
    if not there:
        return None
    said = [f"{name} {seen.outcomes[name].value}" for name in there]
    where = "with the release" if rollout.phase is P.DONE else "with the previous release"
    return E.CAME_BACK, f"back {where}: {', '.join(said)}; {len(rollout.left) - len(there)} are still away"


def _away(rollout: Rollout, fleet: Mapping[str, Outcome]) -> tuple[str, ...]:
    concerned = rollout.devices if rollout.phase is P.DONE else rollout.given
    away = (Outcome.OFFLINE, Outcome.ON_THE_WAY)
    return tuple(
        name for name in concerned if name not in rollout.told or fleet.get(name, Outcome.OFFLINE) in away
    )  # fmt: skip


def _upgraded(fields: dict[str, Any]) -> dict[str, Any]:
    """The form before there were steps: a canary and a phase said who had been told."""
    canary, phase = list(fields.pop("canary")), Phase(fields["phase"])
    rest = [device for device in fields["devices"] if device not in canary]
    wide = phase in (P.ROLLING, P.DONE)
    told = [] if phase in (P.PENDING, P.ABORTED) else [*canary, *(rest if wide or phase is P.ABORTING else [])]
    fields |= {"devices": [*canary, *rest], "cohorts": [len(canary), len(canary) + len(rest)], "stage": int(wide)}
    fields |= {"told": dict.fromkeys(told, fields["since"]), "paused_in": None, "raised": {}, "left": []}
    return fields
