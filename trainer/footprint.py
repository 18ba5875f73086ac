"""What a release takes of a device: measured in a child process with the options of a firmware profile, as a device proves
it before it runs it; and what the profile claims to carry.

Both by the device's own commands (`edged profile show`, `python -m edged.prove`). The memory is the highest that the proving
process had, libraries and all, which is what profiles claim: this process shares their pages, so a share of them would be
too little. It is that of this machine's processor; milliseconds are this machine's, so they are compared with the current
release's, or with a profile's bound that a slower board can only miss by more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edged.wire.manifest import Kind
from trainer.core.targets import Footprint, Target

SHOW_S_MAX = 60.0  # for `edged profile show`
GRACE_S = 30.0  # for the process around the proving one
_EDGED = "from edged.cli import main; main()"
# A small process in between: the kernel counts the memory of whoever starts a process as that process's own peak, and
# keeps one peak for all children.
_AROUND = """
import json, resource, subprocess, sys
try:
    done = subprocess.run([sys.executable, "-m", "edged.prove", *sys.argv[2:]], capture_output=True, text=True,
                          timeout=float(sys.argv[1]))
except subprocess.TimeoutExpired:
    print(json.dumps({"error": f"it did not prove itself within {float(sys.argv[1]):.0f} s"}))
    sys.exit(1)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # Linux counts in KiB
try:
    told = json.loads(done.stdout.splitlines()[-1])
except (ValueError, IndexError):
    last = (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
    told = {"error": f"the proving process ended with status {done.returncode}: {last}"}
print(json.dumps({**told, "peak_bytes": peak}))
"""


@dataclass(frozen=True, slots=True)
class Profile:
    """A firmware profile as far as the gate needs it: what it claims, and how it runs a model of this kind."""

    target: Target
    options: dict[str, Any] = field(default_factory=dict)
    prove_s_max: float = 60.0


def read_profile(name: str, kind: Kind) -> Profile:
    """The profile of this name (or path); what keeps it from being used is the target's problem, and refuses."""
    command = [sys.executable, "-c", _EDGED, "profile", "show", name, "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SHOW_S_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Profile(Target(name, problem=f"`edged profile show` failed: {error}"))
    try:
        told = json.loads(done.stdout)
    except ValueError:
        return Profile(Target(name, problem=(done.stderr.strip().splitlines() or ["it cannot be read"])[-1]))
    language, slot = kind in ("llm", "lora"), told["slot"]
    own = slot["language" if language else "vision"]
    cores = os.cpu_count() or 1
    options = {
        "threads": cores if slot["threads"] == "auto" else min(slot["threads"], cores),
        "providers": slot["providers"],
        "extra": own["extra"],
    }
    claim = ((told["carries"] or {}).get("llm" if language else kind)) or None
    if claim is None:
        target = Target(name, problem=f"it makes no claim for releases of kind {kind} ([carries] in its file)")
    else:
        target = Target(name, claim["file_mib"], claim["memory_mib"], own["latency_ms_max"])
    return Profile(target, options, slot["prove_s_max"])


def measure(folder: Path, profile: Profile, base: Path | None = None) -> Footprint:
    """What the whole release in `folder` (with golden set and manifest) takes; `base`: the folder of an adapter's base."""
    name = profile.target.profile
    if profile.target.problem:
        return Footprint(name, error=profile.target.problem)
    options = ["--options", json.dumps(profile.options), *([] if base is None else ["--base", str(base)])]
    command = [sys.executable, "-c", _AROUND, str(profile.prove_s_max), str(folder), *options]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=profile.prove_s_max + GRACE_S, check=False
        )
        answer = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Footprint(name, error=f"the proving process could not be watched: {error}")
    if "error" in answer:
        return Footprint(name, error=str(answer["error"]))
    return Footprint(name, int(answer["peak_bytes"]), float(answer["fastest_ms"]))


def measure_all(folder: Path, profiles: Sequence[Profile], base: Path | None = None) -> tuple[Footprint, ...]:
    """`measure` for each profile, one after the other."""
    return tuple(measure(folder, profile, base) for profile in profiles)
