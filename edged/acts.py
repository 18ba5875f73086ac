"""The slow acts of an update: fetch, verify, prove, load, flip, flip back. They run on one worker thread, in order.

Each gets a copy of the record, may be repeated, and answers with an event for the control loop.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edged.beats import Beats
from edged.config import Slot as SlotConfig
from edged.core.update import Effect, Event, State
from edged.engines.base import EngineError, EngineOptions, installed_engines
from edged.exchange import PASSING_S, Exchange, NoRoom
from edged.fetch import FetchError, WrongContent
from edged.in_service import InService
from edged.machine import Memory
from edged.named import bring
from edged.prove import ProveCancelled, ProveFailed, ProveShort, prove, too_slow
from edged.releases import BadRelease, Releases, read_manifest, verify
from edged.room import Refusal, Room
from edged.slot import Loaded, Slot, SlotStopped, load
from edged.store import Store, StoreError
from edged.trust import Untrusted
from edged.update_record import ADAPTER, Record, Seeded, UpdateEvent
from edged.wire.manifest import Calibration, ReleaseManifest, ReleaseRef
from edged.wire.messages import Progress

__all__ = ["ADAPTER", "Acts", "Carrier", "Record", "Seeded", "UpdateEvent"]

log = logging.getLogger(__name__)

THREAD = "updater"
# Of the worker, from one sign of life to the next: hashing and loading gigabytes from an SD card gives none.
STILL_S_MAX = 1800.0
PROVEN = "proven/"  # + slot: the release that has answered its whole golden set here, and the engines that it did it on


@dataclass(frozen=True, slots=True)
class Carrier:
    """How the bytes of a release get here: fetch the manifest, then each blob, into a folder, until the third argument
    says that nobody wants them. Raises FetchError, Untrusted, WrongContent or BadRelease. `progress`: how far a release
    is."""

    fetch: Callable[[ReleaseRef, Path, Callable[[], bool]], None]
    progress: Callable[[ReleaseRef], Progress | None] = lambda _ref: None


class Acts:
    """Does what the update table's effects ask for, one after the other."""

    def __init__(
        self, slots: dict[str, Slot], configs: dict[str, SlotConfig], releases: Releases, store: Store, carrier: Carrier,
        post: Callable[[UpdateEvent | Seeded], None], report: Callable[[], None], say: Callable[..., None],
        current: Callable[[str], Record], engine_error: Callable[..., None], beats: Beats,
        memory: Memory | None = None,
    ) -> None:  # fmt: skip
        """`current`: the record of a target as the control loop has it now. `engine_error`: counts one for a slot.
        `memory`: its limits; None: there are none."""
        self._beats = beats
        self._slots, self._configs, self._releases, self._store = slots, configs, releases, store
        self._carrier, self._post, self._report, self._say, self._current = carrier, post, report, say, current
        self._engine_error = engine_error
        self._exchange = Exchange(
            slots, configs, releases, Room(memory, store, configs), self._options_of,
            lambda slot: self._in_service.restore(slot),
        )  # fmt: skip
        self._in_service = InService(
            slots, releases, store, report, say, current, self._exchange, self._loaded, self._later,
            lambda: self._stopping,
        )  # fmt: skip
        self._stop = threading.Event()
        self._work = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD)
        self._idle = threading.Event()
        self._idle.set()
        self._stopping = False
        self._untrusted: dict[str, str] = {}  # target -> why its release was not trusted, as it was last said
        self._slow: dict[Effect, Callable[[Record], None]] = {
            Effect.ADMIT: self._admit,
            Effect.DOWNLOAD: self._download,
            Effect.VERIFY: self._verify,
            Effect.PROVE: self._prove,
            Effect.FLIP: self._flip,
            Effect.FLIP_BACK: self._flip_back,
        }

    def submit(self, effect: Effect, record: Record) -> bool:
        """Begin a slow effect; false when it is none."""
        act = self._slow.get(effect)
        if act is None:
            return False
        self._work.submit(self._guard, act, record.model_copy())
        return True

    def load(self, record: Record) -> None:
        """Load what is active, at start."""
        self._work.submit(self._guard, self._in_service.load_active, record.model_copy())

    def _later(self, act: Callable[[Record], None], record: Record) -> None:
        """For other threads: do this on the worker."""
        if not self._stopping:
            self._work.submit(self._guard, act, record)

    def reload(self, record: Record) -> None:
        """Load what serves in the slot once more, as it is configured now."""
        self._work.submit(self._guard, self._in_service.load_anew, record.model_copy())

    def install(self, record: Record, seed: Path) -> None:
        """Install a slot's seed; `Seeded` says that it is here."""
        self._work.submit(self._guard, partial(self._install, seed), record.model_copy())

    def installed(self, slot: str, seed: Path) -> ReleaseRef | None:
        """Install a slot's seed here and now; None, and said why, when it cannot be."""
        try:
            return self._releases.install(seed)
        except (BadRelease, OSError) as error:
            log.error("slot %s: seed: %s", slot, error)
            self._say("bad_seed", f"slots.{slot}.seed: {error}")
            return None

    def detach(self, record: Record) -> None:
        """Take the slot's adapter off."""
        self._work.submit(self._guard, self._take_off, record.model_copy())

    def stop(self, seconds_max: float | None = None) -> bool:
        """End the worker; what it was doing goes on after the next start. False when it has not ended in time."""
        self._stopping = True
        self._stop.set()
        self._work.shutdown(wait=False, cancel_futures=True)
        ended = self._idle.wait(seconds_max)
        self._beats.forget(THREAD)
        return ended

    def serves(self, record: Record) -> bool:
        """Whether the candidate is what answers now; after a restart it is loaded again first."""
        live = self._slots[record.slot].live
        return live is not None and record.candidate == (live.adapter if record.is_adapter else live.ref)

    def _guard(self, act: Callable[[Record], None], record: Record) -> None:
        self._idle.clear()
        self._beats.watch(THREAD, STILL_S_MAX)
        try:
            self._see_through(act, record)
        finally:
            self._beats.forget(THREAD)
            self._idle.set()

    def _see_through(self, act: Callable[[Record], None], record: Record) -> None:
        try:
            if record.slot in self._slots:  # else the configuration has no such slot any more
                act(record)
        except (SlotStopped, ProveCancelled):
            return
        except Exception as error:  # a bug of ours must not leave an update hanging without a reason
            if record.slot not in self._slots:  # it went while it was worked on
                log.info("update %s: given up, its slot is gone: %s", record.target, error)
                return
            log.exception("update %s", record.target)
            self._store.count("updater_faults")
            self._fail(record, f"{type(error).__name__}: {error}")

    def _fail(self, record: Record, reason: str) -> None:
        """The failure that the table knows for this state."""
        event = {
            State.ACCEPTED: Event.REFUSED,
            State.DOWNLOADING: Event.FETCH_FAILED,
            State.VERIFYING: Event.VERIFY_FAILED,
            State.PROVING: Event.PROVE_FAILED,
            State.STAGED: Event.FLIP_FAILED,
            State.SWITCHED: Event.FLIP_FAILED,
        }.get(record.state)
        if event is not None:
            self._answer(record, event, reason)

    def _answer(self, record: Record, event: Event, reason: str = "", **more: Any) -> None:
        self._post(UpdateEvent(record.target, record.candidate, event, reason, **more))

    def _unwanted(self, record: Record) -> bool:
        """Whether the daemon stops, or the control loop has gone on from where this act began."""
        self._beats.beat(THREAD)  # who asks this again and again moves
        current = self._current(record.target)
        return self._stopping or (current.state, current.candidate) != (record.state, record.candidate)

    def _options(self, record: Record) -> EngineOptions:
        return self._options_of(record.slot)

    def _options_of(self, slot: str) -> EngineOptions:
        config = self._configs[slot]
        return EngineOptions(config.threads, tuple(config.providers), config.engine_keys())

    def _loaded(self, record: Record, ref: ReleaseRef, manifest: ReleaseManifest) -> Loaded:
        """Load a release as its slot is configured; raises EngineError.

        What has answered its whole golden set on this device, on the engines that are installed now, answers one input of
        it: a start is not the time to find out again what is known.
        """
        isolation = self._configs[record.slot].isolation
        ended = partial(self._process_ended, record.slot, ref.release)
        known = self._store.value(PROVEN + record.slot) == self._proof(ref)
        with self._exchange.weighing(record.slot, ref):
            loaded = load(ref, self._releases.folder(ref), manifest, self._options(record), isolation, ended,
                          golden_max=1 if known else None)  # fmt: skip
        if not known:
            with suppress(StoreError):  # the next start finds it out once more
                self._store.set_value(PROVEN + record.slot, self._proof(ref))
        return loaded

    def _proof(self, ref: ReleaseRef) -> list[str]:
        return [ref.sha256, *installed_engines()]

    def _process_ended(self, slot: str, release: str, how: str, in_hand: bool) -> None:
        """An engine's process died and is started again. Called by the thread that supervises it."""
        self._store.count("engine_ends")
        if not in_hand:  # else the pipeline that had the request reports it
            self._engine_error(slot, ended=True)
        self._say("engine_ended", f"{slot}: {how}", release=release)

    def _install(self, seed: Path, record: Record) -> None:
        self._post(Seeded(record.slot, self.installed(record.slot, seed)))

    def _admit(self, record: Record) -> None:
        assert record.candidate is not None
        bad = self._store.bad(record.candidate.sha256)
        if bad:
            self._answer(record, Event.REFUSED, f"known to be bad: {bad}")
            return
        refused = self._exchange.known(record)
        if refused:
            self._refuse(record, refused)
        else:
            self._answer(record, Event.ADMITTED)

    def _refuse(self, record: Record, refused: Refusal) -> None:
        self._store.count("models_refused")
        self._answer(record, Event.REFUSED, refused.reason, passing=refused.passing, at_start=not refused.passing)

    def _download(self, record: Record) -> None:
        assert record.candidate is not None
        folder = self._releases.folder(record.candidate)
        try:
            bring(self._releases, self._configs[record.slot], record)
        except (BadRelease, OSError) as error:  # it may be half copied yet
            self._answer(record, Event.FETCH_FAILED, str(error), passing=True)
            return
        try:
            self._carrier.fetch(record.candidate, folder, lambda: self._unwanted(record))
        except (WrongContent, BadRelease) as error:
            self._answer(record, Event.VERIFY_FAILED, str(error))
        except Untrusted as error:
            self._store.count("releases_untrusted")
            if self._untrusted.get(record.target) != str(error):  # it is tried again and again, and said once
                self._untrusted[record.target] = str(error)
                self._say("release_untrusted", f"{record.target}: {error}", release=record.candidate.release)
            self._answer(record, Event.FETCH_FAILED, str(error), passing=True)
        except (FetchError, OSError) as error:
            self._answer(record, Event.FETCH_FAILED, str(error), passing=True)
        else:
            self._answer(record, Event.DOWNLOADED)

    def _verify(self, record: Record) -> None:
        assert record.candidate is not None
        try:
            manifest = verify(self._releases.folder(record.candidate), record.candidate)
        except BadRelease as error:
            self._answer(record, Event.VERIFY_FAILED, str(error))
            return
        if (manifest.kind == "lora") != record.is_adapter:
            self._answer(record, Event.VERIFY_FAILED, f"a release of kind {manifest.kind} cannot go to {record.target}")
            return
        live = self._slots[record.slot].live
        if live is not None and not record.is_adapter and live.manifest.kind != manifest.kind:
            reason = f"{record.target} runs releases of kind {live.manifest.kind}, this one is of kind {manifest.kind}"
            self._answer(record, Event.VERIFY_FAILED, reason)
            return
        try:
            self._base(record)
        except BadRelease as error:
            self._answer(record, Event.REFUSED, str(error), passing=True)
            return
        refused = self._exchange.refusal(record)
        if refused:
            self._refuse(record, refused)
        else:
            self._answer(record, Event.VERIFIED)

    def _base(self, record: Record) -> Path | None:
        """The folder of the base that an adapter goes onto; None for a whole model. Raises BadRelease."""
        if not record.is_adapter:
            return None
        assert record.candidate is not None
        live = self._slots[record.slot].live
        wanted = read_manifest(self._releases.folder(record.candidate)).base
        if live is None or wanted != live.ref:
            raise BadRelease(
                f"adapter {record.candidate.release} is for {wanted.release if wanted else 'no base'}, "
                f"but {record.slot} runs {live.ref.release if live else 'nothing'}"
            )
        return self._releases.folder(live.ref)

    def _prove(self, record: Record) -> None:
        assert record.candidate is not None
        config = self._configs[record.slot]
        memory_max: int | None = None
        try:
            folder, base = self._releases.folder(record.candidate), self._base(record)
            with self._exchange.proving(record) as memory_max:
                proof = prove(folder, self._options(record), config.prove_s_max, base, lambda: self._unwanted(record),
                              memory_max)  # fmt: skip
                if slow := too_slow(proof, config.latency_ms_max):
                    raise ProveFailed(slow)
                self._exchange.proved(record, proof)
        except NoRoom as error:
            self._refuse(record, Refusal(str(error), error.passing))
            return
        except (ProveFailed, BadRelease) as error:
            if isinstance(error, ProveShort) and memory_max is not None:
                self._exchange.ran_short(record, memory_max)
                refused = self._exchange.refusal(record)
                if refused:
                    self._refuse(record, refused)
                else:  # there is more than that now
                    self._answer(record, Event.RESTARTED, str(error))  # which proves again
            else:
                self._answer(record, Event.PROVE_FAILED, str(error))
            return
        if not record.is_adapter:
            self._store.set_value(PROVEN + record.slot, self._proof(record.candidate))
        log.info("update %s: proved on %d golden inputs in %.1f s, the fastest in %.1f ms", record.target, proof.golden,
                 proof.golden_s, proof.fastest_ms)  # fmt: skip
        self._answer(record, Event.PROVED)
        self._in_service.await_flip(record)

    def _flip(self, record: Record) -> None:
        assert record.candidate is not None
        slot, ref = self._slots[record.slot], record.candidate
        if self.serves(record):
            self._answer(record, Event.FLIPPED)
            return
        folder = self._releases.folder(ref)
        try:
            manifest = verify(folder, ref)
            if record.is_adapter:
                try:
                    self._base(record)
                except BadRelease as error:  # its base was replaced meanwhile: that says nothing against it
                    self._answer(record, Event.BASE_GONE, str(error), passing=True)
                    return
                swap_ms = slot.attach(ref, folder / manifest.files["adapter"].path, manifest.calibration)
            else:
                swap_ms = self._exchange.swap(record, lambda: self._loaded(record, ref, manifest))
                self._in_service.attach_if_it_fits(record.slot, ref)
        except NoRoom as error:
            if not error.passing:
                self._refuse(record, Refusal(str(error), passing=False))
                return
            log.warning("update %s waits: %s", record.target, error)
            self._store.count("swaps_waiting")
            if not self._stop.wait(PASSING_S):
                self._answer(record, Event.RESTARTED, str(error))  # which flips again
            return
        except (BadRelease, EngineError) as error:
            self._answer(record, Event.FLIP_FAILED, str(error))
            return
        self._answer(record, Event.FLIPPED, swap_ms=swap_ms)

    def _flip_back(self, record: Record) -> None:
        slot = self._slots[record.slot]
        if record.is_adapter:
            if slot.live is not None:  # else the active one goes on when its base comes
                slot.attach(*self._adapter(record.active))
        elif slot.live is None or slot.live.ref != record.active:
            self._exchange.make_way(record.slot)
            self._in_service.load_active(record, restoring=True)
            if slot.vacated:
                self._in_service.take_candidate_back(record)
            if slot.live is not None and slot.live.ref == record.candidate:
                # Nothing else loads: the bad release goes on serving, and the next start tries again.
                self._say("no_way_back", f"{record.slot}: neither the active nor the previous release loads")
                return
        self._answer(record, Event.BACK, record.reason)

    def _adapter(self, adapter: ReleaseRef | None) -> tuple[ReleaseRef | None, Path | None, Calibration | None]:
        """What `Slot.attach` takes to put this adapter on."""
        if adapter is None:
            return None, None, None
        folder = self._releases.folder(adapter)
        manifest = read_manifest(folder)
        return adapter, folder / manifest.files["adapter"].path, manifest.calibration

    def _take_off(self, record: Record) -> None:
        self._slots[record.slot].attach(None, None)
        self._report()
