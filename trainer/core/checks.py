"""One judgement of the gate and all of them together. What was not measured, or is no number, did not pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One named judgement; `reason` says what was found and what was allowed."""

    name: str
    passed: bool
    value: float | str | None
    bound: float | str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Passed only when every check passed, and there was at least one."""

    checks: tuple[Check, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether the release may go out."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """Why not: the reason of each failed check."""
        return [check.reason for check in self.checks if not check.passed]

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON-able values."""
        return {"passed": self.passed, "reasons": self.reasons, "checks": [asdict(check) for check in self.checks]}


def number(name: str, value: float | None, bound: float, ok: Callable[[float], bool], text: str) -> Check:
    """A check of a number: what is missing or not finite fails, whatever the comparison says."""
    if value is None or not math.isfinite(value):
        return Check(name, False, None, bound, f"{text}: not measured ({value}), bound {bound:g}")
    return Check(name, bool(ok(value)), value, bound, f"{text}: {value:.4g}, bound {bound:g}")


def minimum(name: str, value: float | None, bound: float, text: str) -> Check:
    """A number that must be at least `bound`."""
    return number(name, value, bound, lambda v: v >= bound, f"{text} (at least)")


def maximum(name: str, value: float | None, bound: float, text: str) -> Check:
    """A number that must be at most `bound`."""
    return number(name, value, bound, lambda v: v <= bound, f"{text} (at most)")
