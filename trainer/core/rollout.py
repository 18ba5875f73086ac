"""The life of a rollout, as a table: (phase, event) -> (phase, effects), and what turns observations into its events.

The coordinator saves the new state and what its effects ask for (desired states, the fate of samples) in one
transaction, so that a restart finds both or neither. Time is an argument. A canary passes on evidence only: too little of
it extends the watch, and then holds the rollout for a person.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from hashlib import sha256
from typing import Any


class Phase(StrEnum):
    """Where a rollout stands."""

    PENDING = "pending"
    CANARY = "canary"  # the canary devices are being given the release
    WATCHING = "watching"  # they run it, and are compared with the others
    ROLLING = "rolling"  # everybody is being given it
    DONE = "done"
    ABORTING = "aborting"  # everybody who was given it is being given the previous release
    ABORTED = "aborted"
    HELD = "held"  # waits for a person


class Event(StrEnum):
    """What happened to it."""

    START = "start"
    CANARY_RUNNING = "canary_running"  # every canary device committed the release
    DEVICE_FAILED = "device_failed"  # too many devices reverted or could not install it
    STALLED = "stalled"  # canary devices did not get there in time
    BETTER_OR_SAME = "better_or_same"
    WORSE = "worse"
    TOO_LITTLE = "too_little"  # evidence, and the watch may be extended
    UNDECIDED = "undecided"  # too little evidence, and no extension left
    ALL_SETTLED = "all_settled"  # no reachable device is still on its way
    ABORT = "abort"
    PROMOTE = "promote"  # a person says: go on


class Effect(StrEnum):
    """What to do about it; all idempotent."""

    DESIRE_CANARY = "desire_canary"
    DESIRE_ALL = "desire_all"
    RESTORE = "restore"  # previous release back to whoever was given this one
    CONFIRM = "confirm"  # the samples that trained it are used up
    GIVE_BACK = "give_back"  # the samples that trained it may train again
    ANNOUNCE = "announce"


P, E, F = Phase, Event, Effect

_BACK = (P.ABORTING, (F.RESTORE, F.ANNOUNCE))
_HOLD = (P.HELD, (F.ANNOUNCE,))
_GO = (P.ROLLING, (F.DESIRE_ALL, F.ANNOUNCE))

TABLE: dict[tuple[Phase, Event], tuple[Phase, tuple[Effect, ...]]] = {
    (P.PENDING, E.START): (P.CANARY, (F.DESIRE_CANARY, F.ANNOUNCE)),
    (P.PENDING, E.ABORT): (P.ABORTED, (F.GIVE_BACK, F.ANNOUNCE)),
    #
    (P.CANARY, E.CANARY_RUNNING): (P.WATCHING, (F.ANNOUNCE,)),
    (P.CANARY, E.DEVICE_FAILED): _BACK,
    (P.CANARY, E.STALLED): _HOLD,
    (P.CANARY, E.ABORT): _BACK,
    #
    (P.WATCHING, E.BETTER_OR_SAME): _GO,
    (P.WATCHING, E.WORSE): _BACK,
    (P.WATCHING, E.DEVICE_FAILED): _BACK,
    (P.WATCHING, E.TOO_LITTLE): (P.WATCHING, (F.ANNOUNCE,)),
    (P.WATCHING, E.UNDECIDED): _HOLD,
    (P.WATCHING, E.ABORT): _BACK,
    (P.WATCHING, E.PROMOTE): _GO,
    #
    (P.ROLLING, E.ALL_SETTLED): (P.DONE, (F.CONFIRM, F.ANNOUNCE)),
    (P.ROLLING, E.DEVICE_FAILED): _BACK,
    (P.ROLLING, E.ABORT): _BACK,
    #
    (P.HELD, E.PROMOTE): _GO,
    (P.HELD, E.DEVICE_FAILED): _BACK,
    (P.HELD, E.ABORT): _BACK,
    #
    (P.ABORTING, E.ALL_SETTLED): (P.ABORTED, (F.GIVE_BACK, F.ANNOUNCE)),
}

OPEN = frozenset(Phase) - {P.DONE, P.ABORTED}


@dataclass(frozen=True, slots=True)
class RolloutRules:
    """`items_min` items in each group are needed to judge; rates are shares of items, margins absolute."""

    canary_fraction: float = 0.1
    watch_s: float = 3600.0
    items_min: int = 100
    extend_max: int = 3  # how many times the watch may be made longer, each time by `watch_s`
    escalation_margin: float = 0.02
    error_margin: float = 0.01
    failed_fraction_max: float = 0.1  # of all devices, while rolling; one failed canary is always too many
    install_s_max: float = 3600.0  # for the canary devices to commit the release


@dataclass(frozen=True, slots=True)
class Rollout:
    """A rollout as it is stored. `devices` is the fleet at its start; times are seconds since the epoch."""

    id: str
    release: str
    devices: tuple[str, ...]
    canary: tuple[str, ...]
    phase: Phase = Phase.PENDING
    since: float = 0.0  # when this phase began
    watch_from: float = 0.0
    watch_until: float = 0.0
    extended: int = 0
    reason: str = ""

    @property
    def given(self) -> tuple[str, ...]:
        """The devices that have been told to run the release in this phase."""
        if self.phase in (P.PENDING, P.ABORTED):
            return ()
        return self.devices if self.phase in (P.ROLLING, P.DONE, P.ABORTING) else self.canary

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rollout:
        """The rollout that `to_dict` wrote."""
        fields = dict(values)
        fields["devices"], fields["canary"] = tuple(fields["devices"]), tuple(fields["canary"])
        fields["phase"] = Phase(fields["phase"])
        return cls(**fields)


class Outcome(StrEnum):
    """How far one device is with what it was told to run."""

    RUNNING = "running"
    ON_THE_WAY = "on_the_way"
    OFFLINE = "offline"  # on the way, and not reachable
    FAILED = "failed"
    PINNED = "pinned"  # a person keeps it on another release: it is waited for no more than it is counted


@dataclass(frozen=True, slots=True)
class Window:
    """What a group of devices did in the watch window, summed over closed metrics windows."""

    items: int = 0
    escalated: int = 0
    errors: int = 0


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything an event may be made of: each device's outcome, why devices failed, and the two groups' windows."""

    outcomes: Mapping[str, Outcome]
    reasons: Mapping[str, str]
    canary: Window
    control: Window


