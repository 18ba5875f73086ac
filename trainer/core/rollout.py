"""The life of a rollout: its state, what turns observations into events, and what the table (`rollout_table`) makes of them.

The coordinator saves the new state and what its effects ask for (desired states, the fate of samples) in one
transaction, so that a restart finds both or neither. Time is an argument. A canary passes on evidence only: too little of
it extends the watch, and then holds the rollout for a person.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from hashlib import sha256
from typing import Any

from trainer.core.canary import Judgement, Verdict
from trainer.core.rollout_rules import RolloutRules as RolloutRules
from trainer.core.rollout_table import TABLE as TABLE
from trainer.core.rollout_table import Effect as Effect
from trainer.core.rollout_table import Event as Event
from trainer.core.rollout_table import Phase as Phase

NAMED_MAX = 20  # devices named in a reason
TOLD_MIN = 20  # failures are a share of those who were told, and of so many where fewer were told

P, E, F = Phase, Event, Effect


ENDED = frozenset({P.DONE, P.ABORTED})
OPEN = frozenset(Phase) - ENDED
# What became of the canary, by the event that said so, else by the phase; of all others it stays.
_RESULTS: dict[Phase | Event, str] = {
    E.BETTER_OR_SAME: "passed", E.PROMOTE: "promoted",
    P.HELD: "held", P.ABORTING: "aborting", P.ABORTED: "aborted",
}  # fmt: skip
_GIVING = frozenset({P.CANARY, P.ROLLING, P.DONE})  # who is in reach and has not been told may be told now


@dataclass(frozen=True, slots=True)
class Rollout:
    """A rollout as it is stored; times are seconds since the epoch.

    `devices` is the fleet at its start, in the order in which it is reached: the first `cohorts[n]` of them are step n.
    `told`: whom it was given to, and when. `raised`: device -> pipeline -> the policy that was told before, and what was
    added to it. `stalled`: who did not get there in time while rolling, and was said to. `left`: who was away at the end.
    `adapters`: device -> the adapter that it had on the model before, where a new model takes that off.
    `result`: what became of the canary; empty before that.
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
    stalled: tuple[str, ...] = ()
    planned: int = 0  # audits of canaries that this watch goes for; 0: as many as the rules say
    left: tuple[str, ...] = ()
    result: str = ""
    judged: Mapping[str, Any] = field(default_factory=dict)  # the last look at the canary, for people
    adapters: Mapping[str, Any] = field(default_factory=dict)
    part: str = (
        "models"  # what it changes of a device's desired state: the slot's model, or in `adapters` what is on it
    )

    @property
    def canary(self) -> tuple[str, ...]:
        """The devices that this step is judged by."""
        return self.canary_of(self.stage)

    def canary_of(self, stage: int) -> tuple[str, ...]:
        """The devices that a step is judged by, from 0."""
        return self.devices[: self.cohorts[min(stage, len(self.cohorts) - 2)]]

    @property
    def reach(self) -> tuple[str, ...]:
        """The devices that may have the release in this step."""
        return self.devices[: self.cohorts[self.stage]]

    @property
    def given(self) -> tuple[str, ...]:
        """The devices that have been told to run the release."""
        return tuple(device for device in self.devices if device in self.told)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back. Not copied to its depths: a fleet may have 100 000 devices."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rollout:
        """The rollout that `to_dict` wrote; raises TypeError or KeyError for another form."""
        given = dict(values)
        if "cohorts" not in given:
            given = _upgraded(given)
        for name in ("devices", "cohorts", "left", "stalled"):
            given[name] = tuple(given.get(name, ()))
        given["phase"] = Phase(given["phase"])
        given["paused_in"] = Phase(given["paused_in"]) if given["paused_in"] else None
        return cls(**given)


class Outcome(StrEnum):
    """How far one device is with what it was told to run."""

    RUNNING = "running"
    ON_THE_WAY = "on_the_way"
    OFFLINE = "offline"  # on the way, and not reachable
    FAILED = "failed"
    PINNED = "pinned"  # a person keeps it on another release: it is waited for no more than it is counted
    GONE = "gone"  # removed, or its certificate is revoked: the same


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
    if target is None and phase is not P.WATCHING:
        effects = tuple(each for each in effects if each is not F.AUDIT_MORE)
    after = replace(rollout, phase=phase, since=rollout.since if phase is rollout.phase else now)
    after = replace(after, result=_RESULTS.get(event, _RESULTS.get(phase, after.result)))
    if event not in (E.ROOM, E.SAMPLED, E.JOINED, E.CAME_BACK):  # why it ended as it did stays
        after = replace(after, reason=reason)
    watch_s = rules.watches[min(rollout.stage, len(rules.watches) - 1)]
    if event is E.CANARY_RUNNING:
        after = replace(after, watch_from=now, watch_until=now + watch_s, extended=0, judged={})
    elif event is E.TOO_LITTLE:
        after = replace(after, extended=rollout.extended + 1, watch_until=now + watch_s)
    elif event is E.STEP_PASSED:
        after = replace(after, stage=rollout.stage + 1, watch_from=0.0, watch_until=0.0, extended=0)
    elif event is E.LAGGING:
        after = replace(after, stalled=_stalled(rollout, fleet or {}, rules, now))
    elif phase is P.ROLLING and rollout.phase is not P.PAUSED:
        after = replace(after, stage=len(rollout.cohorts) - 1)
    elif event is E.PAUSE:
        after = replace(after, paused_in=rollout.phase)
    elif event is E.RESUME and rollout.phase is P.HELD:
        after = replace(after, watch_from=0.0, watch_until=0.0, extended=0, result="")
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


