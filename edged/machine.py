"""What the machine says about itself: memory and its limits, CPU time, temperatures. Reads /proc and /sys, decides nothing.

What a hardened service may not read (`ProcSubset=pid` hides /proc/meminfo) is left out or asked of the C library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edged.core.limits import MIB, Bound, CpuUse, mib, sensible

RESERVE_SHARE = 0.10  # of the machine's memory stays with the rest of the system, and at most RESERVE_BYTES_MAX
RESERVE_BYTES_MAX = 256 * MIB
UNLIMITED = 1 << 60  # bytes; cgroup v1 writes "no limit" as a number near 2**63
HELD_S = 60.0  # a sensor that falls silent counts this long with what it said last


def _number(path: Path) -> int | None:
    """The whole number in a file; None where there is none ("max", no file, no permission)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _table(path: Path) -> dict[str, int]:
    """`name value` lines, as in memory.stat and /proc/meminfo."""
    try:
        return {name: int(value) for name, value in re.findall(r"^(\w+):?\s+(\d+)", path.read_text(), re.MULTILINE)}
    except OSError:
        return {}


@dataclass(frozen=True, slots=True)
class Group:
    """A control group that this process is in: its folder, and whether it is of version 2."""

    folder: Path
    path: str
    v2: bool

    def limit(self) -> int | None:
        """Bytes of memory; None: no limit here."""
        names = ("memory.max", "memory.high") if self.v2 else ("memory.limit_in_bytes",)
        limits = [n for name in names if (n := _number(self.folder / name)) is not None and n < UNLIMITED]
        return min(limits, default=None)

    def used(self) -> int:
        """Bytes in use that the kernel cannot take back: file pages count only as far as they are mapped."""
        now = _number(self.folder / ("memory.current" if self.v2 else "memory.usage_in_bytes")) or 0
        stat, total = _table(self.folder / "memory.stat"), "" if self.v2 else "total_"
        files = stat.get(f"{total}inactive_file", 0) + stat.get(f"{total}active_file", 0)
        mapped = stat.get("file_mapped" if self.v2 else "total_mapped_file", 0)
        return max(0, now - max(0, files - mapped) - stat.get("slab_reclaimable", 0))

    def cores(self) -> float | None:
        """Cores' worth of CPU time; None: no limit here."""
        if self.v2:
            try:
                quota, period = (self.folder / "cpu.max").read_text().split()
            except (OSError, ValueError):
                return None
            return int(quota) / int(period) if quota.isdigit() and int(period) > 0 else None
        quota_us, period_us = _number(self.folder / "cpu.cfs_quota_us"), _number(self.folder / "cpu.cfs_period_us")
        return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def groups(controller: str, proc: Path, mount: Path) -> list[Group]:
    """The control groups of this process that a controller (`memory`, `cpu`) may limit, the innermost first."""
    found = []
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = [mount] if (mount / "cgroup.controllers").exists() else [mount / "unified"]
        elif controller in controllers.split(","):
            roots = [mount / controller, mount / controllers]
        else:
            continue
        root = next((each for each in roots if each.is_dir()), None)
        if root is not None:
            found += list(_upwards(root, path, v2=controllers == ""))
    return found


def _upwards(root: Path, path: str, *, v2: bool) -> Iterator[Group]:
    # In a container without a name space of its own the path is the host's, and what is mounted is the container's.
    below = Path(path.lstrip("/")) if (root / path.lstrip("/")).is_dir() else Path()
    for part in (below, *below.parents):
        yield Group(root / part, f"/{part}" if str(part) != "." else "/", v2)


