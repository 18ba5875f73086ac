"""Which events people are told of, when, and how often: never more messages an hour than they can read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

HOUR_S = 3600.0
PAUSE_S_MAX = 3600.0
SUMMED_LINES_MAX = 30  # of a message that stands for many
TITLE_MAX = 120

Level = Literal["info", "success", "warning", "failure"]
_ENDINGS: dict[str, Level] = {
    "failed": "failure", "refused": "warning", "rolled_back": "warning", "aborting": "warning", "aborted": "warning",
    "held": "warning", "expires": "warning", "not_renewed": "failure", "unjudged": "warning", "completed": "success",
    "done": "success", "drift": "warning",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Waiting:
    """A message on its way."""

    id: str
    title: str
    text: str
    level: Level = "info"


@dataclass(frozen=True, slots=True)
class Message:
    """What is sent now; it stands for these."""

    title: str
    text: str
    level: Level
    ids: tuple[str, ...]


def wanted(kinds: Iterable[str], kind: str) -> bool:
    """Whether people are told of events of this kind; `*` at the beginning or the end of a pattern stands for anything."""
    # `*` alone means every event of the trainer: what devices call theirs is their own affair.
    return any(
        _fits(pattern, kind) for pattern in kinds if pattern.startswith("device:") or not kind.startswith("device:")
    )


def _fits(pattern: str, kind: str) -> bool:
    if pattern.endswith("*"):
        return kind.startswith(pattern[:-1])
    return kind.endswith(pattern[1:]) if pattern.startswith("*") else kind == pattern


def level(kind: str, said: str = "") -> Level:
    """How bad an event is: what a notice says of itself, else by the end of its kind."""
    told: dict[str, Level] = {"info": "info", "warning": "warning", "error": "failure"}
    if said in told:
        return told[said]
    return next((found for ending, found in _ENDINGS.items() if kind.endswith(ending)), "info")


def plan(waiting: Sequence[Waiting], sent_last_hour: int, per_hour: int) -> list[Message]:
    """What may be sent now, oldest first: each by itself as long as there is room in this hour for all, else the last
    message that there is room for stands for all the rest."""
    room = per_hour - sent_last_hour
    if room <= 0 or not waiting:
        return []
    alone = len(waiting) if len(waiting) <= room else room - 1
    found = [Message(each.title, each.text, each.level, (each.id,)) for each in waiting[:alone]]
    if rest := waiting[alone:]:
        lines = [each.text for each in rest[:SUMMED_LINES_MAX]]
        if len(rest) > len(lines):
            lines.append(f"and {len(rest) - len(lines)} more: `trainer jobs`, `trainer rollout status`")
        order: tuple[Level, ...] = ("failure", "warning", "info", "success")
        worst = min((each.level for each in rest), key=order.index)
        found.append(Message(f"{len(rest)} events", "\n".join(lines), worst, tuple(each.id for each in rest)))
    return found


def pause_s(tries: int, first_s: float) -> float:
    """How long to wait after so many failures, at least one."""
    return float(min(first_s * 2.0 ** min(tries - 1, 30), PAUSE_S_MAX))
