"""The slow acts of an update: fetch, verify, prove, load, flip, flip back. They run on one worker thread, in order.

Each gets a copy of the record, may be repeated, and answers with an event for the control loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from edged.config import Slot as SlotConfig
from edged.core.update import Effect, Event, State
from edged.engines.base import EngineError, EngineOptions, installed_engines
from edged.fetch import FetchError, WrongContent
from edged.prove import ProveCancelled, ProveFailed, prove
from edged.releases import BadRelease, Releases, read_manifest, verify
from edged.slot import Loaded, Slot, SlotStopped, load
from edged.store import Store
from edged.wire.manifest import ReleaseManifest, ReleaseRef

log = logging.getLogger(__name__)

PROVEN = "proven/"  # + slot: the release that has answered its whole golden set here, and the engines that it did it on
ADAPTER = "/adapter"  # the update of a slot's adapter is a target of its own: `phi/adapter`


class Record(BaseModel):
    """How the update of one target stands; saved at every change."""

    target: str
    state: State = State.IDLE
    candidate: ReleaseRef | None = None
    active: ReleaseRef | None = None
    previous: ReleaseRef | None = None
    reason: str = ""
    since: float = 0.0
    restarts: int = 0
    retry_at: float | None = None  # a failure that may pass: when to try again
    swap_ms: float | None = None

    @property
    def slot(self) -> str:
        """The slot that this target belongs to."""
        return self.target.removesuffix(ADAPTER)

    @property
    def is_adapter(self) -> bool:
        """Whether this is the update of an adapter."""
        return self.target.endswith(ADAPTER)


@dataclass(frozen=True, slots=True)
class UpdateEvent:
    """What a worker did, for the control loop; `candidate` tells whether it is still about the same release."""

    target: str
    candidate: ReleaseRef | None
    event: Event
    reason: str = ""
    swap_ms: float | None = None
    passing: bool = False  # the failure may pass: try again later


@dataclass(frozen=True, slots=True)
class Carrier:
    """How the bytes of a release get here: fetch the manifest, then each blob, into a folder, until the third argument
    says that nobody wants them. Raises FetchError, WrongContent or BadRelease. Other carriers fit in here beside HTTP."""

    fetch: Callable[[ReleaseRef, Path, Callable[[], bool]], None]


class Acts:
    """Does what the update table's effects ask for, one after the other."""

    def __init__(
        self, slots: dict[str, Slot], configs: dict[str, SlotConfig], releases: Releases, store: Store, carrier: Carrier,
        post: Callable[[UpdateEvent], None], report: Callable[[], None], say: Callable[..., None],
        current: Callable[[str], Record], engine_error: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`current`: the record of a target as the control loop has it now. `engine_error`: counts one for a slot."""
        self._slots, self._configs, self._releases, self._store = slots, configs, releases, store
        self._carrier, self._post, self._report, self._say, self._current = carrier, post, report, say, current
        self._engine_error = engine_error
        self._work = ThreadPoolExecutor(max_workers=1, thread_name_prefix="updater")
        self._stopping = False
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
        self._work.submit(self._guard, self._load_active, record.model_copy())

    def detach(self, record: Record) -> None:
        """Take the slot's adapter off."""
        self._work.submit(self._guard, self._take_off, record.model_copy())

    def stop(self) -> None:
        """End the worker; what it was doing goes on after the next start."""
        self._stopping = True
        self._work.shutdown(wait=True, cancel_futures=True)

    def serves(self, record: Record) -> bool:
        """Whether the candidate is what answers now; after a restart it is loaded again first."""
        live = self._slots[record.slot].live
        return live is not None and record.candidate == (live.adapter if record.is_adapter else live.ref)

    def _guard(self, act: Callable[[Record], None], record: Record) -> None:
        try:
            act(record)
        except (SlotStopped, ProveCancelled):
            return
        except Exception as error:  # a bug of ours must not leave an update hanging without a reason
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
        current = self._current(record.target)
        return self._stopping or (current.state, current.candidate) != (record.state, record.candidate)

    def _options(self, record: Record) -> EngineOptions:
        config = self._configs[record.slot]
        return EngineOptions(config.threads, tuple(config.providers), config.extra)

    def _loaded(self, record: Record, ref: ReleaseRef, manifest: ReleaseManifest) -> Loaded:
        """Load a release as its slot is configured; raises EngineError.

        What has answered its whole golden set on this device, on the engines that are installed now, answers one input of
        it: a start is not the time to find out again what is known.
        """
        isolation = self._configs[record.slot].isolation
        ended = partial(self._process_ended, record.slot, ref.release)
        known = self._store.value(PROVEN + record.slot) == self._proof(ref)
        loaded = load(ref, self._releases.folder(ref), manifest, self._options(record), isolation, ended,
                      golden_max=1 if known else None)  # fmt: skip
        if not known:
            self._store.set_value(PROVEN + record.slot, self._proof(ref))
        return loaded

    def _proof(self, ref: ReleaseRef) -> list[str]:
        return [ref.sha256, *installed_engines()]

    def _process_ended(self, slot: str, release: str, how: str, in_hand: bool) -> None:
        """An engine's process died and is started again. Called by the thread that supervises it."""
        self._store.count("engine_ends")
        if not in_hand:  # else the pipeline that had the request reports it
            self._engine_error(slot)
        self._say("engine_ended", f"{slot}: {how}", release=release)

    def _load_active(self, record: Record) -> None:
        for ref in (record.active, record.previous):
            if ref is None:
                continue
            try:
                manifest = verify(self._releases.folder(ref), ref)
                loaded = self._loaded(record, ref, manifest)
            except (BadRelease, EngineError) as error:
                log.error("slot %s: %s does not load: %s", record.slot, ref.release, error)
                self._say("model_not_loaded", f"{record.slot}: {ref.release}: {error}", release=ref.release)
                continue
            self._slots[record.slot].flip(loaded)
            self._attach_if_it_fits(record.slot, ref)
            self._report()
            return

    def _attach_if_it_fits(self, slot: str, base: ReleaseRef) -> None:
        """After a base was (re)loaded: its adapter again, if there is one for exactly this base."""
        adapter = self._current(slot + ADAPTER).active
        if adapter is None:
            return
        folder = self._releases.folder(adapter)
        try:
            manifest = read_manifest(folder)
            if manifest.base == base:
                self._slots[slot].attach(adapter, folder / manifest.files["adapter"].path)
        except (BadRelease, EngineError) as error:
            log.error("slot %s: adapter %s: %s", slot, adapter.release, error)
            self._say("adapter_not_loaded", f"{slot}: {adapter.release}: {error}", release=adapter.release)

    def _admit(self, record: Record) -> None:
        assert record.candidate is not None
        bad = self._store.bad(record.candidate.sha256)
        if bad:
            self._answer(record, Event.REFUSED, f"known to be bad: {bad}")
        else:
            self._answer(record, Event.ADMITTED)

    def _download(self, record: Record) -> None:
        assert record.candidate is not None
        folder = self._releases.folder(record.candidate)
        try:
            self._carrier.fetch(record.candidate, folder, lambda: self._unwanted(record))
        except (WrongContent, BadRelease) as error:
            self._answer(record, Event.VERIFY_FAILED, str(error))
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
        try:
            folder = self._releases.folder(record.candidate)
            proof = prove(folder, self._options(record), config.prove_s_max, self._base(record),
                          lambda: self._unwanted(record))  # fmt: skip
        except (ProveFailed, BadRelease) as error:
            self._answer(record, Event.PROVE_FAILED, str(error))
            return
        if not record.is_adapter:
            self._store.set_value(PROVEN + record.slot, self._proof(record.candidate))
        log.info("update %s: proved on %d golden inputs in %.1f s", record.target, proof.golden, proof.golden_s)
        self._answer(record, Event.PROVED)

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
                self._base(record)
                swap_ms = slot.attach(ref, folder / manifest.files["adapter"].path)
            else:
                swap_ms = slot.flip(self._loaded(record, ref, manifest))
                self._attach_if_it_fits(record.slot, ref)
        except (BadRelease, EngineError) as error:
            self._answer(record, Event.FLIP_FAILED, str(error))
            return
        self._answer(record, Event.FLIPPED, swap_ms=swap_ms)

    def _flip_back(self, record: Record) -> None:
        slot = self._slots[record.slot]
        if record.is_adapter:
            slot.attach(record.active, self._adapter_file(record.active) if record.active else None)
        elif slot.live is None or slot.live.ref != record.active:
            self._load_active(record)
            if slot.live is not None and slot.live.ref == record.candidate:
                # Nothing else loads: the bad release goes on serving, and the next start tries again.
                self._say("no_way_back", f"{record.slot}: neither the active nor the previous release loads")
                return
        self._answer(record, Event.BACK, record.reason)

    def _adapter_file(self, adapter: ReleaseRef) -> Path:
        folder = self._releases.folder(adapter)
        return folder / read_manifest(folder).files["adapter"].path

    def _take_off(self, record: Record) -> None:
        self._slots[record.slot].attach(None, None)
        self._report()
