"""One judgement of the gate and all of them together. What was not measured, or is no number, did not pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


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


class Parity(Protocol):
    """What an export differs by from what it was made of: `value` of `what`, within `tolerance` or not."""

    @property
    def what(self) -> str: ...
    @property
    def value(self) -> float: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def passed(self) -> bool: ...


def parity_checks(found: Sequence[Parity]) -> list[Check]:
    """Each comparison of an exported file with what it was made of; none at all fails."""
    if not found:
        return [Check("parity", False, None, None, "the exported file was compared with nothing that it was made of")]
    checks = []
    for each in found:
        # Several metrics of one thing are told apart by theirs.
        what = " ".join(filter(None, (each.what, getattr(each, "metric", ""))))
        known = math.isfinite(each.value)
        text = f"export against what it was made of, {what}: {each.value:.4g}, tolerance {each.tolerance:g}"
        value = each.value if known else None
        checks.append(Check(f"parity ({what})", bool(each.passed) and known, value, each.tolerance, text))
    return checks
