"""Limits: from readings to a share of the time and to reasons, from files to needs, from /proc and /sys to readings."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.beats import Beats
from edged.config import ConfigError, Limits, load
from edged.core.limits import (
    BACKLASH_C,
    CPU_AIM,
    CPU_DEBT_S_MAX,
    MEMORY_HARD,
    MEMORY_SOFT,
    MIB,
    Bound,
    CpuUse,
    Pressure,
    Readings,
    Rules,
    begin,
    judge,
    tightest,
    too_tight,
)
from edged.limits import PERIOD_S, Monitor
from edged.machine import Memory
from edged.pace import SHARE_MIN, Pace
from tests.support.machines import HandClock, zone

RULES = Rules(75.0, 85.0)


def shares(readings: list[Readings], rules: Rules = RULES) -> list[tuple[float, str]]:
    """The share and its reason after each reading."""
    pressure, out = begin(rules), []
    for reading in readings:
        pressure = judge(pressure, reading, rules)
        out.append((round(pressure.share, 3), pressure.why))
    return out


# Temperature.


@pytest.mark.parametrize(
    ("celsius", "share"),
    [(20, 1.0), (74.9, 1.0), (75, 1.0), (77.5, 0.762), (80, 0.525), (84, 0.145), (85, 0.05), (140, 0.05)],
)
def test_between_soft_and_hard_the_share_falls_in_a_straight_line(celsius: float, share: float) -> None:
    assert shares([Readings(temperature_c=celsius)]) == [(share, "temperature" if share < 1 else "")]


def test_a_temperature_that_trembles_changes_nothing_and_one_that_falls_does() -> None:
    heights = [80.0, 79.0, 80.0, 77.1, 80.0, 76.0, 77.0, 74.0, 71.9, 71.0]
    got = [share for share, _ in shares([Readings(temperature_c=c) for c in heights])]
    assert got[:5] == [0.525] * 5, "within the backlash"
    assert got[5] == pytest.approx(1 - 0.95 * (76 + BACKLASH_C - 75) / 10, abs=1e-3)
    assert got[6] == got[5]
    assert got[7] < 1, "74 is below soft, but not by the backlash"
    assert got[8:] == [1.0, 1.0]


def test_a_temperature_that_is_not_known_is_neither_cold_nor_hot() -> None:
    got = shares([Readings(temperature_c=80.0), Readings(), Readings(), Readings(temperature_c=60.0)])
    assert got == [(0.525, "temperature")] * 3 + [(1.0, "")]
    assert shares([Readings()]) == [(1.0, "")]


# Memory.


def test_memory_slows_down_between_its_marks_and_recovers_behind_the_backlash() -> None:
    marks = [0.5, MEMORY_SOFT, 0.945, 0.93, MEMORY_HARD, 1.4, 0.96, 0.86]
    got = [share for share, _ in shares([Readings(memory=m) for m in marks])]
    assert got[:2] == [1.0, 1.0]
    assert got[2] == got[3] == pytest.approx(0.525)
    assert got[4:6] == [SHARE_MIN, SHARE_MIN]
    assert got[6] == SHARE_MIN, "0.96 and the backlash is where it is slowest"
    assert got[7] == 1.0


def test_the_tightest_limit_decides_and_is_named() -> None:
    assert shares([Readings(temperature_c=77.5, memory=0.945)]) == [(0.525, "memory")]
    assert shares([Readings(temperature_c=84.0, memory=0.945)]) == [(0.145, "temperature")]


# CPU.


def run_cpu(rules: Rules, demand: Callable[[int], float], steps: int = 60) -> tuple[list[float], list[float]]:
    """CPU time used and the share, step by step, by workers that would use `demand(step)` of the cores at full speed."""
    pressure, used, applied = begin(rules), [], []
    for step in range(steps):
        used.append(min(1.0, demand(step) * pressure.share))
        applied.append(pressure.share)
        pressure = judge(pressure, Readings(cpu=CpuUse(used[-1], PERIOD_S)), rules)
    return used, applied


class Working(threading.Event):
    """A worker with its pace under a monitor: time passes where it works (and uses `demand` of the cores) and rests."""

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules, self.clock, self.pressure = rules, HandClock(), begin(rules)
        self.pace = Pace(self.clock)
        self.pace.set(self.pressure.share)
        self.used_s, self._read_s, self._next = 0.0, 0.0, PERIOD_S

    def wait(self, timeout: float | None = None) -> bool:
        self.passes(timeout or 0.0, 0.0)
        return False

    def passes(self, seconds: float, demand: float) -> None:
        end = self.clock.time + seconds
        while self._next <= end:
            self.used_s += (self._next - self.clock.time) * demand
            self.clock.time, self._next = self._next, self._next + PERIOD_S
            use = CpuUse((self.used_s - self._read_s) / PERIOD_S, PERIOD_S)
            self._read_s = self.used_s
            self.pressure = judge(self.pressure, Readings(cpu=use), self.rules)
            self.pace.set(self.pressure.share)
        self.used_s += (end - self.clock.time) * demand
        self.clock.time = end

    def item(self, seconds: float, demand: float = 1.0) -> None:
        self.pace.begin()
        self.passes(seconds, demand)
        self.pace.rest(self, lambda: None)


@pytest.mark.parametrize("limit", [0.2, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("demand", [1.0, 0.7, 3.0])
def test_cpu_time_settles_below_what_is_allowed_and_makes_use_of_it(limit: float, demand: float) -> None:
    used, applied = run_cpu(Rules(cpu_share=limit), lambda _: demand)
    settled = used[20:]
    assert max(settled) <= limit
    assert sum(settled) / len(settled) >= min(demand, 0.9 * limit) - 1e-9
    assert sum(used[:10]) / 10 <= max(limit, 1.5 * limit * min(demand, 3)), "no burst at the start"
    assert min(applied) >= SHARE_MIN


def test_without_a_limit_cpu_time_slows_nothing_down() -> None:
    assert run_cpu(Rules(), lambda _: 3.0)[1] == [1.0] * 60


def test_cpu_time_follows_a_load_that_comes_and_goes() -> None:
    used, applied = run_cpu(Rules(cpu_share=0.3), lambda step: 1.0 if step // 30 % 2 == 0 else 0.1, steps=150)
    assert max(sum(used[n : n + 15]) / 15 for n in range(135)) <= 0.33  # a window of half a minute
    assert applied[58] > 0.9, "idle workers are not held back"


@pytest.mark.parametrize("limit", [0.2, 0.5, 0.9])
def test_a_burst_is_made_up_for_within_a_minute(limit: float) -> None:
    """After rest the first readings come too late to slow anything down."""
    used, _ = run_cpu(Rules(cpu_share=limit), lambda step: 1.0 if step >= 30 else 0.0, steps=90)
    assert used[30] > limit
    assert sum(used[30:60]) / 30 <= limit
    assert 0.9 * limit <= sum(used[60:]) / 30 <= limit


def test_cpu_time_that_is_used_slowly_more_and_more_stays_below_what_is_allowed() -> None:
    used, _ = run_cpu(Rules(cpu_share=0.5), lambda step: 0.8 + 0.005 * step, steps=100)
    assert max(used[20:]) <= 0.5


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.9])
@pytest.mark.parametrize(("seconds", "made_use_of"), [(0.06, 0.9), (0.3, 0.9), (1.0, 0.85), (5.0, 0.75), (30.0, 0.75)])
def test_items_of_every_length_stay_below_what_is_allowed(limit: float, seconds: float, made_use_of: float) -> None:
    """Long items are all or nothing in a reading, and none is interrupted: the mean counts, and less use is made of it."""
    worker = Working(Rules(cpu_share=limit))
    while worker.clock.time < 1200:
        worker.item(seconds)
    assert made_use_of * limit <= worker.used_s / worker.clock.time <= limit


@given(
    st.lists(st.tuples(st.floats(0.1, 20), st.floats(0.1, 1), st.floats(0, 30)), min_size=1, max_size=5),
    st.floats(0.2, 1),
)
@settings(deadline=None, max_examples=50)  # of a quarter of an hour each
def test_whatever_the_work_is_cpu_time_stays_below_what_is_allowed(
    work: list[tuple[float, float, float]], limit: float
) -> None:
    worker = Working(Rules(cpu_share=limit))
    while worker.clock.time < 900:
        for seconds, demand, idle in work:
            worker.item(seconds, demand)
            worker.wait(idle)
    # What the last item used may still be owed.
    assert worker.used_s <= limit * worker.clock.time + work[-1][0]


def test_what_was_used_is_a_debt_in_seconds_and_not_in_readings() -> None:
    rules = Rules(cpu_share=0.5)
    once = judge(begin(rules), Readings(cpu=CpuUse(1.0, 4.0)), rules)
    twice = begin(rules)
    for _ in range(2):
        twice = judge(twice, Readings(cpu=CpuUse(1.0, 2.0)), rules)
    assert once.cpu_debt_s == twice.cpu_debt_s == pytest.approx(4.0 * (1 / (0.5 * CPU_AIM) - 1))
    assert judge(once, Readings(), rules) == once, "what is not known changes nothing"


def test_the_debt_of_a_long_proof_ends() -> None:
    rules, pressure = Rules(cpu_share=0.2), begin(Rules(cpu_share=0.2))
    for _ in range(1800):  # an hour
        pressure = judge(pressure, Readings(cpu=CpuUse(1.0, PERIOD_S)), rules)
    assert (pressure.share, pressure.cpu_debt_s) == (SHARE_MIN, CPU_DEBT_S_MAX)
    for _ in range(round(CPU_DEBT_S_MAX / PERIOD_S) + 30):
        pressure = judge(pressure, Readings(cpu=CpuUse(0.0, PERIOD_S)), rules)
    assert (pressure.share, pressure.cpu_debt_s) == (1.0, 0.0)


def test_what_heat_holds_back_is_no_credit_for_later() -> None:
    rules, cold = Rules(75.0, 85.0, cpu_share=0.5), CpuUse(0.05, PERIOD_S)
    pressure = judge(begin(rules), Readings(temperature_c=85.0), rules)
    for _ in range(50):
        pressure = judge(pressure, Readings(temperature_c=85.0, cpu=cold), rules)
    assert (pressure.share, pressure.why) == (pytest.approx(SHARE_MIN), "temperature")
    assert judge(pressure, Readings(temperature_c=50.0, cpu=cold), rules).share == begin(rules).share


@given(
    st.lists(
        st.builds(
            Readings,
            st.none() | st.floats(-60, 160),
            st.none() | st.floats(0, 3),
            st.none() | st.builds(CpuUse, st.floats(0, 2), st.floats(0.001, 600)),
        ),
        max_size=30,
    ),
    st.floats(0.01, 1),
)
def test_the_share_is_always_one_that_workers_can_keep(readings: list[Readings], cpu_share: float) -> None:
    rules = Rules(cpu_share=cpu_share)
    pressure = begin(rules)
    for reading in readings:
        pressure = judge(pressure, reading, rules)
        assert SHARE_MIN <= pressure.share <= 1
        assert bool(pressure.why) == (pressure.share < 1)
        assert 0 <= pressure.cpu_debt_s <= CPU_DEBT_S_MAX


# What fits.

OURS = Bound("ours", 1000 * MIB, 600 * MIB)  # 350 left: 50 are headroom
THEIRS = Bound("theirs", 1000 * MIB, 700 * MIB, own=False)  # 250 left


def test_something_is_always_left_over() -> None:
    assert OURS.left == 350 * MIB
    assert Bound("big", 10_000 * MIB, 0).left == (10_000 - 64) * MIB
    assert Bound("over", 100 * MIB, 120 * MIB).left == 0


@pytest.mark.parametrize(
    ("need", "back", "bound"),
    [
        (250, 0, None),
        (251, 0, "theirs"),
        (350, 0, "theirs"),
        (351, 0, "ours"),  # waiting for others would not help
        (351, 101, None),
        (500, 100, "ours"),
        (600, 9999, None),
    ],
)
def test_what_does_not_fit_is_held_against_the_limit_that_will_not_change(
    need: int, back: int, bound: str | None
) -> None:
    found = too_tight(need * MIB, back * MIB, [THEIRS, OURS])
    assert (found.name if found else None) == bound


def test_without_limits_all_fits() -> None:
    assert too_tight(10**15, 0, []) is None
    assert tightest([]) is None
    assert tightest([OURS, THEIRS]) == THEIRS


# The monitor.


class Bench:
    def __init__(self, folder: Path, **limits: Any) -> None:
        self.root, self.clock = folder / "thermal", HandClock()
        self.pace = Pace(self.clock)
        self.root.mkdir()
        self.counted: list[str] = []
        self.said: list[str] = []
        self.full = 0.0
        self.memory = Memory(1000)
        self.memory.pressure = self._pressure  # type: ignore[method-assign]
        self.monitor = Monitor(
            Limits(thermal_root=self.root, **limits), self.memory, self.pace, Beats(self.clock), self.clock,
            self.counted.append, lambda kind, text: self.said.append(f"{kind}: {text}"),
        )  # fmt: skip

    def _pressure(self) -> tuple[float, Bound]:
        return self.full, Bound("limits.memory_mib = 1000", 1000 * MIB, int(self.full * 1000 * MIB))

    def tick(self) -> None:
        self.clock.time += 2.0
        self.monitor.tick()


def test_a_window_tells_the_worst_of_the_readings_since_the_last_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.monitor.peaks() == {"memory_mib_max": None, "temperature_c_max": None, "pace_min": None}
    for celsius, owned in (("60000", 80 * MIB), ("78000", 120 * MIB), ("65000", 90 * MIB)):
        zone(bench.root, 0, celsius)
        bench.memory.owned = owned
        bench.tick()
    worst = bench.monitor.peaks()
    assert (worst["memory_mib_max"], worst["temperature_c_max"]) == (120.0, 78.0)
    assert worst["pace_min"] is not None and worst["pace_min"] < 1.0
    bench.tick()
    assert (bench.monitor.peaks()["temperature_c_max"], bench.monitor.peaks()["pace_min"]) == (65.0, None)


def test_heat_slows_the_workers_down_says_so_once_and_ends(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    zone(bench.root, 0, "60000")
    bench.tick()
    assert (bench.pace.share, bench.said) == (1.0, [])
    for _ in range(3):
        zone(bench.root, 0, "80000")
        bench.tick()
    assert bench.pace.share == pytest.approx(0.525)
    assert bench.monitor.status()["why"] == "temperature: 80 °C is above 75 °C"
    zone(bench.root, 0, "-274000")
    for _ in range(100):
        bench.tick()
    assert bench.pace.share == pytest.approx(0.525), "a sensor that breaks is not a cold one"
    assert bench.monitor.status()["temperature"]["ignored"] == {"thermal_zone0": "it says -274 degrees"}
    zone(bench.root, 0, "60000")
    bench.tick()
    assert bench.pace.share == 1.0
    assert bench.monitor.status()["why"] == ""
    assert [line.partition(":")[0] for line in bench.said] == ["temperature_high", "temperature_ok"]
    assert "thermal_zone0 has 80 °C, limits.temperature_soft_c = 75: workers work 52% of the time" in bench.said[0]
    assert bench.counted == ["temperature_slowdowns", "thermal_zones_ignored"]


def test_low_memory_is_trimmed_first_then_said_and_slows_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path)
    bench.full = 0.97
    monkeypatch.setattr("edged.limits.trim_memory", lambda: setattr(bench, "full", 0.5))
    bench.tick()
    assert (bench.pace.share, bench.said, bench.counted) == (1.0, [], ["memory_trims"])
    monkeypatch.setattr("edged.limits.trim_memory", lambda: None)
    bench.clock.time += 60
    bench.full = 0.97
    bench.tick()
    assert bench.pace.share == pytest.approx(1 - 0.95 * 0.07 / 0.09)
    assert bench.said == ["memory_low: 970 MiB of limits.memory_mib = 1000 are used: workers work 26% of the time"]
    bench.full = 0.5
    bench.tick()
    assert bench.pace.share == 1.0
    assert bench.said[1:] == ["memory_ok: memory: there is room again"]


def test_a_cpu_limit_holds_from_the_first_item_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path, cpu_share=0.25)
    assert bench.pace.share == 0.25
    bench.tick()
    assert bench.monitor.status()["why"] == "cpu: limits.cpu_share = 0.25"
    bench.monitor.stop()
    assert bench.pace.share == 1.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "temperature_soft_c = 85\ntemperature_hard_c = 80",
            "temperature_soft_c = 85 is not below temperature_hard_c = 80",
        ),
        ("cpu_share = 0", "limits.cpu_share = 0"),
        ("cpu_share = 1.5", "limits.cpu_share = 1.5"),
        ("memory_mib = 3", "limits.memory_mib = 3"),
    ],
)
def test_limits_that_make_no_sense_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "edged.toml"
    path.write_text(f"[device]\nid = 'd'\n[limits]\n{text}\n")
    with pytest.raises(ConfigError, match=complaint):
        load(path)


def test_pressure_begins_at_full_speed() -> None:
    assert begin(Rules()) == Pressure()
