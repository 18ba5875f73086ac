"""What a device's limits ask for: how much of the time its workers may work, and whether a release fits into memory.

Readings come in, shares and reasons go out. A share that changes with every tenth of a degree is of no use to anybody, so
temperature and memory act through a backlash: they rise at once and must fall by its width before anything is faster again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

MIB = 1 << 20
SENSIBLE_C = (-55.0, 150.0)  # what silicon survives; -274 and 1e6 are broken sensors
BACKLASH_C = 3.0
MEMORY_SOFT, MEMORY_HARD = (
    0.90,
    0.99,
)  # of the tightest memory limit: from here on slower, from there on as slow as can be
BACKLASH_MEMORY = 0.03
CPU_AIM = 0.95  # of the share that is allowed, so that what swings around it stays below
CPU_GAIN = 0.5  # of the error, in one step; 2 would swing for ever
# How long a debt takes to be paid back. 4 / CPU_GAIN readings of 2 s: the shortest time that does not swing.
CPU_PAY_S = 16.0
CPU_DEBT_S_MAX = 300.0  # what goes beyond is forgiven: the proof of an update slows nothing down for hours
HEADROOM = 0.05  # of a memory limit, and at most HEADROOM_BYTES_MAX, stays free whatever is loaded
HEADROOM_BYTES_MAX = 64 * MIB


@dataclass(frozen=True, slots=True)
class Rules:
    """What the configuration says. Temperatures in degrees Celsius; `cpu_share` of the cores that the process may use."""

    temperature_soft_c: float = 75.0
    temperature_hard_c: float = 85.0
    cpu_share: float = 1.0
    share_min: float = 0.05  # the least share of the time that workers work


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU time used since the last reading, `seconds` ago, as a share of the cores that the process may use."""

    share: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Readings:
    """What was measured. None: it is not known now, and what was known before still counts. `memory`: of the tightest
    limit, 1 is all of it."""

    temperature_c: float | None = None
    memory: float | None = None
    cpu: CpuUse | None = None


@dataclass(frozen=True, slots=True)
class Pressure:
    """Where things stand: the held readings, the share that CPU time allows, the least share that any of them allows, and
    what it is for (`temperature`, `memory`, `cpu`, or "" at full speed).

    `cpu_debt_s`: CPU time used above what is aimed at and not made up for yet, in seconds of what is aimed at.
    """

    temperature_c: float | None = None
    memory: float | None = None
    cpu: float = 1.0
    cpu_debt_s: float = 0.0
    share: float = 1.0
    why: str = ""


def begin(rules: Rules) -> Pressure:
    """Before anything was measured: the CPU limit counts from the first item on."""
    share = min(1.0, max(rules.share_min, rules.cpu_share))
    return Pressure(cpu=share, share=share, why="cpu" if share < 1 else "")


def judge(before: Pressure, now: Readings, rules: Rules) -> Pressure:
    """The pressure after a reading."""
    temperature = _held(before.temperature_c, now.temperature_c, BACKLASH_C)
    memory = _held(before.memory, now.memory, BACKLASH_MEMORY)
    cpu, cpu_debt_s = _cpu(before, now.cpu, rules)
    allowed = {
        "temperature": _falling(temperature, rules.temperature_soft_c, rules.temperature_hard_c, rules.share_min),
        "memory": _falling(memory, MEMORY_SOFT, MEMORY_HARD, rules.share_min),
        "cpu": cpu,
    }
    why = min(allowed, key=lambda name: allowed[name])
    share = allowed[why]
    return Pressure(temperature, memory, cpu, cpu_debt_s, share, why if share < 1 else "")


def _held(held: float | None, reading: float | None, width: float) -> float | None:
    """What counts of a reading: it rises at once, and falls when it has fallen by more than `width`."""
    if reading is None or held is None:
        return held if reading is None else reading
    if reading >= held:
        return reading
    return min(held, reading + width)


def _falling(value: float | None, soft: float, hard: float, least: float) -> float:
    """1 up to `soft`, `least` from `hard` on, a straight line between."""
    if value is None or value <= soft:
        return 1.0
    return max(least, 1.0 - (1.0 - least) * (value - soft) / (hard - soft))


def _cpu(before: Pressure, used: CpuUse | None, rules: Rules) -> tuple[float, float]:
    """The share for which CPU time comes to what is allowed, and the debt.

    A proportional-integral controller on the logarithm of the share, because CPU time grows with the share and the error is
    relative: readings of long items jump between nothing and everything, and errors that are even leave the share as it is.
    The integral is the debt. It is never a credit: idle time is not saved up for a burst.
    """
    if rules.cpu_share >= 1:
        return 1.0, 0.0
    if used is None:
        return before.cpu, before.cpu_debt_s
    ratio = used.share / (CPU_AIM * rules.cpu_share)
    debt_s = min(CPU_DEBT_S_MAX, max(0.0, before.cpu_debt_s + (ratio - 1.0) * used.seconds))
    error = 1.0 - debt_s / CPU_PAY_S - ratio
    if error > 0 and before.share < before.cpu:
        return before.cpu, debt_s  # something else holds the workers back: that says nothing about CPU time
    return min(1.0, max(rules.share_min, before.cpu * math.exp(CPU_GAIN * error))), debt_s


def sensible(celsius: float) -> bool:
    """Whether a sensor can be believed."""
    return SENSIBLE_C[0] < celsius < SENSIBLE_C[1]


@dataclass(frozen=True, slots=True)
class Bound:
    """One limit on memory, in bytes: `name` as people know it, and what is used of it now.

    `own`: only this daemon and its children count, so waiting does not help. Otherwise others use it too.
    `slows`: working less keeps us from its end; that the rest of the machine is full is no reason to: it would free nothing.
    """

    name: str
    limit: int
    used: int
    own: bool = True
    slows: bool = True

    @property
    def left(self) -> int:
        """What may still be loaded, 0 at least: some headroom is never given away."""
        return max(0, self.limit - self.used - headroom(self.limit))


def headroom(limit: int) -> int:
    """What stays free of a memory limit, in bytes."""
    return min(HEADROOM_BYTES_MAX, int(limit * HEADROOM))


def freed(bounds: Iterable[Bound], back: int) -> list[Bound]:
    """The bounds once `back` bytes were given back."""
    return [replace(bound, used=max(0, bound.used - back)) for bound in bounds]


def tightest(bounds: Iterable[Bound]) -> Bound | None:
    """The bound with the least left; of equal ones that for which waiting does not help."""
    return min(bounds, key=lambda bound: (bound.left, not bound.own), default=None)


def too_tight(need: int, back: int, bounds: Iterable[Bound]) -> Bound | None:
    """The bound that `need` bytes do not fit into once `back` bytes were given back; None when they fit.

    One for which waiting does not help comes first.
    """
    short = [bound for bound in freed(bounds, back) if bound.left < need]
    return min(short, key=lambda bound: (not bound.own, bound.left), default=None)


def mib(size: int) -> int:
    """Bytes in MiB, rounded up, as people read them."""
    return -(-size // MIB)