class Memory:
    """What may be used of memory, and what is."""

    def __init__(
        self, memory_mib: int | None = None, proc: Path = Path("/proc"), mount: Path = Path("/sys/fs/cgroup")
    ) -> None:
        """`memory_mib`: the configured limit of the daemon and its children together."""
        self._configured, self._proc = memory_mib, proc
        self._groups = groups("memory", proc, mount)
        self.owned: int | None = None  # what `own` found last, in bytes

    def bounds(self) -> list[Bound]:
        """Every limit that holds now."""
        own = self.own()
        found = []
        if self._configured is not None:
            found.append(Bound(f"limits.memory_mib = {self._configured}", self._configured * MIB, own))
        for group in self._groups:
            limit = group.limit()
            if limit is not None:
                name = f"the {mib(limit)} MiB of the control group {group.path}"
                found += [Bound(name, limit, own), Bound(name, limit, group.used(), False)]
        info = _table(self._proc / "meminfo")
        total = info["MemTotal"] * 1024 if "MemTotal" in info else _sysconf("SC_PHYS_PAGES")
        if total:
            name = f"the {mib(total)} MiB of this machine"
            usable = total - min(RESERVE_BYTES_MAX, int(total * RESERVE_SHARE))
            found.append(Bound(name, usable, own))
            if "MemAvailable" in info:
                found.append(Bound(name, usable, total - info["MemAvailable"] * 1024, False, False))
        return found

    def pressure(self) -> tuple[float, Bound] | None:
        """How full the fullest of the limits is that ask us to work less, and which it is."""
        fullest = max((b for b in self.bounds() if b.slows), key=lambda bound: bound.used / bound.limit, default=None)
        return (fullest.used / fullest.limit, fullest) if fullest else None

    def own(self) -> int:
        """Bytes that this process and its children hold: what they share is counted once (PSS)."""
        self.owned = sum(self._pss(pid) for pid in (os.getpid(), *_children()))
        return self.owned

    def _pss(self, pid: int) -> int:
        try:
            text = (self._proc / str(pid) / "smaps_rollup").read_text()
            return int(re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024  # type: ignore[index]
        except (OSError, TypeError):
            pass  # an old kernel, or a process that is about to end
        try:
            _, resident, shared, *_ = map(int, (self._proc / str(pid) / "statm").read_text().split())
            return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError):
            return 0


def _sysconf(name: str) -> int:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _children() -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process().children(recursive=True)]
    except psutil.Error:
        return []


class CpuTime:
    """CPU time of this process and its children."""

    def __init__(self, proc: Path = Path("/proc"), mount: Path = Path("/sys/fs/cgroup")) -> None:
        self._groups = groups("cpu", proc, mount)
        self._before: tuple[float, float] | None = None

    def cores(self) -> float:
        """Cores that this process may use: those it may run on, or fewer by a control group's quota."""
        quotas = [quota for group in self._groups if (quota := group.cores()) is not None]
        return min([float(len(os.sched_getaffinity(0))), *quotas])

    def used(self, now: float) -> CpuUse | None:
        """What was used of those cores since the last call, at monotonic `now`; None at the first."""
        import psutil

        own = os.times()
        total = own.user + own.system + own.children_user + own.children_system
        for child in psutil.Process().children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.Error:  # it has ended: from now on its time is the parent's `children_user`
                continue
            total += times.user + times.system + times.children_user + times.children_system
        before = self._before
        if before is not None:
            # A child that ended while we looked is in neither sum: what it used before must not count a second time.
            total = max(total, before[1])
        self._before = (now, total)
        if before is None or now <= before[0]:
            return None
        seconds = now - before[0]
        return CpuUse((total - before[1]) / seconds / self.cores(), seconds)


class Thermal:
    """The machine's temperature sensors below `root` (/sys/class/thermal)."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._last: dict[str, tuple[float, float]] = {}  # zone -> degrees, when
        self.broken: dict[str, str] = {}  # zone -> what is wrong with it

    def read(self, now: float) -> tuple[str, float] | None:
        """The hottest zone and its degrees Celsius at monotonic `now`; None when no sensor can be believed.

        What is silent or talks nonsense counts for HELD_S with what it said last, and is then ignored: it is `broken`.
        """
        try:
            zones = sorted(path for path in self._root.iterdir() if path.name.startswith("thermal_zone"))
        except OSError:
            zones = []
        broken = dict.fromkeys(self._last, "it has gone")
        for zone in zones:
            broken.pop(zone.name, None)
            try:
                celsius = int((zone / "temp").read_text()) / 1000
            except (OSError, ValueError) as error:
                broken[zone.name] = getattr(error, "strerror", None) or "it says no number"
                continue
            if sensible(celsius):
                self._last[zone.name] = (celsius, now)
            else:
                broken[zone.name] = f"it says {celsius:g} degrees"
        self.broken = broken
        fresh = {name: celsius for name, (celsius, at) in self._last.items() if now - at <= HELD_S}
        if not fresh:
            return None
        hottest = max(fresh, key=lambda name: fresh[name])
        return hottest, fresh[hottest]
