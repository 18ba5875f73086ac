"""Which host may train what: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Gpu:
    """One graphics processor and its memory in bytes."""

    name: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a host has. Memory and disk in bytes; the disk is that of the trainer's data."""

    name: str
    cores: int
    memory_bytes: int
    memory_free_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, slots=True)
class Needs:
    """What training a model takes, in MiB; 0: any. `gpu_mib`: free memory of one GPU."""

    gpu_mib: int = 0
    memory_mib: int = 0
    disk_mib: int = 0


def misfit(needs: Needs, host: HostFacts) -> str:
    """Why a host cannot train a model; "": it can."""
    gpu = max((each.free_bytes for each in host.gpus), default=0)
    rows: Sequence[tuple[str, int, int]] = (
        ("of GPU memory", needs.gpu_mib, gpu),
        ("of memory", needs.memory_mib, host.memory_free_bytes),
        ("of disk", needs.disk_mib, host.disk_free_bytes),
    )
    short = [f"{need} MiB {what}, {have // MIB} MiB are free" for what, need, have in rows if have < need * MIB]
    return f"{host.name} cannot train it: it takes {'; '.join(short)}" if short else ""
