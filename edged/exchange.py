"""One model for another within the device's memory: what does not fit is refused with numbers, and where the slot says
`swap = "replace"` the old model leaves before the new one comes. Used by the updater's worker, one thread.

Law: whenever a slot was vacated for a candidate that then does not come, what served before is loaded again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from edged.config import Slot as SlotConfig
from edged.core.limits import mib
from edged.engines.base import EngineError, EngineOptions
from edged.needs import PROCESS_BYTES, Need, accelerated, estimate
from edged.prove import Proof
from edged.releases import BadRelease, Releases, read_manifest
from edged.room import Refusal, Room
from edged.slot import InUse, Loaded, Slot
from edged.update_record import Record
from edged.wire.manifest import ReleaseManifest, ReleaseRef

log = logging.getLogger(__name__)

DRAIN_S_MAX = 600.0  # for the last item on the old model, a long answer of a language model on a slow board
MORE = 1.05  # a proof that ran short at some size is tried again when there is this much more
PASSING_S = 10.0  # how soon a load for which there was no room just now is tried again


class NoRoom(Exception):
    """The release cannot be loaded or proven with the memory that there is now; the message names the numbers. `passing`: it
    may fit later, because others use the memory now."""

    def __init__(self, reason: str, *, passing: bool = True) -> None:
        super().__init__(reason)
        self.passing = passing


class Exchange:
    """`restore`: load what is active in a slot. `options`: how the engine of a slot is to be opened."""

    def __init__(
        self, slots: dict[str, Slot], configs: dict[str, SlotConfig], releases: Releases, room: Room,
        options: Callable[[str], EngineOptions], restore: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._slots, self._configs, self._releases, self._room = slots, configs, releases, room
        self._options, self._restore = options, restore
        self._weights: dict[str, tuple[str, int]] = {}  # slot -> release (SHA-256) and the bytes that loading it took

    def known(self, record: Record) -> Refusal | None:
        """Before anything is fetched: why a release that was measured here before does not fit."""
        assert record.candidate is not None
        need = None if record.is_adapter else self._room.measured(record.slot, record.candidate.sha256)
        return self._beside_or_instead(record.slot, need) if need else None

    def refusal(self, record: Record) -> Refusal | None:
        """Why the candidate, whose files are here, can neither be proven nor loaded."""
        need = self._need(record)
        if not record.is_adapter:
            refused = self._beside_or_instead(record.slot, need)
            if refused:
                return refused
        fit = self._room.to_prove(record.slot, need, *self._live(record.slot))
        return fit if isinstance(fit, Refusal) else None

    def start_refusal(self, slot: str, ref: ReleaseRef, manifest: ReleaseManifest) -> Refusal | None:
        """Why a release cannot be loaded into an empty slot."""
        need = self._room.measured(slot, ref.sha256) or self._estimate(slot, ref, manifest)
        return self._room.refusal(slot, need, None, "", alone=True)

    @contextmanager
    def proving(self, record: Record) -> Iterator[int | None]:
        """Make room for a proof: yields the bytes of data that it may take, None for any.

        A slot that had to be vacated stays so for the candidate; if the block raises, or an adapter was proven, the model
        that left is back afterwards. Raises NoRoom, SlotStopped.
        """
        slot = self._slots[record.slot]
        fit = self._room.to_prove(record.slot, self._need(record), *self._live(record.slot))
        if isinstance(fit, Refusal):
            raise NoRoom(fit.reason, passing=fit.passing)
        if fit.how == "instead":
            log.info("slot %s: unloaded, so that %s can be proven", record.slot, record.target)
            self._vacate(slot)
        kept = False
        try:
            yield None if self._accelerated(record) else fit.memory_max
            kept = not record.is_adapter
        finally:
            if slot.vacated and not kept:
                self._restore(record.slot)

    def ran_short(self, record: Record, memory_max: int) -> None:
        """A proof needed more than it was allowed: remembered, so that it is not tried again with as little."""
        assert record.candidate is not None
        least = int(memory_max * MORE)
        kind = read_manifest(self._releases.folder(record.candidate)).kind
        self._room.remember(record.slot, record.candidate.sha256, Need(least, least + PROCESS_BYTES, kind))

    def proved(self, record: Record, proof: Proof) -> None:
        """What the proof measured counts from now on; raises NoRoom when the candidate does not fit after all."""
        assert record.candidate is not None
        if record.is_adapter or not proof.process_bytes:
            return
        kind = read_manifest(self._releases.folder(record.candidate)).kind
        need = Need(proof.memory_bytes, proof.process_bytes, kind, floor=False)
        self._room.remember(record.slot, record.candidate.sha256, need)
        log.info("%s took %d MiB while it was proven", record.candidate.release, mib(proof.memory_bytes))
        refused = self._beside_or_instead(record.slot, need)
        if refused:
            raise NoRoom(refused.reason, passing=refused.passing)

    def swap(self, record: Record, load: Callable[[], Loaded]) -> float:
        """Load the candidate and make it live; returns the milliseconds of `Slot.flip`.

        Raises NoRoom, and what `load` raises; what served before then serves again.
        """
        assert record.candidate is not None
        slot, need = self._slots[record.slot], self._need(record)
        if not slot.vacated:
            refused = self._beside_or_instead(record.slot, need)
            if refused:
                raise NoRoom(refused.reason, passing=refused.passing)
        try:
            if self._configs[record.slot].swap == "replace":
                self._vacate(slot)
                refused = self._beside_or_instead(record.slot, need)
                if refused:
                    raise NoRoom(refused.reason, passing=refused.passing)
            return slot.flip(load())
        finally:
            if slot.vacated:
                self._restore(record.slot)

    @contextmanager
    def weighing(self, slot: str, ref: ReleaseRef) -> Iterator[None]:
        """Measure what loading a release takes: that is what its unloading gives back. A seed was never proven."""
        before = self._room.own()
        yield
        self._weights[slot] = ref.sha256, max(0, self._room.own() - before)

    def check_again(self, name: str) -> None:
        """Raise EngineError when there is no room for the live model a second time, with other options."""
        live, release = self._live(name)
        refused = live and self._room.refusal(name, live, None, release, alone=True)
        if refused:
            raise EngineError(f"{release} {refused.reason}; restart edged to load it anew")

    def make_way(self, name: str) -> None:
        """Before what served earlier is loaded again: the live model leaves first, where the slot says so."""
        if self._configs[name].swap == "replace":
            self._slots[name].vacate()

    def _vacate(self, slot: Slot) -> None:
        try:
            slot.vacate(DRAIN_S_MAX)
        except InUse as error:
            raise NoRoom(f"{error}; it is tried again") from None

    def _beside_or_instead(self, slot: str, need: Need) -> Refusal | None:
        live, release = self._live(slot)
        return self._room.refusal(slot, need, live, release, alone=live is None)

    def _live(self, slot: str) -> tuple[Need | None, str]:
        """What the live model gives back when it leaves, and its release."""
        live = self._slots[slot].live
        if live is None:
            return None, ""
        need = self._room.measured(slot, live.ref.sha256) or self._estimate(slot, live.ref, live.manifest)
        sha256, weight = self._weights.get(slot, ("", 0))
        if need.floor and sha256 == live.ref.sha256:
            need = replace(need, model=max(need.model, weight), process=max(need.process, weight))
        return need, live.ref.release

    def _need(self, record: Record) -> Need:
        """What the candidate needs: measured, or estimated from its files. Raises BadRelease."""
        assert record.candidate is not None
        manifest = read_manifest(self._releases.folder(record.candidate))
        known = self._room.measured(record.slot, record.candidate.sha256)
        need = known or self._estimate(record.slot, record.candidate, manifest)
        if not record.is_adapter or manifest.base is None:
            return need
        try:
            base = self._estimate(record.slot, manifest.base, read_manifest(self._releases.folder(manifest.base)))
        except BadRelease:
            return need  # its base is not here: that is said elsewhere
        return Need(need.model + base.model, need.model + base.process, base.kind)

    def _accelerated(self, record: Record) -> bool:
        assert record.candidate is not None
        return accelerated(read_manifest(self._releases.folder(record.candidate)), self._options(record.slot))

    def _estimate(self, slot: str, ref: ReleaseRef, manifest: ReleaseManifest) -> Need:
        return estimate(self._releases.folder(ref), manifest, self._options(slot))
