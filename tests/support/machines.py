"""Fake machines: /proc, control groups and temperature sensors as folders of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MIB = 1 << 20


class HandClock:
    """Stands still until it is moved."""

    time = 0.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def real(self, seconds: float) -> float:
        return seconds


def zone(root: Path, number: int, said: str | None) -> None:
    """What the sensor `thermal_zoneN` says, in thousandths of a degree; None: it is gone."""
    file = root / f"thermal_zone{number}" / "temp"
    file.parent.mkdir(parents=True, exist_ok=True)
    if said is None:
        file.unlink(missing_ok=True)
        file.parent.rmdir()
        return
    beside = file.with_name("temp.new")
    beside.write_text(said)
    beside.rename(file)


def fake_machine(
    folder: Path, v2: dict[str, dict[str, Any]] | None = None, v1: dict[str, dict[str, Any]] | None = None,
    path: str | None = None, total: int = 64_000 * MIB, available: int = 60_000 * MIB,
) -> tuple[Path, Path]:  # fmt: skip
    """Folders in the place of /proc and /sys/fs/cgroup. Groups by path, the last one is this process's own, each with
    files; 100 MiB are in use in each, of it 60 of file pages (20 mapped), and with version 2 10 that the kernel can free."""
    proc, mount = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {total // 1024} kB\nMemAvailable: {available // 1024} kB\n")
    own = path or "/" + list(v2 or v1 or {"": {}})[-1]
    if v1 is not None:
        lines = f"4:memory:{own}\n1:cpu,cpuacct:{own}\n0::/\n"
        roots = {"memory": "total_", "cpu,cpuacct": "total_"}
    else:
        lines, roots = f"0::{own}\n", {"": ""}
    (proc / "self" / "cgroup").write_text(lines)
    for root, prefix in roots.items():
        for group, files in (v2 or v1 or {}).items():
            place = mount / root / group
            place.mkdir(parents=True, exist_ok=True)
            stat = {f"{prefix}inactive_file": 30 * MIB, f"{prefix}active_file": 30 * MIB}
            stat |= {"total_mapped_file": 20 * MIB} if v1 is not None else {"file_mapped": 20 * MIB}
            if v1 is None:
                stat["slab_reclaimable"] = 10 * MIB
            content: dict[str, Any] = {
                "memory.stat": "".join(f"{name} {value}\n" for name, value in stat.items()),
                ("memory.usage_in_bytes" if v1 is not None else "memory.current"): 100 * MIB,
                **({"cpu.cfs_period_us": 100_000} if v1 is not None else {"cgroup.controllers": "memory cpu"}),
                **files,
            }
            for name, value in content.items():
                (place / name).write_text(f"{value}\n")
    return proc, mount
