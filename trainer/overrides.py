"""The overrides file of an `edged` on this machine: which adapter goes onto the model of a slot (edged.overrides)."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from trainer.files import write_whole


class OverridesError(ValueError):
    """The overrides file cannot be written anew; the message names it and the fix."""


def activate(path: Path, slot: str, adapter: Path) -> None:
    """Let the slot `slot` use the adapter whose release lies in the folder `adapter`; other slots stay as they are.

    The file is replaced as a whole: a running `edged` that watches it loads the adapter. Raises OverridesError, OSError.
    """
    slots = _read(path)
    slots[slot] = str(adapter.resolve())
    text = "# Written by `trainer train --activate`. Remove a table to take its adapter off, or the whole file.\n"
    text += "".join(f"\n[slots.{json.dumps(name)}]\nadapter = {json.dumps(each)}\n" for name, each in slots.items())
    write_whole(path, text.encode())
    path.chmod(0o644)  # the device's user reads it


def _read(path: Path) -> dict[str, str]:
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        slots = tables.pop("slots", {})
        found = {str(name): str(entry["adapter"]) for name, entry in slots.items() if set(entry) == {"adapter"}}
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise OverridesError(f"{path}: no overrides file ({error}): correct or remove it") from None
    if tables or len(found) != len(slots):
        raise OverridesError(f"{path}: holds more than slots.NAME.adapter: name a file of its own with --activate")
    return found
