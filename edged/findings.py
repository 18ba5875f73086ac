"""What `edged check` finds: one thing that was looked at, how it is, and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edged.config import Settings

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`name` is the thing, `text` how it is, `fix` one sentence of what to do. `warning`: it works, but not for long or not
    well; `error`: the device would not do its work."""

    name: str
    level: Level
    text: str
    fix: str = ""

    @property
    def ok(self) -> bool:
        """Whether the device may be deployed as far as this goes."""
        return self.level != "error"

    def document(self) -> dict[str, Any]:
        """For scripts."""
        return {"name": self.name, "level": self.level, "ok": self.ok, "text": self.text, "fix": self.fix}


@dataclass(frozen=True, slots=True)
class Look:
    """What there is to look at. `status`: of the daemon that runs with this configuration, if one answers."""

    settings: Settings
    now: float  # seconds since the epoch
    config: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    status: Mapping[str, Any] | None = None
    proving: bool = True  # let the seeds answer their golden sets, which may take minutes
