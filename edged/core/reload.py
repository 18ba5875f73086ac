"""What a new configuration changes in a running daemon, and what it cannot: decided before anything is touched.

A configuration is here a tree of plain tables, as it is written. Law: a key that this file does not name needs a restart, so
that no part of the daemon goes on with a value that `edged status` no longer shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Tables = Mapping[str, Any]

# Applied while the daemon runs, with everything below them.
LIVE = ("device.group", "device.tier", "device.overrides", "host", "delivery", "store", "slots", "pipelines",
        "responders")  # fmt: skip
# Of a slot: read when they are next needed. Any other option of a slot is its engine's, which is loaded anew.
SLOT_READ_LATER = frozenset({"seed", "adapter", "probation_s", "prove_s_max", "swap"})
PIPELINE_READ_LATER = frozenset({"policy"})
RESPONDER_READ_LATER = frozenset({"policy", "wait_s", "escalate_to"})


@dataclass(frozen=True, slots=True)
class Parts:
    """The names of one kind of part. `changed` is replaced by a new one, or (of a slot) loaded anew; `adjusted` goes on
    and reads its new configuration."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    adjusted: tuple[str, ...] = ()

    @property
    def ended(self) -> tuple[str, ...]:
        """Those whose present form ends."""
        return self.removed + self.changed

    @property
    def begun(self) -> tuple[str, ...]:
        """Those that begin in a new form."""
        return self.added + self.changed


@dataclass(frozen=True, slots=True)
class Change:
    """From one configuration to the next. `keys`: every key whose value differs, in dotted form; `restart`: those of them
    that no running daemon can take on."""

    keys: tuple[str, ...]
    restart: tuple[str, ...]
    slots: Parts
    pipelines: Parts
    responders: Parts


def compare(old: Tables, new: Tables) -> Change:
    """What differs, and what that means."""
    keys = tuple(sorted(_differing("", old, new)))
    return Change(
        keys,
        tuple(key for key in keys if not _live(key)),
        _parts(old["slots"], new["slots"], SLOT_READ_LATER),
        _parts(old["pipelines"], new["pipelines"], PIPELINE_READ_LATER),
        _parts(old["responders"], new["responders"], RESPONDER_READ_LATER),
    )


def _live(key: str) -> bool:
    return any(key == live or key.startswith(live + ".") for live in LIVE)


def _differing(prefix: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        missing = object()
        found: list[str] = []
        for name in old.keys() | new.keys():
            key = f"{prefix}.{name}" if prefix else name
            before, after = old.get(name, missing), new.get(name, missing)
            # A part that comes or goes is one change, not one of each of its keys.
            found += [key] if before is missing or after is missing else _differing(key, before, after)
        return found
    return [] if old == new else [prefix]


def _parts(old: Tables, new: Tables, read_later: frozenset[str]) -> Parts:
    changed: list[str] = []
    adjusted: list[str] = []
    for name in (name for name in old if name in new and old[name] != new[name]):
        keys = old[name].keys() | new[name].keys()
        rest = {key for key in keys if old[name].get(key) != new[name].get(key)} - read_later
        (changed if rest else adjusted).append(name)
    return Parts(
        tuple(name for name in new if name not in old),
        tuple(name for name in old if name not in new),
        tuple(changed),
        tuple(adjusted),
    )
