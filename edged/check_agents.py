"""Whether the configured agents can be made: what `edged run` would only say when it starts."""

from __future__ import annotations

from collections.abc import Iterator

from edged.agency import MISSING
from edged.findings import Finding, Look
from edged.wire.manifest import ReleaseManifest

FIX = "correct the key, or the module that it names"


def agents(look: Look) -> Iterator[Finding]:
    """Every agent and every peer: schemas, tools, factory; and that its slot holds a language model."""
    settings = look.settings
    if not settings.agents and not settings.peers:
        return
    try:
        from edged.agents import building
    except ImportError as error:
        yield Finding("agents", "error", f"agents are configured, and a package is missing: {error.name}", MISSING)
        return
    building.let_find(look.config)
    for name, agent in settings.agents.items():
        wrong = list(building.faults(name, agent)) + list(_slot(look, name, agent.slot))
        for text in wrong:
            yield Finding(f"agents.{name}", "error", text, FIX)
        if not wrong and (unmasked := _unmasked(look, name, agent.slot)):
            yield Finding(f"agents.{name}", "error", unmasked, MISSING)
        elif not wrong:
            tools = f", tools {', '.join(each.rpartition(':')[2] for each in agent.tools)}" if agent.tools else ""
            yield Finding(f"agents.{name}", "ok", f"{agent.made_by} on slot {agent.slot}{tools}")
    for name, peer in settings.peers.items():
        wrong = list(building.peer_faults(name, peer))
        for text in wrong:
            yield Finding(f"peers.{name}", "error", text, FIX)
        if not wrong:
            yield Finding(f"peers.{name}", "ok", f"agent {peer.agent} of device {peer.device}")


def _slot(look: Look, name: str, slot: str) -> Iterator[str]:
    manifest = _seed(look, slot)
    if manifest is not None and manifest.kind != "llm":
        yield (
            f"agents.{name}.slot = {slot!r}: its seed {manifest.release} is of kind {manifest.kind}; an agent needs a slot "
            "with a language model"
        )


def _unmasked(look: Look, name: str, slot: str) -> str:
    """Why the slot's model cannot be held to the form of a step; "" where it can."""
    from edged.engines.token_mask import MISSING, installed

    manifest = _seed(look, slot)
    if manifest is None or manifest.engine != "onnx_phi" or installed():
        return ""
    return f"agents.{name}.slot = {slot!r}: its seed {manifest.release} is an ONNX model, and {MISSING}"


def _seed(look: Look, slot: str) -> ReleaseManifest | None:
    from edged.releases import BadRelease, read_manifest

    seed = look.settings.slots[slot].seed
    try:
        return None if seed is None else read_manifest(seed)
    except BadRelease:
        return None  # the slot's own finding says so
