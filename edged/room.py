"""Whether a release fits into memory, before anything loads it: beside the live model, or in its place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from edged.config import Slot as SlotConfig
from edged.core.limits import MIB, Bound, freed, mib, tightest, too_tight
from edged.machine import Memory
from edged.needs import PROCESS_BYTES, Need
from edged.slot import trim_memory
from edged.store import Store

NEEDS = "needs/"  # + slot: what releases took here when they were proven, by the SHA-256 of their manifests
NEEDS_MAX = 8  # of them are remembered for a slot
ADVICE_BESIDE = (
    'set swap = "replace" in [slots.{slot}], so that the old model leaves first, use a smaller model, or raise {limit}'
)
ADVICE_REPLACE = "use a smaller model, or raise {limit}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a release is not loaded; `passing`: it may fit later, because others use the memory now."""

    reason: str
    passing: bool


@dataclass(frozen=True, slots=True)
class Fit:
    """How a release can be proven: `beside` the live model, or `instead` of it, which has to leave first; and the bytes of
    data that the proving child may use (None: nothing limits it)."""

    how: Literal["beside", "instead"]
    memory_max: int | None


class Room:
    """Compares what releases need with what is left. `memory` None: nothing is known of limits, and all fits."""

    def __init__(self, memory: Memory | None, store: Store, configs: dict[str, SlotConfig]) -> None:
        self._memory, self._store, self._configs = memory, store, configs

    def own(self) -> int:
        """Bytes that the daemon and its children hold."""
        return self._memory.own() if self._memory else 0

    def measured(self, slot: str, sha256: str) -> Need | None:
        """What a release took when it was proven on this device; None: it never was."""
        known = (self._store.value(NEEDS + slot) or {}).get(sha256)
        return Need(**known) if known else None

    def remember(self, slot: str, sha256: str, need: Need) -> None:
        """Keep what a release was found to need."""
        known = self._store.value(NEEDS + slot) or {}
        known.pop(sha256, None)
        known[sha256] = asdict(need)
        self._store.set_value(NEEDS + slot, dict(list(known.items())[-NEEDS_MAX:]))

    def refusal(
        self, slot: str, need: Need, live: Need | None, live_release: str, *, alone: bool = False
    ) -> Refusal | None:
        """Why a release that needs `need` cannot be loaded now, beside the live one or in its place, as the slot says.

        `alone`: there is no live model to take into account, or it leaves.
        """
        config = self._configs[slot]
        replaces = alone or config.swap == "replace"
        back = live.where(config.isolation) if live is not None and replaces else 0
        bound = self._too_tight(need.where(config.isolation), back)
        if bound is None:
            return None
        return self._refuse(slot, need, need.where(config.isolation), live_release, bound, replaces)

    def to_prove(self, slot: str, need: Need, live: Need | None, live_release: str) -> Fit | Refusal:
        """How a release can be proven: proving takes a process of its own beside everything else."""
        config, size = self._configs[slot], need.model + PROCESS_BYTES
        beside = self._too_tight(size, 0)
        if beside is None:
            return Fit("beside", self._data_max(0))
        if config.swap != "replace" or live is None:
            return self._refuse(slot, need, size, live_release, beside, live is None, " to be proven")
        back = live.where(config.isolation)
        instead = self._too_tight(size, back)
        if instead is None:
            return Fit("instead", self._data_max(back))
        return self._refuse(slot, need, size, live_release, instead, True, " to be proven")

    def _too_tight(self, need: int, back: int) -> Bound | None:
        if self._memory is None:
            return None
        bound = too_tight(need, back, self._memory.bounds())
        if bound is None:
            return None
        trim_memory()  # perhaps it is only memory that nobody uses any more
        return too_tight(need, back, self._memory.bounds())

    def _data_max(self, back: int) -> int | None:
        bound = tightest(freed(self._memory.bounds(), back)) if self._memory else None
        return None if bound is None else max(MIB, bound.left - PROCESS_BYTES)

    def _refuse(
        self, slot: str, need: Need, size: int, live: str, bound: Bound, replaces: bool, what: str = ""
    ) -> Refusal:  # fmt: skip
        where = f" {'in place of' if replaces else 'beside'} {live}" if live else ""
        limit = "limits.memory_mib" if bound.name.startswith("limits.") else "that limit"
        advice = (ADVICE_REPLACE if replaces else ADVICE_BESIDE).format(slot=slot, limit=limit)
        if not bound.own:
            advice = "it is tried again; if that goes on, find out what else uses the memory"
        return Refusal(
            f"needs {'at least ' if need.floor else ''}{mib(size)} MiB{what}{where}; {bound.left // MIB} MiB of "
            f"{bound.name} are left: {advice}",
            not bound.own,
        )