def begin(
    rollout_id: str, release: str, devices: Iterable[str], rules: RolloutRules, now: float, online: Iterable[str] = ()
) -> Rollout:
    """A rollout to `devices` with its canary: the ceiling of the fraction, chosen by hash, the same at every call.

    Devices that are `online` are chosen first: a canary that is away tells nothing. Raises ValueError without a device.
    """
    there = frozenset(online)
    fleet = tuple(sorted(set(devices)))
    if not fleet:
        raise ValueError(f"rollout of {release}: no device runs this model; wait until devices report")
    # Ten per cent of 10 is exactly 1, though 0.1 * 10 may come out a little above.
    count = min(len(fleet), max(1, math.ceil(round(rules.canary_fraction * len(fleet), 9))))
    order = sorted(fleet, key=lambda device: (device not in there, sha256(f"{rollout_id}/{device}".encode()).digest()))
    canary = order[:count]
    return Rollout(rollout_id, release, fleet, tuple(sorted(canary)), since=now)


def step(
    rollout: Rollout, event: Event, reason: str, rules: RolloutRules, now: float
) -> tuple[Rollout, tuple[Effect, ...]]:
    """The rollout after `event` and the effects to run; an event that means nothing in this phase changes nothing."""
    row = TABLE.get((rollout.phase, event))
    if row is None:
        return rollout, ()
    phase, effects = row
    after = replace(rollout, phase=phase, reason=reason, since=rollout.since if phase is rollout.phase else now)
    if event is E.CANARY_RUNNING:
        after = replace(after, watch_from=now, watch_until=now + rules.watch_s)
    elif event is E.TOO_LITTLE:
        after = replace(after, extended=rollout.extended + 1, watch_until=now + rules.watch_s)
    return after, effects


