"""A profile's settings laid beneath a device's own: tables in, tables out.

Law of this file: what the configuration says wins, key by key; a profile only fills in what it leaves open.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

Tables = dict[str, Any]
Kind = Literal["vision", "language"]
AUTO = "auto"  # of a profile: the one for this machine; of threads: a share of the cores; of memory: what can be spared
BUILT_IN = "generic"  # no profile: edged's own defaults

# Of the memory that the process may use; the rest is the system's and everybody else's.
MEMORY_SHARE_MAX = 0.75
_VISION_TASKS = ("detect", "segment", "classify")
_LANGUAGE_TASK = "generate"


def beneath(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Tables:
    """Both together; where both have a key that is not a table in both, `upper` wins. Neither is changed."""
    out = dict(lower)
    for key, value in upper.items():
        below = out.get(key)
        out[key] = beneath(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def wanted(tables: Mapping[str, Any]) -> bool:
    """Whether a configuration asks for a profile, or for threads that only the machine tells."""
    device = tables.get("device")
    profile = device.get("profile", BUILT_IN) if isinstance(device, Mapping) else BUILT_IN
    return profile != BUILT_IN or any(slot.get("threads") == AUTO for slot in _tables(tables.get("slots")))


def slot_kind(slot: str, tables: Mapping[str, Any], seed: str | None) -> Kind | None:
    """What kind of model a slot of the configuration `tables` is for; `seed` is the kind of the release that it starts
    with, if that is known.

    None where nothing says it surely: an engine refuses the keys of another engine, so a wrong guess would cost the model.
    A task that is only the default says nothing, because every pipeline has it.
    """
    if seed is not None:
        return "language" if seed in ("llm", "lora") else "vision"
    users = [entry for table in ("pipelines", "responders") for entry in _tables(tables.get(table))]
    users = [entry for entry in users if entry.get("slot") == slot]
    tasks = {entry.get("task") for entry in users}
    if _LANGUAGE_TASK in tasks:
        return "language"
    sources = [entry["source"] for entry in users if isinstance(entry.get("source"), Mapping)]
    pictures = any(source.get("type") not in (None, "mqtt") for source in sources)
    return "vision" if pictures or tasks & set(_VISION_TASKS) else None


def _tables(entries: Any) -> list[Mapping[str, Any]]:
    values = entries.values() if isinstance(entries, Mapping) else ()
    return [entry for entry in values if isinstance(entry, Mapping)]


def share_cores(cores: int, slots: Iterable[str], fixed: Mapping[str, int], most: int | None = None) -> dict[str, int]:
    """Threads of each of `slots` that has no `fixed` number: equal shares of the cores that those leave, at most `most`.

    The first slots get what does not divide evenly. Together they are never more than the cores, except that every slot
    gets one thread.
    """
    names = [name for name in slots if name not in fixed]
    left = max(cores - sum(fixed.values()), 0)
    each, over = divmod(left, len(names)) if names else (0, 0)
    shares = {name: max(each + (place < over), 1) for place, name in enumerate(names)}
    return {name: share if most is None else min(share, most) for name, share in shares.items()}


def memory_limit(wanted: int | str | None, memory_mib: int) -> int | None:
    """MiB that the daemon may use: what a profile wants ("auto": all that is sensible), never more than the machine can
    spare. None where the profile wants no limit, or "auto" on a machine whose memory is not known."""
    if wanted is None:
        return None
    spare = int(memory_mib * MEMORY_SHARE_MAX) if memory_mib > 0 else None
    if wanted == AUTO:
        return spare
    return int(wanted) if spare is None else min(int(wanted), spare)