def join(rollout: Rollout, names: Iterable[str]) -> Rollout:
    """The rollout, which is over, with devices that came later at the end of its order: each is told as who was away is."""
    new = tuple(name for name in names if name not in frozenset(rollout.devices))
    cohorts = (*rollout.cohorts[:-1], len(rollout.devices) + len(new))
    return replace(rollout, devices=rollout.devices + new, cohorts=cohorts, left=rollout.left + new)


def admitted(rollout: Rollout, fleet: Mapping[str, Outcome], rules: RolloutRules, now: float) -> tuple[str, ...]:
    """Who is told next: in the rollout's order, those in reach, as many as may be on their way at once.

    Who is away is told when he comes back, except a canary: the step waits for it, and its desired state waits at the
    broker. Who is on its way, or went away on it, counts for as long as an installation may take.
    """
    waiting = [name for name in rollout.reach if name not in rollout.told and fleet.get(name) is not Outcome.GONE]
    if rollout.phase is not P.CANARY:
        waiting = [device for device in waiting if fleet.get(device) is not Outcome.OFFLINE]
    if rules.disruption_max <= 0:
        return tuple(waiting)
    underway = (Outcome.ON_THE_WAY, Outcome.OFFLINE)
    busy = sum(
        fleet.get(device, Outcome.OFFLINE) in underway and now - at < rules.install_s_max
        for device, at in rollout.told.items()
    )
    return tuple(waiting[: max(0, rules.disruption_max - busy)])


def observe(rollout: Rollout, seen: Observation, rules: RolloutRules, now: float) -> tuple[Event, str] | None:
    """The event that the observation amounts to in this phase, with its reason; None when there is nothing to do."""
    if rollout.phase is P.PENDING:
        return E.START, f"canary: {len(rollout.canary)} of {len(rollout.devices)} devices: {_named(rollout.canary, 5)}"
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
        return _observe_settled(rollout, seen, rules, now)
    if rollout.phase is P.PAUSED and rollout.raised:  # by a version that did not take it back at the pause
        return E.SAMPLED, "no watch goes on"
    if rollout.phase in ENDED and rollout.left:
        return _observe_left(rollout, seen)
    return None


def look_of(rollout: Rollout, now: float) -> int | None:
    """The number of the planned look that is due, from 0; None between them."""
    due = rollout.phase is P.WATCHING and now >= rollout.watch_until
    return rollout.extended if due else None


def _observe_watch(rollout: Rollout, judged: Judgement, rules: RolloutRules, now: float) -> tuple[Event, str] | None:
    planned = max(rules.canary.audits_planned, rollout.planned)
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
        and len(failed) <= rules.failed_fraction_max * min(len(rollout.devices), max(len(rollout.told), TOLD_MIN))
    ):  # fmt: skip
        return None
    first = (of_canary or failed)[0]
    return E.DEVICE_FAILED, f"{len(failed)} failed; {first}: {seen.reasons.get(first) or 'no reason given'}"


def _observe_canary(rollout: Rollout, seen: Observation, rules: RolloutRules, now: float) -> tuple[Event, str] | None:
    settled = (Outcome.RUNNING, Outcome.PINNED, Outcome.GONE)
    outcomes = {device: seen.outcomes.get(device) for device in rollout.canary}
    # A failure that is not yet too many is not waited for: it does not run the release, and does not count as if it did.
    waiting = [name for name, found in outcomes.items() if found not in settled and found is not Outcome.FAILED]
    if not waiting and Outcome.RUNNING not in outcomes.values():
        return E.STALLED, f"every canary is removed or pinned to another release: {_named(rollout.canary)}"
    if not waiting:
        running = [name for name, found in outcomes.items() if found is Outcome.RUNNING]
        return E.CANARY_RUNNING, f"{len(running)} of {len(rollout.canary)} canaries run {rollout.release}; watching"
    latest = max([rollout.since, *(rollout.told.get(device, 0.0) for device in waiting)])
    if now - latest > rules.install_s_max:
        if len(waiting) <= rules.canary_failed_fraction_max * len(rollout.canary):
            # Of thousands somebody is always away; who runs it is enough to judge it by.
            count = sum(found is Outcome.RUNNING for found in outcomes.values())
            return E.CANARY_RUNNING, (
                f"{count} of {len(rollout.canary)} canaries run {rollout.release}, {len(waiting)} did not commit it "
                f"within {rules.install_s_max:.0f} s; watching"
            )
        return E.STALLED, f"{_named(waiting)} did not commit the release within {rules.install_s_max:.0f} s"
    return None


