"""What nobody gets around (L15), whichever way he comes: asked by the orders, under the command line, the tools and MCP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REASON_MIN = 5  # characters: "x" is no reason


def may_deploy(release: str, verdict: Mapping[str, Any] | None, unjudged: str, by: str) -> str:
    """Why this release may not go to the fleet; empty: it may.

    `verdict`: the gate's, in the release's own signed manifest; None: nobody judged it. `unjudged`: an operator's reason to
    roll out one that was made by hand and that no gate has seen; a refused one goes nowhere, whatever the reason.
    """
    if verdict is not None and not verdict.get("passed"):
        return f"{release}: the gate refused it; `trainer gate show {release}` says why"
    if verdict is not None:
        return ""
    if by != "operator":
        return (
            f"{release}: no gate has judged it, so only an operator may roll it out: `trainer rollout start --unjudged`"
        )
    if len(unjudged.strip()) < REASON_MIN:
        return (
            f"{release}: no gate has judged it; if it shall be rolled out all the same, say why: "
            f"`trainer rollout start {release} --unjudged REASON`"
        )
    return ""
