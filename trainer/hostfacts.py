"""What this host has to train with. Asks the driver's own tool about GPUs: importing torch to count them takes seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import psutil

from trainer.core.placement import MIB, Gpu, HostFacts

_QUERY = ("--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
_QUERY_S_MAX = 20.0


def host_facts(name: str, folder: Path) -> HostFacts:
    """What the host has now; `folder` is on the disk that training fills."""
    memory = psutil.virtual_memory()
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    disk = shutil.disk_usage(existing)
    return HostFacts(name, cores, int(memory.total), int(memory.available), disk.free, gpus())


def gpus(program: str = "nvidia-smi") -> tuple[Gpu, ...]:
    """The GPUs of this host, as the driver's `program` tells; none where there is no driver or it does not answer."""
    try:
        done = subprocess.run([program, *_QUERY], capture_output=True, text=True, timeout=_QUERY_S_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_gpus(done.stdout) if done.returncode == 0 else ()


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The lines of `nvidia-smi`: name, MiB in all, MiB free; what has no number (as "[N/A]" of some boards) counts as 0."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.rsplit(",", 2)]
        if len(fields) == 3:
            total, free = (int(field) * MIB if field.isdigit() else 0 for field in fields[1:])
            found.append(Gpu(fields[0], total, free))
    return tuple(found)
