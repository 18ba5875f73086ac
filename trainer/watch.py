"""The watch of a rollout: how the canaries compare so far, and how many more answers are checked for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, func, select

from trainer.core.canary import Fleet, Judgement, Tally, Verdict, judge
from trainer.core.planning import audits_needed
from trainer.core.rollout import Phase, Rollout, look_of
from trainer.database import parts, windows
from trainer.fleet import desire, desired_of
from trainer.host import Host
from trainer.live import confidence_min
from trainer.observed import Period, accepting, tallies
from trainer.removed import removed_names

LOOKS_A_WATCH = 60  # as many as minutes of an hour
SURPLUS = 1.25  # of checked answers over those that are planned: some get no verdict
COMPARED_MAX = 1000  # canaries, and as many others: the first of the rollout's order, which is by chance
CLOCK_S = 300.0  # a device's clock may be ahead of ours by so much
CLOCKS_SHOWN = 5
KEYS = ("audit_share", "empty_share")  # of a pipeline's policy


class Watch:
    """Looks at open watches; what it remembers is what the database would say again."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._looked: dict[str, float] = {}  # rollout -> when it was last looked at
        self._before: dict[tuple[str, int], Fleet] = {}  # (rollout, stage) -> the time before the rollout

    def judged(self, connection: Connection, row: Any, rollout: Rollout) -> Judgement | None:
        """How the canaries compare, when a look is due; None when not."""
        now, config = self._host.now(), self._host.config.rollout
        if rollout.watch_from <= 0 or rollout.phase not in (Phase.WATCHING, Phase.HELD, Phase.PAUSED):
            return None
        look, every = look_of(rollout, now), max(rollout.watch_until - rollout.watch_from, 0.0) / LOOKS_A_WATCH
        last = self._looked.get(rollout.id)
        if look is None and last is not None and 0 <= now - last < every:
            return None
        self._looked[rollout.id] = now
        rules = config.rules()
        watches = len(rules.watches)
        found = self._fleet(connection, row, rollout)
        judged = judge(found, rules.canary, look=look, watches=watches, extensions=rules.extend_max)
        if look is None or judged.verdict is not Verdict.UNSURE:
            return judged
        return replace(judged, reason="; ".join([judged.reason, *clocks_off(connection, row, rollout, now)]))

    def forget(self, rollout_id: str) -> None:
        """The rollout has ended."""
        self._looked.pop(rollout_id, None)
        self._before = {key: fleet for key, fleet in self._before.items() if key[0] != rollout_id}

    def _fleet(self, connection: Connection, row: Any, rollout: Rollout) -> Fleet:
        key = (rollout.id, rollout.stage)
        past = self._before.get(key)
        if past is None:
            past = self._before[key] = Fleet(before=self._past(connection, row, rollout))
        ours, others = compared(connection, rollout)
        names = names_of(self._host, row, rollout)
        floor = confidence_min(self._host.config, f"{row.model}@0")
        mine = Period(row.model, rollout.watch_from, release=row.release, others=names, confidence_min=floor)
        theirs = Period(row.model, rollout.watch_from, without=row.release, others=names, confidence_min=floor)
        return Fleet(
            tallies(connection, ours, mine), tallies(connection, others, theirs), past.before
        )  # fmt: skip

    def _past(self, connection: Connection, row: Any, rollout: Rollout) -> dict[str, Tally]:
        """Each device with the release that it goes back to: one that was tried there in between says nothing of it."""
        start = row.created - self._host.config.rollout.baseline_s
        runs: dict[str, list[str]] = {}
        for device in (name for group in compared(connection, rollout) for name in group):
            ref = rollout.adapters.get(device) or row.previous.get(device)
            bare = base_of(self._host, row, rollout)
            if ref is not None or bare is not None:
                runs.setdefault(ref["release"] if ref is not None else str(bare), []).append(device)
        found: dict[str, Tally] = {}
        for release, devices in runs.items():
            period = Period(
                row.model, start, until=row.created, release=release, others=names_of(self._host, row, rollout),
                confidence_min=confidence_min(self._host.config, f"{row.model}@0"),
            )  # fmt: skip
            found |= tallies(connection, devices, period)
        return found


def clocks_off(connection: Connection, row: Any, rollout: Rollout, now: float) -> list[str]:
    """What is said of canaries whose windows with the release count for nothing, because by their own clocks they are from
    before the watch or from the future."""
    ours = compared(connection, rollout)[0]
    found: list[Any] = []
    newest = func.max(windows.c.end).label("end")
    for some in parts(ours):
        query = select(windows.c.device, newest).where(windows.c.device.in_(some), windows.c.release == row.release)
        found += connection.execute(query.group_by(windows.c.device).order_by(windows.c.device)).all()
    off = [each for each in found if each.end < rollout.watch_from or each.end > now + CLOCK_S]
    said = [
        f"the newest window of {each.device} ended {abs(now - each.end):.0f} s {'ago' if each.end < now else 'from now'} "
        "by its own clock: is that right?"
        for each in off[:CLOCKS_SHOWN]
    ]
    return [*said, *([f"and of {len(off) - len(said)} more"] if len(off) > len(said) else [])]


