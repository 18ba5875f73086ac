"""What `edged check` finds out about whose releases this device accepts."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from edged.findings import Finding, Look
from edged.trust import Untrusted, describe, read_root


def trust(look: Look) -> Iterator[Finding]:
    """The root that this device was enrolled with, and whether the clock lets it install anything."""
    config = look.settings.trust
    state = describe(config, look.settings.device.state_dir / "trust")
    if config.unsigned:
        text = "unsigned = true: whoever may publish desired state may install anything"
        yield Finding("trust", "warning", text, "enrol this device, and name its root in [trust] instead")
        return
    if config.root is None:
        text = "no root: every release that the fleet desires is refused; seeds work"
        yield Finding("trust", "warning", text, "enrol this device, which sets `root` in [trust]")
        return
    try:
        version, expires = read_root(config.root)
    except Untrusted as error:
        yield Finding("trust", "error", f"trust.root: {error}", "copy the file from the trainer again, or enrol again")
        return
    seen = f", checked against root {state['root_version']} before" if "root_version" in state else ""
    if expires < look.now and not state.get("root_version", 0) > version:
        text = f"{config.root}: root {version} has expired; a newer one must come from the trainer{seen}"
        yield Finding("trust", "warning", text, "extend it with `trainer keys renew root`")
    else:
        yield Finding("trust", "ok", f"releases must be signed by what root {version} names{seen}")
    if state["floor"] is not None and look.now < state["floor"]:
        text = f"the clock is before {datetime.fromtimestamp(state['floor'], UTC):%Y-%m-%d %H:%M} UTC, the last check"
        yield Finding("trust", "error", f"{text}: nothing can be installed", "set the clock, best by a time server")