def observe(rollout: Rollout, seen: Observation, rules: RolloutRules, now: float) -> tuple[Event, str] | None:
    """The event that the observation amounts to in this phase, with its reason; None when there is nothing to do."""
    if rollout.phase is P.PENDING:
        return E.START, f"canary: {', '.join(rollout.canary)} of {len(rollout.devices)} devices"
    if rollout.phase in (P.CANARY, P.WATCHING, P.ROLLING, P.HELD):
        failed = [device for device in rollout.given if seen.outcomes.get(device) is Outcome.FAILED]
        of_canary = [device for device in failed if device in rollout.canary]
        if of_canary or len(failed) > rules.failed_fraction_max * len(rollout.devices):
            first = (of_canary or failed)[0]
            return E.DEVICE_FAILED, f"{len(failed)} failed; {first}: {seen.reasons.get(first) or 'no reason given'}"
    if rollout.phase is P.CANARY:
        return _observe_canary(rollout, seen, rules, now)
    if rollout.phase is P.WATCHING and now >= rollout.watch_until:
        return judge(seen.canary, seen.control, rollout.extended < rules.extend_max, rules)
    if rollout.phase in (P.ROLLING, P.ABORTING):
        return _observe_settled(rollout, seen)
    return None


def judge(canary: Window, control: Window, may_extend: bool, rules: RolloutRules) -> tuple[Event, str]:
    """The canary against the control group, from plain numbers: worse, not worse, or not enough to tell."""
    if canary.items < rules.items_min or control.items < rules.items_min:
        found = f"{canary.items} canary and {control.items} control items, {rules.items_min} of each are needed"
        if may_extend:
            return E.TOO_LITTLE, f"{found}: watching longer"
        return E.UNDECIDED, f"{found}: promote or abort it by hand"
    rates = {
        "escalation rate": (
            canary.escalated / canary.items,
            control.escalated / control.items,
            rules.escalation_margin,
        ),
        "error rate": (canary.errors / canary.items, control.errors / control.items, rules.error_margin),
    }
    for name, (new, old, margin) in rates.items():
        # Not `new > old + margin`: NaN must not pass.
        if not new <= old + margin:
            return E.WORSE, f"{name} {new:.3f} on the canary against {old:.3f} on the others, margin {margin}"
    new, old, _ = rates["escalation rate"]
    return E.BETTER_OR_SAME, (
        f"escalation rate {new:.3f} against {old:.3f} over {canary.items} and {control.items} items"
    )


def _observe_canary(rollout: Rollout, seen: Observation, rules: RolloutRules, now: float) -> tuple[Event, str] | None:
    settled = (Outcome.RUNNING, Outcome.PINNED)
    waiting = [device for device in rollout.canary if seen.outcomes.get(device) not in settled]
    if not waiting and not any(seen.outcomes.get(device) is Outcome.RUNNING for device in rollout.canary):
        return E.STALLED, f"every canary is pinned to another release: {', '.join(rollout.canary)}"
    if not waiting:
        return E.CANARY_RUNNING, f"{', '.join(rollout.canary)} run {rollout.release}; watching"
    if now - rollout.since > rules.install_s_max:
        return E.STALLED, f"{', '.join(waiting)} did not commit the release within {rules.install_s_max:.0f} s"
    return None


def _observe_settled(rollout: Rollout, seen: Observation) -> tuple[Event, str] | None:
    outcomes = [seen.outcomes.get(device, Outcome.OFFLINE) for device in rollout.devices]
    if Outcome.ON_THE_WAY in outcomes:
        return None
    running = outcomes.count(Outcome.RUNNING)
    what = "run the release" if rollout.phase is P.ROLLING else "are back on the previous release"
    # A device that is off finds its retained desired state when it comes back.
    return E.ALL_SETTLED, (
        f"{running}/{len(outcomes)} {what}, {outcomes.count(Outcome.OFFLINE)} offline, "
        f"{outcomes.count(Outcome.FAILED)} failed, {outcomes.count(Outcome.PINNED)} pinned"
        + (f"; {rollout.reason}" if rollout.phase is P.ABORTING else "")
    )
