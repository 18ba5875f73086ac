"""What serves in each slot: loaded at a start, again with other options, and back again after a swap that came to nothing.
On the updater's worker."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from edged.core.update import State
from edged.engines.base import EngineError
from edged.exchange import PASSING_S, Exchange
from edged.releases import BadRelease, Releases, read_manifest, verify
from edged.room import Refusal
from edged.slot import Loaded, Slot
from edged.store import Store
from edged.update_record import ADAPTER, Record
from edged.wire.manifest import ReleaseManifest, ReleaseRef

log = logging.getLogger(__name__)

FLIP_S = 1.0  # how often it is looked whether a vacated slot is still to be flipped


class InService:
    """`loaded`: load a release as its slot is configured. `on_worker`: do an act for a record there."""

    def __init__(
        self, slots: dict[str, Slot], releases: Releases, store: Store, report: Callable[[], None], say: Callable[..., None],
        current: Callable[[str], Record], exchange: Exchange,
        loaded: Callable[[Record, ReleaseRef, ReleaseManifest], Loaded],
        on_worker: Callable[[Callable[[Record], None], Record], None], stopping: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._slots, self._releases, self._store, self._report, self._say = slots, releases, store, report, say
        self._current, self._exchange, self._loaded = current, exchange, loaded
        self._on_worker, self._stopping = on_worker, stopping
        self._refused: set[tuple[str, str]] = set()  # slot, release: said not to fit at a start

    def load_active(self, record: Record, *, restoring: bool = False) -> None:
        """Load the active release, or the one before it. `restoring`: it has just served, so it fits."""
        live = self._slots[record.slot].live
        if live is not None and live.ref == record.active:
            return
        for ref in (record.active, record.previous):
            if ref is None:
                continue
            try:
                manifest = verify(self._releases.folder(ref), ref)
                refused = None if restoring else self._exchange.start_refusal(record.slot, ref, manifest)
                if refused:
                    self._not_at_start(record, ref, refused)
                    continue
                loaded = self._loaded(record, ref, manifest)
            except (BadRelease, EngineError) as error:
                log.error("slot %s: %s does not load: %s", record.slot, ref.release, error)
                self._say("model_not_loaded", f"{record.slot}: {ref.release}: {error}", release=ref.release)
                continue
            self._slots[record.slot].flip(loaded)
            self.attach_if_it_fits(record.slot, ref)
            self._report()
            return

    def load_anew(self, record: Record) -> None:
        """Load what serves once more, as its slot is configured now."""
        live = self._slots[record.slot].live
        if live is None:
            self.load_active(record)
            return
        try:
            manifest = verify(self._releases.folder(live.ref), live.ref)
            self._exchange.check_again(record.slot)
            loaded = self._loaded(record, live.ref, manifest)
        except (BadRelease, EngineError) as error:
            log.error("slot %s: %s does not load as it is configured now: %s", record.slot, live.ref.release, error)
            text = f"{record.slot}: {live.ref.release} goes on with the options before: {error}"
            self._store.count("slots_not_reloaded")
            self._say("slot_not_reloaded", text, release=live.ref.release)
            return
        self._slots[record.slot].flip(loaded)
        self.attach_if_it_fits(record.slot, live.ref)
        self._report()

    def restore(self, slot: str) -> None:
        """The slot was vacated in vain: load what served before."""
        if self._stopping():
            return
        self.load_active(self._current(slot), restoring=True)
        if self._slots[slot].live is None:
            self._slots[slot].give_up()
            self._later(slot)

    def take_candidate_back(self, record: Record) -> None:
        """Neither the active nor the previous release loads into the vacated slot: a bad model is better than none."""
        slot, ref = self._slots[record.slot], record.candidate
        assert ref is not None
        try:
            slot.flip(self._loaded(record, ref, verify(self._releases.folder(ref), ref)))
        except (BadRelease, EngineError) as error:
            log.error("slot %s: %s does not load any more either: %s", record.slot, ref.release, error)
            slot.give_up()
            self._later(record.slot)

    def _not_at_start(self, record: Record, ref: ReleaseRef, refused: Refusal) -> None:
        """An active release does not fit: said once, and tried again when that may help."""
        if (record.slot, ref.sha256) not in self._refused:
            self._refused.add((record.slot, ref.sha256))
            log.error("slot %s: %s is not loaded: %s", record.slot, ref.release, refused.reason)
            self._store.count("models_refused")
            self._say("model_not_loaded", f"{record.slot}: {ref.release} {refused.reason}", release=ref.release)
        if refused.passing:
            self._later(record.target)

    def _later(self, target: str) -> None:
        """Load what is active after a while, if nothing serves by then."""

        def again() -> None:
            slot = self._slots.get(target)
            if slot is not None and slot.live is None and not slot.vacated:
                self._on_worker(self.load_active, self._current(target))

        _after(PASSING_S, again)

    def await_flip(self, record: Record) -> None:
        """After a proof in a vacated slot: if something else is wanted by now, what served before comes back."""

        def look() -> None:
            if not self._stopping() and self._vacated(record):
                if self._to_be_flipped(record):
                    _after(FLIP_S, look)
                else:
                    self._on_worker(self._unless_flipped, record)

        if self._vacated(record):
            _after(FLIP_S, look)

    def _unless_flipped(self, record: Record) -> None:
        if self._vacated(record) and not self._to_be_flipped(record):
            self.restore(record.slot)

    def _vacated(self, record: Record) -> bool:
        slot = self._slots.get(record.slot)
        return slot is not None and slot.vacated

    def _to_be_flipped(self, record: Record) -> bool:
        now = self._current(record.target)
        return now.candidate == record.candidate and now.state in {State.PROVING, State.STAGED}

    def attach_if_it_fits(self, slot: str, base: ReleaseRef) -> None:
        """After a base was (re)loaded: its adapter again, if there is one for exactly this base."""
        adapter = self._current(slot + ADAPTER).active
        if adapter is None:
            return
        folder = self._releases.folder(adapter)
        try:
            manifest = read_manifest(folder)
            if manifest.base == base:
                self._slots[slot].attach(adapter, folder / manifest.files["adapter"].path, manifest.calibration)
        except (BadRelease, EngineError) as error:
            log.error("slot %s: adapter %s: %s", slot, adapter.release, error)
            self._say("adapter_not_loaded", f"{slot}: {adapter.release}: {error}", release=adapter.release)


def _after(seconds: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
