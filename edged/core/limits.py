"""What a device's limits ask for: how much of the time its workers may work, and whether a release fits into memory.

Readings come in, shares and reasons go out. A share that changes with every tenth of a degree is of no use to anybody, so
temperature and memory act through a backlash: they rise at once and must fall by its width before anything is faster again.
"""

from __future__ import annotations

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
CPU_STEP_MAX = 0.5  # a step changes the share by no more than this part
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
class Readings:
    """What was measured. None: it is not known now, and what was known before still counts.

    `cpu`: CPU time used since the last reading, as a share of the cores that the process may use. `memory`: of the
    tightest limit, 1 is all of it.
    """

    temperature_c: float | None = None
    memory: float | None = None
    cpu: float | None = None


@dataclass(frozen=True, slots=True)
class Pressure:
    """Where things stand: the held readings, the share that each of them allows, the least of these, and what it is for
    (`temperature`, `memory`, `cpu`, or "" at full speed)."""

    temperature_c: float | None = None
    memory: float | None = None
    cpu: float = 1.0
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
    allowed = {
        "temperature": _falling(temperature, rules.temperature_soft_c, rules.temperature_hard_c, rules.share_min),
        "memory": _falling(memory, MEMORY_SOFT, MEMORY_HARD, rules.share_min),
        "cpu": _cpu(before, now.cpu, rules),
    }
    why = min(allowed, key=lambda name: allowed[name])
    share = allowed[why]
    return Pressure(temperature, memory, allowed["cpu"], share, why if share < 1 else "")


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


def _cpu(before: Pressure, used: float | None, rules: Rules) -> float:
    """The share for which CPU time comes to what is allowed; CPU time grows with the share, so the error is relative."""
    if rules.cpu_share >= 1:
        return 1.0
    if used is None:
        return before.cpu
    change = CPU_GAIN * (1.0 - used / (CPU_AIM * rules.cpu_share))
    if change > 0 and before.share < before.cpu:
        return before.cpu  # something else holds the workers back: that says nothing about CPU time
    change = min(CPU_STEP_MAX, max(-CPU_STEP_MAX, change))
    return min(1.0, max(rules.share_min, before.cpu * (1.0 + change)))


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