def _observe_settled(rollout: Rollout, seen: Observation, rules: RolloutRules, now: float) -> tuple[Event, str] | None:
    rolling = rollout.phase is P.ROLLING
    outcomes = [
        seen.outcomes.get(device, Outcome.OFFLINE) for device in (rollout.devices if rolling else rollout.given)
    ]
    untold = [name for name in rollout.devices if rolling and name not in rollout.told]
    stalled = _stalled(rollout, seen.outcomes, rules, now)
    if outcomes.count(Outcome.ON_THE_WAY) > len(stalled) or any(
        seen.outcomes.get(name, Outcome.OFFLINE) not in (Outcome.OFFLINE, Outcome.GONE) for name in untold
    ):
        if rolling and not frozenset(stalled) <= frozenset(rollout.stalled):
            return E.LAGGING, f"{_too_late(stalled, rules)}: waited for no longer; the others go on"
        return None
    running = outcomes.count(Outcome.RUNNING)
    what = "run the release" if rollout.phase is P.ROLLING else "are back on the previous release"
    # A device that is off finds its retained desired state when it comes back, or is told then.
    return E.ALL_SETTLED, (
        f"{running}/{len(outcomes)} {what}, {outcomes.count(Outcome.OFFLINE)} offline, "
        f"{outcomes.count(Outcome.FAILED)} failed, {outcomes.count(Outcome.PINNED)} pinned"
        + (f", {outcomes.count(Outcome.GONE)} removed" if Outcome.GONE in outcomes else "")
        + (f"; {_too_late(stalled, rules)}" if stalled else "")
        + (f"; {rollout.reason}" if rollout.phase is P.ABORTING else "")
    )


def _observe_left(rollout: Rollout, seen: Observation) -> tuple[Event, str] | None:
    """Those who were away at the end: each that has come back and got there, or will never, is said once."""
    away = (Outcome.OFFLINE, Outcome.ON_THE_WAY, None)
    there = [
        name
        for name in rollout.left
        if seen.outcomes.get(name) is Outcome.GONE or (name in rollout.told and seen.outcomes.get(name) not in away)
    ]
    if not there:
        return None
    said = [f"{name} {seen.outcomes[name].value}" for name in there]
    where = "with the release" if rollout.phase is P.DONE else "with the previous release"
    return E.CAME_BACK, f"back {where}: {_named(said)}; {len(rollout.left) - len(there)} are still away"


def _stalled(rollout: Rollout, fleet: Mapping[str, Outcome], rules: RolloutRules, now: float) -> tuple[str, ...]:
    """Who was told longer ago than an installation may take, and is there and still on the way."""
    back = rollout.phase is P.ABORTING
    return tuple(
        name
        for name, at in rollout.told.items()
        if fleet.get(name) is Outcome.ON_THE_WAY and now - (rollout.since if back else at) > rules.install_s_max
    )


def _too_late(names: Sequence[str], rules: RolloutRules) -> str:
    return f"{len(names)} did not get there within {rules.install_s_max:.0f} s: {_named(names)}"


def _named(names: Sequence[str], shown: int = NAMED_MAX) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def _away(rollout: Rollout, fleet: Mapping[str, Outcome]) -> tuple[str, ...]:
    concerned = rollout.devices if rollout.phase is P.DONE else rollout.given
    away = (Outcome.OFFLINE, Outcome.ON_THE_WAY)
    return tuple(
        name
        for name in concerned
        if fleet.get(name) is not Outcome.GONE
        and (name not in rollout.told or fleet.get(name, Outcome.OFFLINE) in away)
    )


def _upgraded(fields: dict[str, Any]) -> dict[str, Any]:
    """The form before there were steps: a canary and a phase said who had been told."""
    canary, phase = list(fields.pop("canary")), Phase(fields["phase"])
    rest = [device for device in fields["devices"] if device not in canary]
    wide = phase in (P.ROLLING, P.DONE)
    told = [] if phase in (P.PENDING, P.ABORTED) else [*canary, *(rest if wide or phase is P.ABORTING else [])]
    fields |= {"devices": [*canary, *rest], "cohorts": [len(canary), len(canary) + len(rest)], "stage": int(wide)}
    fields |= {"told": dict.fromkeys(told, fields["since"]), "paused_in": None, "raised": {}, "left": []}
    return fields
