"""Keeps the device within its limits: measures, sets the workers' pace, and says what is slowed down and why."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edged.beats import Beats
from edged.clock import Clock
from edged.config import Limits
from edged.core.limits import MEMORY_SOFT, MIB, Bound, CpuUse, Pressure, Readings, Rules, begin, judge, mib
from edged.machine import CpuTime, Memory, Thermal
from edged.pace import SHARE_MIN, Pace
from edged.slot import trim_memory

log = logging.getLogger(__name__)

PERIOD_S = 2.0  # between two readings
TRIM_S = 30.0  # freed memory is asked back at most this often
STILL_S_MAX = 60.0
PEAKS_MAX = 1800  # readings that are kept for a window: an hour
BEAT = "limits"


class Monitor:
    """A thread that reads the sensors and sets the pace. `count` and `say` are the store's and the control loop's."""

    def __init__(
        self, limits: Limits, memory: Memory, pace: Pace, beats: Beats, clock: Clock,
        count: Callable[[str], None], say: Callable[..., None],
        proc: Path = Path("/proc"), mount: Path = Path("/sys/fs/cgroup"),
    ) -> None:  # fmt: skip
        self._rules = Rules(limits.temperature_soft_c, limits.temperature_hard_c, limits.cpu_share, SHARE_MIN)
        self._memory, self._pace, self._beats, self._clock = memory, pace, beats, clock
        self._count, self._say = count, say
        self._thermal, self._cpu = Thermal(limits.thermal_root), CpuTime(proc, mount)
        self._pressure = begin(self._rules)
        self._pace.set(self._pressure.share)
        self._trimmed = -TRIM_S
        self._slowed: set[str] = set()  # what was said to be slowing the device down
        self._broken: set[str] = set()
        self._shown: dict[str, Any] = {}
        self._since_peaks: deque[tuple[float | None, float | None, float]] = deque(maxlen=PEAKS_MAX)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=BEAT, daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._beats.watch(BEAT, STILL_S_MAX)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; the workers may finish at full speed."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._beats.forget(BEAT)
        self._pace.set(1.0)

    def status(self) -> dict[str, Any]:
        """The last readings, the share of the time that workers may work, and what it is for ("": full speed)."""
        return self._shown

    def peaks(self) -> dict[str, float | None]:
        """The fields of `wire.measured.Machine` for the time since the last call, by the readings of every PERIOD_S."""
        readings = [self._since_peaks.popleft() for _ in range(len(self._since_peaks))]
        memory = max((each[0] for each in readings if each[0] is not None), default=None)
        hottest = max((each[1] for each in readings if each[1] is not None), default=None)
        pace = min((each[2] for each in readings), default=None)
        return {"memory_mib_max": memory, "temperature_c_max": hottest, "pace_min": pace}

    def _note(self, celsius: float | None) -> None:
        owned = self._memory.owned
        memory_mib = None if owned is None else round(owned / MIB, 1)
        self._since_peaks.append((memory_mib, celsius, round(self._pressure.share, 3)))

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._beats.beat(BEAT)
            try:
                self.tick()
            except Exception:  # the thread outlives every bug; the pace stays as it was
                log.exception("limits")
                self._count("limits_faults")
            self._stopping.wait(self._clock.real(PERIOD_S))

    def tick(self) -> None:
        """Read everything once and set the pace."""
        now = self._clock.monotonic()
        hottest = self._thermal.read(now)
        self._tell_broken()
        used = self._cpu.used(now)
        memory = self._trimmed_memory(now)
        before = self._pressure
        self._pressure = judge(
            before, Readings(hottest[1] if hottest else None, memory[0] if memory else None, used), self._rules
        )
        self._pace.set(self._pressure.share)
        self._note(hottest[1] if hottest else None)
        self._shown = self._show(hottest, memory, used)
        self._tell(hottest, memory)

    def _trimmed_memory(self, now: float) -> tuple[float, Bound] | None:
        """How full memory is; when it runs low, after what was freed has been given back."""
        memory = self._memory.pressure()
        if memory is None or memory[0] < MEMORY_SOFT or now - self._trimmed < TRIM_S:
            return memory
        self._trimmed = now
        self._count("memory_trims")
        trim_memory()
        return self._memory.pressure()

    def _tell_broken(self) -> None:
        broken = self._thermal.broken
        for zone in broken.keys() - self._broken:
            self._count("thermal_zones_ignored")
            log.warning("temperature sensor %s is ignored: %s", zone, broken[zone])
        for zone in self._broken - broken.keys():
            log.info("temperature sensor %s can be believed again", zone)
        self._broken = set(broken)

    def _tell(self, hottest: tuple[str, float] | None, memory: tuple[float, Bound] | None) -> None:
        """An event when the device begins to be held back by heat or memory, and when that is over."""
        pressure, rules = self._pressure, self._rules
        hot = pressure.temperature_c is not None and pressure.temperature_c > rules.temperature_soft_c
        low = pressure.memory is not None and pressure.memory > MEMORY_SOFT
        share = f"workers work {pressure.share:.0%} of the time"
        if hot and "temperature" not in self._slowed:
            at = f"{hottest[0]} has {hottest[1]:.0f} °C" if hottest else f"{pressure.temperature_c:.0f} °C"
            self._begins("temperature", f"{at}, limits.temperature_soft_c = {rules.temperature_soft_c:g}: {share}")
        elif not hot and "temperature" in self._slowed:
            self._ends("temperature", f"back below {rules.temperature_soft_c:g} °C")
        if low and "memory" not in self._slowed and memory is not None:
            bound = memory[1]
            self._begins("memory", f"{mib(bound.used)} MiB of {bound.name} are used: {share}")
        elif not low and "memory" in self._slowed:
            self._ends("memory", "there is room again")

    def _begins(self, what: str, text: str) -> None:
        self._slowed.add(what)
        self._count(f"{what}_slowdowns")
        log.warning("%s: %s", what, text)
        self._say({"temperature": "temperature_high", "memory": "memory_low"}[what], text)

    def _ends(self, what: str, text: str) -> None:
        self._slowed.discard(what)
        log.info("%s: %s", what, text)
        self._say(f"{what}_ok", f"{what}: {text}")

    def _show(
        self, hottest: tuple[str, float] | None, memory: tuple[float, Bound] | None, used: CpuUse | None
    ) -> dict[str, Any]:
        pressure, rules = self._pressure, self._rules
        shown: dict[str, Any] = {"share": round(pressure.share, 3), "why": _why(pressure, rules, memory)}
        shown["temperature"] = {
            "c": round(hottest[1], 1) if hottest else None,
            "zone": hottest[0] if hottest else None,
            "soft_c": rules.temperature_soft_c,
            "hard_c": rules.temperature_hard_c,
            "ignored": dict(self._thermal.broken),
        }
        if memory is not None:
            bound = memory[1]
            shown["memory"] = {
                "used_mib": mib(bound.used), "limit_mib": mib(bound.limit), "left_mib": bound.left >> 20,
                "limit": bound.name,
            }  # fmt: skip
        shown["cpu"] = {
            "used": round(used.share, 3) if used is not None else None,
            "debt_s": round(pressure.cpu_debt_s, 1),
            "cores": round(self._cpu.cores(), 3),
            "cpu_share": rules.cpu_share,
        }
        return shown


def _why(pressure: Pressure, rules: Rules, memory: tuple[float, Bound] | None) -> str:
    """What holds the workers back, for people; "" at full speed."""
    match pressure.why:
        case "temperature":
            return f"temperature: {pressure.temperature_c:.0f} °C is above {rules.temperature_soft_c:g} °C"
        case "memory":
            return f"memory: {pressure.memory:.0%} of {memory[1].name if memory else 'the limit'} is used"
        case "cpu":
            return f"cpu: limits.cpu_share = {rules.cpu_share:g}"
    return ""
