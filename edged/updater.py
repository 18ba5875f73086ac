"""Runs the effects of the update table: save the new state, then act; every act may be repeated.

Slow acts (fetching, verifying, proving, loading) run on one worker thread and come back as events into the control
loop's inbox, so that a download never delays an order to give it up. Everything else here runs on the control loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from edged.clock import Clock
from edged.config import Slot as SlotConfig
from edged.core.update import RESTARTS_MAX, UNDER_WAY, Effect, Event, State, step
from edged.engines.base import EngineError, EngineOptions
from edged.fetch import FetchError, WrongContent
from edged.prove import ProveCancelled, ProveFailed, prove
from edged.releases import BadRelease, Releases, read_manifest, verify
from edged.slot import Slot, SlotStopped, load
from edged.store import Store
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import Desired, ModelReport

log = logging.getLogger(__name__)

ADAPTER = "/adapter"  # the update of a slot's adapter is a target of its own: `phi/adapter`
ERRORS_MAX = 3  # engine errors that end a probation


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


class Updater:
    """Brings every slot to its desired release, or says why not."""

    def __init__(
        self, slots: dict[str, Slot], configs: dict[str, SlotConfig], releases: Releases, store: Store, clock: Clock,
        carrier: Carrier, post: Callable[[UpdateEvent], None], report: Callable[[], None],
        say: Callable[..., None], retry_s: float,
    ) -> None:  # fmt: skip
        self._slots, self._configs, self._releases, self._store = slots, configs, releases, store
        self._clock, self._carrier, self._post, self._report, self._say = clock, carrier, post, report, say
        self._retry_s = retry_s
        self._records: dict[str, Record] = {}
        self._desired: Desired | None = None
        self._errors: dict[str, int] = {}
        self._work = ThreadPoolExecutor(max_workers=1, thread_name_prefix="updater")
        self._stopping = False

    # The control loop's calls.

    def start(self) -> None:
        """Load what is active, then go on with what a stop interrupted. Returns at once; models load on the worker."""
        saved = self._store.updates()
        for name in self._slots:
            for target in (name, name + ADAPTER):
                record = Record.model_validate(saved[target]) if target in saved else Record(target=target)
                self._records[target] = record
        for name, config in self._configs.items():
            record = self._records[name]
            if record.active is None and config.seed is not None:
                record.active = self._install_seed(name, config.seed)
                self._save(record)
            self._work.submit(self._guard, self._load_active, record.model_copy())
        for record in self._records.values():
            if record.state in UNDER_WAY:
                record.restarts += 1
                record.since = self._clock.now()  # the time without power was no probation
                event = Event.LOOPED if record.restarts > RESTARTS_MAX else Event.RESTARTED
                self._apply(record, event, "the daemon was restarted too often during this update")

    def stop(self) -> None:
        """End the worker; what it was doing goes on after the next start."""
        self._stopping = True
        self._work.shutdown(wait=True, cancel_futures=True)

    def desire(self, desired: Desired) -> None:
        """Take note of the desired state and start what it asks for."""
        self._desired = desired
        for name in set(desired.models) - set(self._slots):
            log.warning("desired state names the model %r, but this device has no such slot", name)
            self._store.count("desired_unknown_model")
            self._say("unknown_model", f"desired state names {name!r}; this device has {', '.join(self._slots)}")
        self._reconcile()

    def handle(self, event: UpdateEvent) -> None:
        """A worker is done."""
        record = self._records[event.target]
        if event.candidate != record.candidate:
            return  # it was superseded meanwhile
        if event.swap_ms is not None:
            record.swap_ms = event.swap_ms
        if event.passing:
            record.retry_at = self._clock.now() + self._retry_s
        self._apply(record, event.event, event.reason)
        self._reconcile()

    def tick(self) -> None:
        """Probations that end, failures that may be tried again. Call it about once a second."""
        now = self._clock.now()
        for record in self._records.values():
            if record.state is State.SWITCHED:
                errors = self._errors.get(record.slot, 0)
                if errors >= ERRORS_MAX:
                    self._apply(record, Event.UNHEALTHY, f"{errors} engine errors during probation")
                elif now - record.since >= self._configs[record.slot].probation_s and self._serves(record):
                    self._apply(record, Event.HEALTHY, "")
                    self._reconcile()
            elif record.state is State.FAILED and record.retry_at is not None and now >= record.retry_at:
                assert record.candidate is not None
                self._start(record, record.candidate)

    def _serves(self, record: Record) -> bool:
        """Whether the candidate is what answers now; after a restart it is loaded again first."""
        live = self._slots[record.slot].live
        return live is not None and record.candidate == (live.adapter if record.is_adapter else live.ref)

    def engine_error(self, slot: str) -> None:
        """A worker's engine failed on an item; enough of them end a probation."""
        self._errors[slot] = self._errors.get(slot, 0) + 1

    def roll_back(self, slot: str) -> str:
        """Put the previous release back by hand; returns why not, or empty."""
        record = self._records.get(slot)
        if record is None or record.previous is None:
            return f"{slot}: there is no previous release to go back to"
        self._start(record, record.previous)
        return ""

    def reports(self) -> dict[str, ModelReport]:
        """What every slot runs and how its updates stand."""
        out = {}
        for name, slot in self._slots.items():
            record, adapter = self._records[name], self._records[name + ADAPTER]
            shown = adapter if adapter.state in UNDER_WAY or (adapter.since > record.since) else record
            live = slot.live
            out[name] = ModelReport(
                active=live.ref.release if live else None,
                previous=record.previous.release if record.previous else None,
                staged=shown.candidate.release if shown.candidate and shown.state in UNDER_WAY else None,
                adapter=live.adapter.release if live and live.adapter else None,
                update=shown.state.value,
                reason=shown.reason,
                swap_ms=shown.swap_ms,
                since=shown.since,
            )
        return out

    def settled(self) -> bool:
        """Whether no update is under way."""
        return not any(record.state in UNDER_WAY for record in self._records.values())

    # Decisions.

    def _reconcile(self) -> None:
        """Compare desired with what is; start and withdraw."""
        desired = self._desired
        if desired is None:
            return
        for name in self._slots:
            record = self._records[name]
            wanted = desired.models.get(name)
            if wanted is not None:
                self._want(record, wanted)
            if wanted is not None and (record.active != wanted or record.state in UNDER_WAY):
                continue  # an adapter waits for its base
            adapter = self._records[name + ADAPTER]
            if name in desired.adapters:
                self._want(adapter, desired.adapters[name])
            elif wanted is not None and adapter.active is not None and adapter.state not in UNDER_WAY:
                self._detach(adapter)

    def _want(self, record: Record, wanted: ReleaseRef) -> None:
        if record.active == wanted:
            if record.candidate not in (None, wanted):
                self._apply(record, Event.WITHDRAWN, "")
            return
        if record.candidate == wanted and record.state is not State.IDLE:
            return  # under way, or it failed: `tick` tries again what may pass, and what was bad stays bad
        if record.state in {State.STAGED, State.SWITCHED, State.REVERTING}:
            return  # looked at again when that has ended
        self._start(record, wanted)

    def _start(self, record: Record, wanted: ReleaseRef) -> None:
        record.candidate, record.retry_at, record.swap_ms = wanted, None, None
        self._apply(record, Event.DESIRED, "")

    def _apply(self, record: Record, event: Event, reason: str) -> None:
        """One step of the table: save, then act."""
        before = record.state
        state, effects = step(before, event)
        if state is before and not effects:
            return
        if state is not before:
            record.restarts, record.since = 0, self._clock.now()
        if state is State.COMMITTED:
            record.previous, record.active = record.active, record.candidate
        if event in {Event.DESIRED, Event.WITHDRAWN}:
            self._store.count(f"updates_{event.value}")
        record.state, record.reason = state, reason
        self._save(record)
        log.info(
            "update %s: %s -> %s %s%s", record.target, before.value, state.value,
            record.candidate.release if record.candidate else "", f": {reason}" if reason else "",
        )  # fmt: skip
        if state in {State.FAILED, State.REVERTED} and before is not state:
            release = record.candidate.release if record.candidate else ""
            self._store.count(f"updates_{state.value}")
            self._say(f"update_{state.value}", f"{record.target}: {release}: {reason}", release=release, reason=reason)
        for effect in effects:
            self._run(effect, record, reason)

    def _run(self, effect: Effect, record: Record, reason: str) -> None:
        slow = {
            Effect.ADMIT: self._admit,
            Effect.DOWNLOAD: self._download,
            Effect.VERIFY: self._verify,
            Effect.PROVE: self._prove,
            Effect.FLIP: self._flip,
            Effect.FLIP_BACK: self._flip_back,
        }
        if effect in slow:
            self._work.submit(self._guard, slow[effect], record.model_copy())
        elif effect is Effect.WATCH:
            self._errors[record.slot] = 0
        elif effect is Effect.REMEMBER_BAD and record.candidate is not None:
            self._store.remember_bad(record.candidate.release, record.candidate.sha256, reason, self._clock.now())
        elif effect in {Effect.COMMIT, Effect.DISCARD}:
            keep = [ref for r in self._records.values() for ref in (r.active, r.previous) if ref is not None]
            keep += [
                r.candidate for r in self._records.values() if r.candidate and (r.state in UNDER_WAY or r.retry_at)
            ]
            gone = self._releases.keep_only(keep)
            if gone:
                log.info("removed releases: %s", ", ".join(gone))
        elif effect is Effect.REPORT:
            self._report()

    def _save(self, record: Record) -> None:
        self._store.save_update(record.target, record.model_dump(mode="json"))

    def _install_seed(self, name: str, seed: Path) -> ReleaseRef | None:
        try:
            return self._releases.install(seed)
        except BadRelease as error:
            log.error("slot %s: seed: %s", name, error)
            self._say("bad_seed", f"slots.{name}.seed: {error}")
            return None

    # The worker's acts. Each gets a copy of the record and answers with events.

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
        current = self._records[record.target]
        return self._stopping or (current.state, current.candidate) != (record.state, record.candidate)

    def _options(self, record: Record) -> EngineOptions:
        config = self._configs[record.slot]
        return EngineOptions(config.threads, tuple(config.providers), config.extra)

    def _load_active(self, record: Record) -> None:
        for ref in (record.active, record.previous):
            if ref is None:
                continue
            try:
                manifest = verify(self._releases.folder(ref), ref)
                loaded = load(ref, self._releases.folder(ref), manifest, self._options(record))
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
        adapter = self._records[slot + ADAPTER].active
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
        log.info("update %s: proved on %d golden inputs in %.1f s", record.target, proof.golden, proof.golden_s)
        self._answer(record, Event.PROVED)

    def _flip(self, record: Record) -> None:
        assert record.candidate is not None
        slot, ref = self._slots[record.slot], record.candidate
        if self._serves(record):
            self._answer(record, Event.FLIPPED)
            return
        folder = self._releases.folder(ref)
        try:
            manifest = verify(folder, ref)
            if record.is_adapter:
                self._base(record)
                swap_ms = slot.attach(ref, folder / manifest.files["adapter"].path)
            else:
                swap_ms = slot.flip(load(ref, folder, manifest, self._options(record)))
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
        self._answer(record, Event.BACK, record.reason)

    def _adapter_file(self, adapter: ReleaseRef) -> Path:
        folder = self._releases.folder(adapter)
        return folder / read_manifest(folder).files["adapter"].path

    def _detach(self, adapter: Record) -> None:
        """Desired state names no adapter: take it off and forget it."""
        adapter.previous, adapter.active, adapter.candidate = adapter.active, None, None
        adapter.state, adapter.since = State.IDLE, self._clock.now()
        self._save(adapter)
        self._work.submit(self._guard, self._take_off, adapter.model_copy())

    def _take_off(self, record: Record) -> None:
        self._slots[record.slot].attach(None, None)
        self._report()
