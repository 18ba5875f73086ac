"""Telling a server of a release: what is said, what its answer means, when to try again. Pure: time and chance are
arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edged.wire.manifest import ReleaseId

State = Literal["waiting", "done", "refused", "gave_up", "skipped", "withdrawn", "revoking", "revoked", "still_there"]
WAITING: State = "waiting"

PLACEHOLDERS = (
    "release", "name", "version", "kind", "engine", "base", "role", "file", "path", "bytes", "sha256", "url",
    "release_sha256", "files",
)  # fmt: skip
REASON = "reason"  # one more, of a revocation: why
_PLACEHOLDER = re.compile(r"\{([a-z_0-9]*)\}")
# Statuses that a server may answer today and not tomorrow, beside 500 and above (RFC 9110; 425: RFC 8470; 429: RFC 6585).
PASSING = frozenset({408, 425, 429})
CONFLICT = 409  # it knows this release already


@dataclass(frozen=True, slots=True)
class Aim:
    """What a server is asked for: the state of a row while it is, and what it becomes. `also`: statuses that are as good
    as 2xx; `passing`: those that say "not now", beside 500 and above."""

    asked: State
    done: State
    refused: State
    gave_up: State
    also: frozenset[int]
    passing: frozenset[int] = PASSING


TELL = Aim("waiting", "done", "refused", "gave_up", frozenset({CONFLICT}))
# 404 and 410: it does not have it; 409: it is in use, say.
REVOKE = Aim("revoking", "revoked", "still_there", "still_there", frozenset({404, 410}), PASSING | {CONFLICT})
AIMS = {aim.asked: aim for aim in (TELL, REVOKE)}


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a server that does not answer is tried: after `first_s`, then twice as long each time up to `longest_s`,
    `tries_max` times in all."""

    first_s: float = 5.0
    longest_s: float = 3600.0
    tries_max: int = 40


@dataclass(frozen=True, slots=True)
class Told:
    """What a try has come to: the state, when to try again (where that is its aim's `asked`), and why, for people."""

    state: State
    due: float = 0.0
    error: str = ""


def unknown_placeholders(template: Any, known: Iterable[str] = PLACEHOLDERS) -> list[str]:
    """The placeholders of a body's template that mean nothing, in order."""
    return sorted({name for text in _texts(template) for name in _PLACEHOLDER.findall(text)} - set(known))


def _texts(template: Any) -> Iterable[str]:
    if isinstance(template, str):
        yield template
    elif isinstance(template, dict):
        for value in template.values():
            yield from _texts(value)
    elif isinstance(template, list):
        for value in template:
            yield from _texts(value)


def render(template: Any, values: Mapping[str, Any]) -> Any:
    """The template with its placeholders filled in. A text that is one placeholder and nothing else becomes the value
    itself: `"{bytes}"` is a number, `"{files}"` a table."""
    if isinstance(template, dict):
        return {key: render(value, values) for key, value in template.items()}
    if isinstance(template, list):
        return [render(value, values) for value in template]
    if not isinstance(template, str):
        return template
    alone = _PLACEHOLDER.fullmatch(template)
    return values[alone[1]] if alone else _PLACEHOLDER.sub(lambda found: str(values[found[1]]), template)


def answered(
    status: int, said: str, tries: int, pace: Pace, now: float, draw: float, retry_after: str = "", aim: Aim = TELL
) -> Told:
    """What an answer with this status means after `tries` tries (this one included). `draw`: an even chance from 0 to 1;
    `retry_after`: the header, in seconds (a date is not understood, and the usual pause holds)."""
    if 200 <= status < 300 or status in aim.also:
        return Told(aim.done)
    text = f"it answered {status}" + (f": {said}" if said else "")
    if status >= 500 or status in aim.passing:
        asked_s = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0
        return unanswered(text, tries, pace, now, draw, asked_s, aim)
    return Told(aim.refused, error=text)


def unanswered(
    error: str, tries: int, pace: Pace, now: float, draw: float, at_least_s: float = 0.0, aim: Aim = TELL
) -> Told:
    """What a try without a usable answer means; `at_least_s` is the pause that the server asked for."""
    if tries >= pace.tries_max:
        return Told(aim.gave_up, error=f"{error}; given up after {tries} tries")
    longest = min(pace.longest_s, pace.first_s * 2.0 ** min(tries - 1, 32))
    # Up to a quarter less, so that many releases are not sent at one moment to a server that has just come back.
    return Told(aim.asked, now + max(longest * (1.0 - draw / 4), min(at_least_s, pace.longest_s)), error)


def is_due(due: float, pace: Pace, now: float) -> bool:
    """Whether it is time. No pause is longer than `longest_s`: what seems to be was made by a clock that was set back."""
    return due <= now or due > now + pace.longest_s


def first_states(found: Iterable[str], known: Iterable[str]) -> dict[str, State]:
    """The states in which releases (`name@version`) begin that a server was not told of yet.

    A server that knows none (it has just been configured) is told of the newest of each name: older ones are `skipped`,
    and can be sent by hand. After that it is told of each.
    """
    old, new = set(known), sorted({*found} - {*known}, key=ReleaseId)
    if old:
        return dict.fromkeys(new, WAITING)
    newest = {ReleaseId(each).name: each for each in new}
    return {each: WAITING if newest[ReleaseId(each).name] == each else "skipped" for each in new}


def reached_all(adapter: str, base: str, slots: Iterable[Mapping[str, Any]]) -> bool:
    """Whether an adapter runs on the whole fleet: in every slot that runs its base, and in one at least. A slot that a
    person keeps on another adapter is passed by, as rollouts pass by a pinned model.

    `slots`: what the devices reported last (as `edged.wire.messages.ModelReport`), those that are offline too.
    """
    pins = (adapter, None)
    running = [
        slot.get("adapter") for slot in slots if slot.get("active") == base and slot.get("adapter_pinned") in pins
    ]
    return bool(running) and all(each == adapter for each in running)


def revocation(state: str, *, sent: bool, told_of_revocations: bool) -> State | None:
    """What a row becomes because its release was revoked; None: it stays. `sent`: the server may have heard of the release;
    `told_of_revocations`: its configuration says how."""
    if state == "done":
        return "revoking" if told_of_revocations else "still_there"
    if state in ("waiting", "refused", "gave_up") and sent and told_of_revocations:
        return "revoking"  # an answer that did not come says nothing about what the server did
    return "withdrawn" if state == "waiting" else None
