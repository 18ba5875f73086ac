"""What `edged check` says about the profile: whether the machine is one that it is for, and whether it carries the models
that the slots begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edged.config import MIB, Settings, Slot
from edged.core.detect import Facts, conditions
from edged.core.lay import BUILT_IN
from edged.findings import Finding, Level, Look
from edged.profiles import Carries, Claim, Profile
from edged.wire.manifest import ReleaseManifest

# Of the daemon beside a bare process with the same model: 34 MiB (docs/benchmarks.md, `footprint`), and some more.
DAEMON_MIB = 40
READ_BYTES_MAX = 64 * MIB  # of a model file, to see whether it is quantised
QUANTISED = b"QuantizeLinear"  # the operator's name, as it stands in an ONNX file
DETECT = "`edged profile detect` names the profile for this machine; put it into [device]"


def profile(look: Look) -> Iterator[Finding]:
    """Which profile lies beneath, whether the machine matches it, and whether it carries what the slots begin with."""
    from edged.profile_facts import facts

    yield from findings(look.settings, facts())


def findings(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """The same for a machine of which these facts are known."""
    found: Profile | None = settings.profile
    if found is None:
        text = f"{BUILT_IN!r}: the built-in defaults, for any machine; `edged profile detect` may know better ones"
        yield Finding("profile", "ok", text)
    else:
        yield from _machine(found, facts)
    threads = sum(slot.threads for slot in settings.slots.values())
    if threads > max(facts.cores, len(settings.slots)):
        text = f"the slots have {threads} threads together, and there are {facts.cores} cores"
        yield Finding("threads", "warning", text, 'write threads = "auto" in each slot: they share the cores')
    if found is not None and found.carries is not None:
        yield from _seeds(found, found.carries, settings, facts)


def _machine(found: Profile, facts: Facts) -> Iterator[Finding]:
    missed = [condition for condition in conditions(found.detect.rule, facts) if not condition.holds]
    for condition in missed:
        level: Level = "error" if condition.topic == "architecture" else "warning"
        yield Finding("profile", level, f"{found.name} is for another machine: {condition.text}", DETECT)
    if not missed:
        yield Finding("profile", "ok", f"{found.name}, and this machine is one of those that it is for")


def _seeds(found: Profile, carries: Carries, settings: Settings, facts: Facts) -> Iterator[Finding]:
    from edged.releases import BadRelease, read_manifest

    needed = 0
    for name, slot in settings.slots.items():
        if slot.seed is None or slot.server is not None:
            continue
        try:
            manifest = read_manifest(slot.seed)
        except BadRelease:
            continue  # the finding about the slot says so
        claim = carries.claim(manifest.kind)
        reasons = [f"models of kind {manifest.kind}"] if claim is None else list(beyond(claim, slot, manifest, facts))
        if claim is not None:
            needed += claim.memory_mib * (2 if slot.swap == "beside" else 1)
        if reasons:
            text = f"{found.name} makes no claim for {manifest.release}: {'; '.join(reasons)}"
            fix = "try it on this device under load, or use a release that the profile carries (`edged profile show`)"
            yield Finding(f"slots.{name}", "warning", text, fix)
        else:
            yield Finding(f"slots.{name}", "ok", f"{found.name} claims to carry {manifest.release}")
    limit = settings.limits.memory_mib
    if needed and limit is not None:
        total = needed + DAEMON_MIB
        text = f"the models that the slots begin with may take {total} MiB while one is replaced; memory_mib = {limit}"
        fix = 'write swap = "replace" in the larger slots, use smaller models, or raise limits.memory_mib if there is more'
        yield Finding("limits.memory_mib", "ok" if total <= limit else "warning", text, "" if total <= limit else fix)


def beyond(claim: Claim, slot: Slot, manifest: ReleaseManifest, facts: Facts) -> Iterator[str]:
    """In what a release, run as `slot` says on a machine, goes beyond a claim; nothing: it is covered."""
    if claim.machine_mib is not None and facts.memory_mib < claim.machine_mib:
        yield f"the machine has {facts.memory_mib} MiB, it is claimed from {claim.machine_mib} on"
    entry = manifest.files.get("model")
    if entry is not None and entry.bytes > claim.file_mib * MIB:
        yield f"its model has {entry.bytes / MIB:.1f} MiB, claimed are {claim.file_mib:g}"
    if manifest.kind == "llm":
        asked = slot.extra.get("context_max", 0)
        if claim.context is not None and (not asked or asked > claim.context):
            yield f"context_max = {asked}{'' if asked else ' (all that the model can)'}, claimed are {claim.context} tokens"
        return
    if manifest.input_size is not None and claim.image_size is not None and max(manifest.input_size) > claim.image_size:
        yield f"it takes pictures of {max(manifest.input_size)} pixels, claimed are {claim.image_size}"
    quantised = entry is None or slot.seed is None or is_quantised(slot.seed / entry.path)
    if claim.precision == "int8" and not quantised:
        yield "it is not int8"


def is_quantised(path: Path) -> bool:
    """Whether an ONNX file computes with 8 bits somewhere; true where it cannot be read, which others say."""
    kept = b""
    try:
        with path.open("rb") as file:
            for _ in range(READ_BYTES_MAX // MIB):
                block = file.read(MIB)
                if QUANTISED in kept + block:
                    return True
                if not block:
                    return False
                kept = block[-len(QUANTISED) :]
    except OSError:
        return True
    return False