def base_of(host: Host, row: Any, rollout: Rollout) -> str | None:
    """The release that an adapter goes onto; None for a whole model."""
    base = host.registry.get(row.release).manifest.base
    return base.release if base is not None and rollout.part == "adapters" else None


def names_of(host: Host, row: Any, rollout: Rollout) -> tuple[str, ...]:
    """Under which names a slot answers, besides its own: of an adapter its own, its base's, and those of adapters before; of
    a model those of the adapters that it takes off."""
    base = base_of(host, row, rollout)
    if base is None:
        return tuple(sorted({str(ref["release"]).partition("@")[0] for ref in rollout.adapters.values()}))
    before = (ref["release"] for ref in row.previous.values() if ref is not None)
    return tuple(sorted({release.partition("@")[0] for release in (row.release, base, *before)}))


def compared(connection: Connection, rollout: Rollout) -> tuple[Sequence[str], Sequence[str]]:
    """(the canaries, the others) whose figures are compared, without removed devices; what devices decide themselves,
    reverts, counts of all."""
    canaries, out = len(rollout.canary), removed_names(connection)
    both = rollout.canary[:COMPARED_MAX], rollout.devices[canaries : canaries + COMPARED_MAX]
    ours, others = ([name for name in group if name not in out] if out else group for group in both)
    return ours, others


def audit_more(
    host: Host, connection: Connection, row: Any, rollout: Rollout, start_from: Any
) -> tuple[dict[str, Any], int]:
    """Have canaries and the others check as many answers as the watch plans; what was changed, for `audit_back`, and how
    many of the canaries that is. An extension plans as many again.

    Never fewer than they were told to check, or checked in the baseline. `start_from(device)`: what a device runs, for one
    that was never told anything.
    """
    rules, raised = host.config.rollout.rules(), dict(rollout.raised)
    ours, others = compared(connection, rollout)
    period = Period(row.model, row.created - host.config.rollout.baseline_s, others=names_of(host, row, rollout))
    needed = audits_needed(
        rules.canary, len(ours), len(others), _audited_before(accepting(connection, ours, period), len(ours)),
        watches=len(rules.watches), extensions=rules.extend_max,
    )  # fmt: skip
    if needed <= 0:
        return raised, 0
    watch_s = rules.watches[min(rollout.stage, len(rules.watches) - 1)]
    planned = needed * (1 + rollout.extended)
    missing = planned - int(rollout.judged.get("audited", 0))
    if missing <= 0:
        return raised, planned
    for group in (ours, others):
        known = accepting(connection, group, period)
        for device, pipelines in _shares(known, missing, watch_s).items():
            told = (desired_of(connection, device) or {}).get("policy", {})
            before = raised.get(device, {})
            changed = {
                name: {
                    "before": before.get(name, {}).get("before", told.get(name)),
                    "added": {key: max(told.get(name, {}).get(key, 0.0), share) for key in KEYS},
                }
                for name, share in pipelines.items()
            }
            policy = {**told, **{name: {**told.get(name, {}), **each["added"]} for name, each in changed.items()}}
            desire(connection, device, policy=policy, start_from=start_from(device))
            raised[device] = {**before, **changed}
    return raised, planned


def _audited_before(known: Mapping[str, Mapping[str, tuple[int, int, float]]], devices: int) -> float:
    """Audited answers of a device in its baseline, the mean."""
    audited = sum(each[1] for pipelines in known.values() for each in pipelines.values())
    return audited / max(devices, 1)


def audit_back(connection: Connection, raised: Mapping[str, Any]) -> None:
    """Take back what `audit_more` changed, where nobody has changed it since."""
    for device, pipelines in raised.items():
        told = dict((desired_of(connection, device) or {}).get("policy", {}))
        for name, change in pipelines.items():
            now, before = dict(told.get(name) or {}), change["before"] or {}
            for key, value in change["added"].items():
                if now.get(key) == value:
                    now.pop(key)
                    now |= {key: before[key]} if key in before else {}
            told[name] = now
            if not now and change["before"] is None:
                told.pop(name)
        desire(connection, device, policy=told)


def _shares(
    known: Mapping[str, Mapping[str, Sequence[float]]], missing: int, watch_s: float
) -> dict[str, dict[str, float]]:
    """device -> pipeline -> the share of accepted answers to check, so that together they come to `missing` in a watch."""
    rates = {
        (device, name): accepted / seconds
        for device, pipelines in known.items()
        for name, (accepted, _, seconds) in pipelines.items()
        if seconds > 0
    }
    expected = sum(rates.values()) * watch_s
    share = round(min(1.0, SURPLUS * missing / expected), 4) if expected > 0 else 1.0
    found: dict[str, dict[str, float]] = {}
    for device, name in rates:
        accepted, audited, _ = known[device][name]
        if share > (audited / accepted if accepted else 0.0):
            found.setdefault(device, {})[name] = share
    return found
