"""Whether a release fits the devices that it is for: size, memory and latency against what their profiles claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.core.checks import Check, maximum

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Target:
    """What a firmware profile claims to carry of a release's kind. `problem`: why there is no such claim."""

    profile: str
    file_mib_max: float | None = None
    memory_mib_max: float | None = None  # of a process that holds the model alone
    latency_ms_max: float | None = None  # None: the profile sets none, the current release is the measure
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a release took in a process of its own with the options of a profile, on this machine: bytes of that process,
    milliseconds of its fastest answer. `error`: why that is not known."""

    profile: str
    process_bytes: int | None = None
    fastest_ms: float | None = None
    error: str = ""


def target_checks(
    targets: Sequence[Target],
    model_bytes: int | None,
    candidate: Sequence[Footprint],
    current: Sequence[Footprint] | None,
    ratio_max: float,
) -> list[Check]:
    """`size`, `memory` and `latency` for each target; `current` is None when no release runs yet."""
    checks = []
    for target in targets:
        if target.problem:
            text = f"profile {target.profile}: {target.problem}"
            checks += [Check(f"{what} ({target.profile})", False, None, None, text) for what in ("size", "memory")]
            continue
        found = _of(candidate, target.profile)
        checks += [
            _bounded("size", target, _mib(model_bytes), target.file_mib_max, "MiB of the model's file", ""),
            _bounded("memory", target, _mib(found.process_bytes), target.memory_mib_max, "MiB of its process", found.error),
            _latency(target, found, None if current is None else _of(current, target.profile), ratio_max),
        ]  # fmt: skip
    return checks


def _of(footprints: Sequence[Footprint], profile: str) -> Footprint:
    known = [each for each in footprints if each.profile == profile]
    return known[0] if known else Footprint(profile, error="it was not measured")


def _mib(count: int | None) -> float | None:
    return None if count is None else count / MIB


def _bounded(what: str, target: Target, value: float | None, bound: float | None, unit: str, error: str) -> Check:
    name, text = f"{what} ({target.profile})", f"{target.profile}: {unit}"
    if bound is None:
        return Check(name, False, value, None, f"{text}: the profile gives no bound")
    if error:
        return Check(name, False, None, bound, f"{text}: not measured: {error}")
    return maximum(name, value, bound, text)


def _latency(target: Target, found: Footprint, current: Footprint | None, ratio_max: float) -> Check:
    name, text = f"latency ({target.profile})", f"{target.profile}: milliseconds of the fastest answer"
    if found.error:
        return Check(name, False, None, target.latency_ms_max, f"{text}: not measured: {found.error}")
    if target.latency_ms_max is not None:
        return maximum(name, found.fastest_ms, target.latency_ms_max, text)
    if current is None:
        return Check(name, True, found.fastest_ms, None, f"{text}: no bound, and no current release to compare with")
    text += " over the current release's"
    if current.error or not current.fastest_ms:
        return Check(name, False, None, ratio_max, f"{text}: the current release: {current.error or 'not measured'}")
    return maximum(name, None if found.fastest_ms is None else found.fastest_ms / current.fastest_ms, ratio_max, text)
