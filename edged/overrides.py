"""The overrides file: which LoRA adapter goes onto the model of a slot, written by whoever trained it on this machine.

    [slots.clerk]
    adapter = "/var/lib/edged-trainer/runs/clerk-20260102T030405Z/candidate"

Law: it is laid over the configuration, below the environment, and may name adapters and nothing else, so that who writes it
decides neither whom this device talks to nor what it trusts. No file is the same as an empty one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from edged.core.lay import beneath

BYTES_MAX = 64 << 10


class OverridesError(ValueError):
    """The overrides file cannot be used; the message names it, the key and the fix."""


class _Slot(BaseModel):
    model_config = ConfigDict(extra="forbid")

    adapter: Path


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    slots: dict[str, _Slot] = {}


def laid(tables: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's tables with what its `device.overrides` names laid over them; raises OverridesError."""
    both = beneath(tables, environment)
    device = both.get("device")
    named = device.get("overrides") if isinstance(device, Mapping) else None
    if not named:
        return dict(tables)
    path = Path(str(named))
    adapters = read(path)
    slots = both.get("slots")
    for slot in adapters:
        if not isinstance(slots, Mapping) or slot not in slots:
            known = ", ".join(sorted(slots)) if isinstance(slots, Mapping) else ""
            raise OverridesError(f"{path}: slots.{slot}: no such slot; the configuration has {known or 'none'}")
    return beneath(tables, {"slots": {slot: {"adapter": str(adapter)} for slot, adapter in adapters.items()}})


def read(path: Path) -> dict[str, Path]:
    """Slot -> the folder of its adapter's release; nothing when there is no file. Raises OverridesError.

    Relative paths start at the file's folder.
    """
    import tomllib

    try:
        with path.open("rb") as file:
            data = file.read(BYTES_MAX + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OverridesError(f"{path}: {error.strerror}; let the user that runs edged read it, or remove it") from None
    if len(data) > BYTES_MAX:
        raise OverridesError(f"{path}: more than {BYTES_MAX} bytes: it only names adapters")
    try:
        content = _File.model_validate(tomllib.loads(data.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OverridesError(f"{path}: not TOML: {error}; write it again, or remove it") from None
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        key = ".".join(map(str, item["loc"]))
        unknown = item["type"] == "extra_forbidden"
        text = "only slots.NAME.adapter may be overridden: remove it" if unknown else item["msg"]
        raise OverridesError(f"{path}: {key}: {text}") from None
    return {slot: path.parent / entry.adapter for slot, entry in content.slots.items()}
