"""What is alike is not said without end: of log lines the first ones of each minute are written, then how many more there
were; of what is tried again and again each reason is said once. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

ALIKE_MAX = 10  # alike lines that are written in one period
PERIOD_S = 60.0
KINDS_MAX = 256  # kinds of lines that are counted at a time; the longest unseen is forgotten first

_VARIES = re.compile(r"0x[0-9a-fA-F]+|[0-9a-fA-F]{8,}|\d+")


def kind(text: str) -> str:
    """What alike lines have in common: everything but numbers, addresses and ids."""
    return _VARIES.sub("#", text[:500])


@dataclass(slots=True)
class _Run:
    since: float
    written: int = 0
    held_back: int = 0
    last: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """So many lines like `last` were not written."""

    key: tuple[str, int, str]
    count: int
    last: str


class Repeats:
    """Counts alike lines. Time is an argument, in seconds of any clock that does not jump back."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, int, str], _Run] = {}

    def admit(self, key: tuple[str, int, str], text: str, now: float) -> bool:
        """Whether a line is written; `key` is (logger, level, kind)."""
        run = self._runs.pop(key, None) or _Run(now)
        self._runs[key] = run  # at the end: the longest unseen stands first
        if run.written < ALIKE_MAX:
            run.written += 1
            return True
        run.held_back, run.last = run.held_back + 1, text
        return False

    def due(self, now: float, *, all_of_them: bool = False) -> list[Summary]:
        """Ends the periods that are over, and forgets what is too many; what was held back in them."""
        over = [key for key, run in self._runs.items() if all_of_them or now - run.since >= PERIOD_S]
        over += [key for key in list(self._runs)[: max(0, len(self._runs) - KINDS_MAX)] if key not in over]
        ended = [(key, self._runs.pop(key)) for key in over]
        return [Summary(key, run.held_back, run.last) for key, run in ended if run.held_back]

    def holds_back(self) -> bool:
        """Whether there is something to sum up later."""
        return any(run.held_back for run in self._runs.values())


class Told:
    """Remembers what was said of whom; at most KINDS_MAX kinds of each, then all of them are said again."""

    def __init__(self) -> None:
        self._said: dict[str, set[str]] = {}

    def again(self, who: str, text: str) -> bool:
        """Whether the like of this was said of `who` before; from now on it was."""
        said, alike = self._said.setdefault(who, set()), kind(text)
        if alike in said:
            return True
        if len(said) >= KINDS_MAX:
            said.clear()
        said.add(alike)
        return False

    def forget(self, who: str) -> None:
        """Something new begins for `who`: everything about it is said."""
        self._said.pop(who, None)
