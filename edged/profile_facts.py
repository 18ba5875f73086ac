"""Facts about the machine that this process runs on, or about another one whose file tree is at hand, for the choice of a
profile.

What a container or a service unit leaves of the machine counts: with 512 MiB allowed it is a machine of 512 MiB. A hardened
service sees no /proc/meminfo, /proc/cpuinfo and /dev/nvidia0, so nothing that decides comes from there alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from edged.core.detect import ARCHITECTURES, Facts

MIB = 1 << 20
UNLIMITED = 1 << 50  # bytes; version 1 of control groups writes "no limit" as a huge number
FILE_BYTES_MAX = 1 << 20  # of a file that is read here; /proc/cpuinfo of a large machine has some 100 kB
HERE = Path("/")

# Of the kinds of case that SMBIOS knows (specification 3.x, section 7.4.1), those that say what a machine is for.
CASES = {17: "main server", 23: "rack server", 33: "IoT gateway", 34: "embedded PC", 35: "mini PC", 36: "stick PC"}
# ARM's part numbers in /proc/cpuinfo, of the boards that have profiles and their neighbours.
ARM_PARTS = {
    0xD03: "Cortex-A53", 0xD05: "Cortex-A55", 0xD08: "Cortex-A72", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1",
    0xD42: "Cortex-A78AE",
}  # fmt: skip


def facts(root: Path = HERE, machine: str | None = None) -> Facts:
    """The facts of the machine whose file tree begins at `root`.

    `machine` is the kernel's name of its architecture; by default what the tree says, else this machine's. What is not
    there stays empty: nothing is raised.
    """
    cpuinfo = _text(root / "proc/cpuinfo")
    if root == HERE:
        cores = len(os.sched_getaffinity(0))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB
    else:
        cores = len(re.findall(r"(?m)^processor\s*:", cpuinfo))
        found = re.search(r"(?m)^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo"))
        memory = int(found[1]) // 1024 if found else 0
    narrowed = []
    allowed_mib, allowed_cores = _allowed(root)
    if allowed_mib is not None and (allowed_mib < memory or not memory):
        narrowed.append(f"its control group allows {allowed_mib} of {memory} MiB")
        memory = allowed_mib
    if allowed_cores is not None and allowed_cores < cores:
        narrowed.append(f"its control group allows {allowed_cores} of {cores} cores")
        cores = allowed_cores
    kernel = machine or _text(root / "proc/sys/kernel/arch") or os.uname().machine
    return Facts(
        architecture=ARCHITECTURES.get(kernel, kernel),
        cores=cores,
        memory_mib=memory,
        model=_board(root, cpuinfo),
        hints=tuple(_hints(root)),
        processor=_processor(cpuinfo),
        tegra=_text(root / "etc/nv_tegra_release").split("\n")[0].lstrip("# "),
        nvidia=_nvidia(root),
        narrowed=tuple(narrowed),
    )


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX)
    except OSError:
        return ""
    return data.decode(errors="replace").replace("\0", "").strip()


def _board(root: Path, cpuinfo: str) -> str:
    # A container hides /sys/firmware, to which the first points; a Raspberry Pi names itself in cpuinfo too.
    found = re.search(r"(?m)^Model\s*:\s*(.+)$", cpuinfo)
    return (
        _text(root / "sys/firmware/devicetree/base/model")
        or _text(root / "proc/device-tree/model")
        or (found[1].strip() if found else "")
    )


def _hints(root: Path) -> Iterator[str]:
    dmi = root / "sys/class/dmi/id"
    said = [_text(dmi / name) for name in ("sys_vendor", "product_name", "board_vendor", "board_name")]
    case = _text(dmi / "chassis_type")
    said.append(CASES.get(int(case), "") if case.isdigit() else "")
    yield from dict.fromkeys(text for text in said if text)


def _processor(cpuinfo: str) -> str:
    name = re.search(r"(?m)^model name\s*:\s*(.+)$", cpuinfo)
    parts = {int(part, 16) for part in re.findall(r"(?m)^CPU part\s*:\s*0x([0-9a-f]{3})$", cpuinfo)}
    arm = " and ".join(ARM_PARTS.get(part, f"ARM part 0x{part:x}") for part in sorted(parts))
    return name[1].strip() if name else arm


def _nvidia(root: Path) -> str:
    """The first NVIDIA GPU that the driver serves, by its name where that is told; a Tegra's own is on no bus."""
    served = [entry for entry in _entries(root / "sys/bus/pci/drivers/nvidia") if entry.name.count(":") == 2]
    if not served and not any(re.fullmatch(r"nvidia\d+", entry.name) for entry in _entries(root / "dev")):
        return ""
    for folder in sorted(_entries(root / "proc/driver/nvidia/gpus")):
        found = re.search(r"(?m)^Model:\s*(.+)$", _text(folder / "information"))
        if found:
            return found[1].strip()
    return "without a name"


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _allowed(root: Path) -> tuple[int | None, int | None]:
    """MiB of memory and whole cores that the control groups of this process allow; None: no limit."""
    memory: list[int] = []
    cores: list[int] = []
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        names = controllers.split(",")
        if not controllers:  # version 2 has all controllers in one tree
            for group in _upwards(mount, path):
                memory += _numbers(group / "memory.max")
                cores += _quota(_numbers(group / "cpu.max"))
        for group in _upwards(mount / "memory", path) if "memory" in names else ():
            memory += _numbers(group / "memory.limit_in_bytes")
        for group in _upwards(mount / "cpu", path) if "cpu" in names else ():
            cores += _quota(_numbers(group / "cpu.cfs_quota_us") + _numbers(group / "cpu.cfs_period_us"))
    memory = [number for number in memory if number < UNLIMITED]
    return min(memory) // MIB if memory else None, min(cores) if cores else None


def _quota(numbers: list[int]) -> list[int]:
    """Whole cores of a quota and its period; half a core is still one, because there are no threads fewer than one."""
    return [max(numbers[0] // numbers[1], 1)] if len(numbers) == 2 and numbers[1] else []


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """The folder of a control group and those above it; a container may see only the uppermost."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for count in range(len(parts), -1, -1):
        yield top.joinpath(*parts[:count])


def _numbers(path: Path) -> list[int]:
    """The numbers of a control file; none where it says `max` or -1, or is missing."""
    words = _text(path).split()
    return [int(word) for word in words] if words and all(word.isdigit() for word in words) else []
