"""The watch of a rollout: how the canaries compare so far, and how many more answers are checked for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from trainer.core.canary import Fleet, Judgement, Tally, judge
from trainer.core.rollout import Phase, Rollout, look_of
from trainer.fleet import desire, desired_of
from trainer.host import Host
from trainer.observed import Period, accepting, tallies

LOOKS_A_WATCH = 60  # as many as minutes of an hour
SURPLUS = 1.25  # of checked answers over those that are planned: some get no verdict
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
        return judge(found, rules.canary, look=look, watches=watches, extensions=rules.extend_max)

    def forget(self, rollout_id: str) -> None:
        """The rollout has ended."""
        self._looked.pop(rollout_id, None)
        self._before = {key: fleet for key, fleet in self._before.items() if key[0] != rollout_id}

    def _fleet(self, connection: Connection, row: Any, rollout: Rollout) -> Fleet:
        key = (rollout.id, rollout.stage)
        past = self._before.get(key)
        if past is None:
            past = self._before[key] = Fleet(before=self._past(connection, row, rollout))
        canary = frozenset(rollout.canary)
        others = [device for device in rollout.devices if device not in canary]
        mine = Period(row.model, rollout.watch_from, release=row.release)
        theirs = Period(row.model, rollout.watch_from, without=row.release)
        return Fleet(
            tallies(connection, rollout.canary, mine), tallies(connection, others, theirs), past.before
        )  # fmt: skip

    def _past(self, connection: Connection, row: Any, rollout: Rollout) -> dict[str, Tally]:
        """Each device with the release that it goes back to: one that was tried there in between says nothing of it."""
        start = row.created - self._host.config.rollout.baseline_s
        runs: dict[str, list[str]] = {}
        for device in rollout.devices:
            ref = row.previous.get(device)
            if ref is not None:
                runs.setdefault(ref["release"], []).append(device)
        found: dict[str, Tally] = {}
        for release, names in runs.items():
            found |= tallies(connection, names, Period(row.model, start, until=row.created, release=release))
        return found


def audit_more(host: Host, connection: Connection, row: Any, rollout: Rollout, start_from: Any) -> dict[str, Any]:
    """Have canaries and the others check as many answers as the watch plans; what was changed, for `audit_back`.

    Never fewer than they check now. `start_from(device)`: what a device runs, for one that was never told anything.
    """
    rules, raised = host.config.rollout.rules(), dict(rollout.raised)
    planned = rules.canary.audits_planned
    if planned <= 0:
        return raised
    watch_s = rules.watches[min(rollout.stage, len(rules.watches) - 1)]
    missing = planned - int(rollout.judged.get("audited", 0)) if rollout.extended else planned
    others = [device for device in rollout.devices if device not in frozenset(rollout.canary)]
    period = Period(row.model, row.created - host.config.rollout.baseline_s)
    for group in (rollout.canary, others):
        known = accepting(connection, group, period)
        for device, pipelines in _shares(known, max(missing, 1), watch_s).items():
            told = (desired_of(connection, device) or {}).get("policy", {})
            before = raised.get(device, {})
            changed = {
                name: {
                    "before": before.get(name, {}).get("before", told.get(name)),
                    "added": dict.fromkeys(KEYS, share),
                }
                for name, share in pipelines.items()
            }
            policy = {**told, **{name: {**told.get(name, {}), **each["added"]} for name, each in changed.items()}}
            desire(connection, device, policy=policy, start_from=start_from(device))
            raised[device] = {**before, **changed}
    return raised


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
