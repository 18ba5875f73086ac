"""Runs the effects of the update table: save the new state, then act; every act may be repeated.

Slow acts (fetching, verifying, proving, loading) run on one worker thread and come back as events into the control
loop's inbox, so that a download never delays an order to give it up. Everything else here runs on the control loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from edged import holds
from edged.acts import ADAPTER, Acts, Carrier, Record, Seeded, UpdateEvent
from edged.beats import Beats
from edged.clock import Clock
from edged.config import Slot as SlotConfig
from edged.core.probation import over, unhealthy
from edged.core.repeats import Told
from edged.core.update import RESTARTS_MAX, SETTLED_S, UNDER_WAY, Effect, Event, State, step
from edged.holds import Answer
from edged.machine import Memory
from edged.named import Named
from edged.records import Records
from edged.releases import Releases
from edged.slot import Slot
from edged.store import Store, StoreError
from edged.tallies import Tallies
from edged.update_report import known_bad, reports
from edged.wanted import Wanted
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import BadReport, Desired, ModelReport

log = logging.getLogger(__name__)

FULL_RETRY_S = 5.0  # between two tries to begin on a full disk
ENDED = "updates_ended"  # the store's key: whether the last run was asked to end, so that its end blames nobody


class Updater:
    """Brings every slot to its desired release, or says why not."""

    def __init__(
        self, slots: dict[str, Slot], configs: dict[str, SlotConfig], releases: Releases, store: Store, clock: Clock,
        carrier: Carrier, post: Callable[[UpdateEvent | Seeded], None], report: Callable[[], None],
        say: Callable[..., None], retry_s: float, beats: Beats | None = None, memory: Memory | None = None,
        tallies: Tallies | None = None,
    ) -> None:  # fmt: skip
        self._slots, self._configs, self._releases, self._store = slots, configs, releases, store
        self._clock, self._report, self._say, self._retry_s = clock, report, say, retry_s
        self._progress = carrier.progress
        self._records = Records(store, clock)
        self.tallies = tallies or Tallies()
        self.answered: Callable[[str, Answer], None] = lambda _order, _answer: None  # set by who passes orders on
        self._serves_since: dict[str, float] = {}  # target -> when its release began to serve in this run (monotonic)
        self._begin: Callable[[], None] | None = None  # what a start does, until it is done
        self._begin_at = 0.0  # when that is tried again (monotonic)
        self._seeding: set[str] = set()  # slots whose seed is being installed
        self._told = Told()  # of each target: why its release failed
        self._named = Named(configs, say)
        self._wanted = Wanted(self._named)
        self._acts = Acts(
            slots, configs, releases, store, carrier, post, report, say,
            lambda target: self._records.get(target) or Record(target=target),
            self.engine_error, beats or Beats(clock), memory,
        )  # fmt: skip
        self._by_hand = holds.ByHand(self._records, slots, releases, store, report, self._wanted.of_fleet, self._apply,
                                     self._records.save, self._reconcile)  # fmt: skip

    # The control loop's calls.

    def start(self, excused: Callable[[State], bool] = lambda _state: False) -> None:
        """Load what is active, then go on with what a stop interrupted. Returns at once; models load on the worker.

        `excused`: whether the end of the last run does not count against an update in this state."""
        asked_to_end = bool(self._store.value(ENDED))
        self._begin = partial(self._take_up, lambda state: asked_to_end or excused(state))
        if not self._begun():
            for name in self._slots:
                self._acts.load(self._records[name])

    def _begun(self) -> bool:
        """Whether what a start does first is done. On a full disk it is not: what was active serves, updates wait."""
        if self._begin is not None and self._clock.monotonic() >= self._begin_at:
            try:
                self._begin()
                self._begin = None
            except (StoreError, OSError) as error:
                if not self._begin_at:
                    self._store.count("updates_waiting")
                    log.error("updates wait, and what was active serves: %s", error)
                self._begin_at = self._clock.monotonic() + FULL_RETRY_S
        return self._begin is None

    def _take_up(self, excused: Callable[[State], bool]) -> None:
        saved = self._store.updates()
        for name in self._slots:
            for record in self._records.read(name, saved):
                self._records.put(record)
        self._store.set_value(ENDED, False)
        for record in self._records.values():
            self._records.count_start(record, excused(record.state))
        looped = [record for record in self._records.values() if record.restarts > RESTARTS_MAX]
        for record in looped:
            if record.state is State.COMMITTED:  # before it is loaded once more
                self._apply(record, Event.LOOPED, "the daemon crashed again and again soon after this update")
        for name, config in self._configs.items():
            record = self._records[name]
            if record.active is None and config.seed is not None:
                record.active = self._acts.installed(name, config.seed)
                self._records.save(record)
            if not (record in looped and record.state is State.REVERTING):  # else it is on its way already
                self._acts.load(record)
        for record in self._records.values():
            if record.state in UNDER_WAY and not (record in looped and record.state is State.REVERTING):
                record.since = self._clock.now()
                if record in looped:
                    self._apply(record, Event.LOOPED, "the daemon was restarted too often during this update")
                else:
                    self._apply(record, Event.RESTARTED, "")
        self._retry_refused()
        self._reconcile()  # what a person pinned

    def _retry_refused(self) -> None:
        """What was refused for want of memory may fit now."""
        for record in self._records.values():
            if record.state is State.FAILED and record.at_start and record.candidate is not None:
                self._start(record, record.candidate)

    def stop(self, seconds_max: float | None = None) -> bool:
        """End the worker; what it was doing goes on after the next start. False when it has not ended in time."""
        try:
            self._store.set_value(ENDED, True)
        except StoreError as error:
            log.error("this stop will count as a crash: %s", error)
        return self._acts.stop(seconds_max)

    # A new configuration; `slots` and `configs` are changed by its owner.

    def configure(self, retry_s: float) -> None:
        """How soon a failed fetch is tried again, from now on."""
        self._retry_s = retry_s
        self._retry_refused()

    def add(self, name: str) -> None:
        """A slot has come: what it had when it was here before, or its seed."""
        for saved in self._records.read(name, self._store.updates()):
            gone = saved.active is not None and not self._releases.folder(saved.active).is_dir()
            record = Record(target=saved.target) if gone else saved  # removed while the slot was not here
            if record.state in UNDER_WAY:  # the fleet says again what it desires
                record.state, record.candidate = State.IDLE, None
            self._records.put(record)
        self._bring(name)
        self._reconcile()

    def change(self, name: str, *, load: bool) -> None:
        """A slot's configuration is another; `load`: its model must be loaded anew for it."""
        if self._records[name].active is None:
            self._bring(name)
        elif load:
            self._acts.reload(self._records[name])
        self._named.look_again(name)
        self._reconcile()

    def remove(self, name: str) -> None:
        """A slot is gone; what is known of its updates stays on the disk."""
        self._records.forget(name)

    def _bring(self, name: str) -> None:
        record, seed = self._records[name], self._configs[name].seed
        if record.active is not None:
            self._acts.load(record)
        elif seed is not None:
            self._seeding.add(name)
            self._acts.install(record, seed)

    def _seeded(self, event: Seeded) -> None:
        self._seeding.discard(event.slot)
        record = self._records.get(event.slot)
        if record is not None and record.active is None and event.ref is not None:
            record.active = event.ref
            self._records.save(record)
            self._acts.load(record)

    def desire(self, desired: Desired) -> None:
        """Take note of the desired state and start what it asks for."""
        self._wanted.desired = desired
        for name in set(desired.models) - set(self._slots):
            log.warning("desired state names the model %r, but this device has no such slot", name)
            self._store.count("desired_unknown_model")
            self._say("unknown_model", f"desired state names {name!r}; this device has {', '.join(self._slots)}")
        if self._begin is None:
            self._reconcile()

    def handle(self, event: UpdateEvent | Seeded) -> None:
        """A worker is done."""
        if isinstance(event, Seeded):
            self._seeded(event)
            return
        record = self._records.get(event.target)
        if record is None or event.candidate != record.candidate:
            return  # it was superseded meanwhile, or its slot is gone
        if event.swap_ms is not None:
            record.swap_ms = event.swap_ms
            self._store.count("swaps")
        if event.passing:
            record.retry_at = self._clock.now() + self._retry_s
        record.at_start = event.at_start
        if event.event is Event.FLIPPED and record.state is State.STAGED and record.candidate is not None:
            record.before = self.tallies.before(record.slot, record.candidate.release)
        self._apply(record, event.event, event.reason)
        if event.event in {Event.FLIPPED, Event.BACK} and not record.is_adapter:
            self._base_changed(self._records[record.slot + ADAPTER])
        self._reconcile()

    def _base_changed(self, adapter: Record) -> None:
        """An adapter on its way left with its base: it is tried again when its base is back, and not blamed for the other's
        errors."""
        if adapter.state in {State.STAGED, State.SWITCHED} and not self._acts.serves(adapter):
            adapter.retry_at = self._clock.now() + self._retry_s
            self._apply(adapter, Event.BASE_GONE, "its base was replaced")

    def tick(self) -> None:
        """Probations that end, failures that may be tried again. Call it about once a second."""
        if not self._begun():
            return
        for record in self._records.values():
            spent_s = self._records.lasted_s(record)
            if record.state is State.SWITCHED:
                self._watch(record, spent_s)
            elif record.state is State.COMMITTED and not record.settled:
                self._settle(record)
            elif record.state is State.FAILED and record.retry_at is not None and spent_s >= self._retry_s:
                assert record.candidate is not None
                self._start(record, record.candidate)

    def _watch(self, record: Record, lasted_s: float) -> None:
        """How a probation goes."""
        assert record.candidate is not None
        config, signs = self._configs[record.slot], self.tallies.signs(record.slot, record.candidate.release)
        wrong = unhealthy(signs, record.before, config.health)
        if wrong:
            self._apply(record, Event.UNHEALTHY, wrong)
        elif self._acts.serves(record) and over(
            lasted_s, signs.items, config.probation_s, config.probation_items, config.probation_s_max
        ):
            self._apply(record, Event.HEALTHY, "")
            self._reconcile()

    def _settle(self, record: Record) -> None:
        """A release that was committed, and has served for a while in one go, is on trial no more."""
        if not self._acts.serves(record):
            self._serves_since.pop(record.target, None)
        elif (
            self._clock.monotonic() - self._serves_since.setdefault(record.target, self._clock.monotonic()) >= SETTLED_S
        ):
            record.settled, record.restarts = True, 0
            self._records.save(record)

    def engine_error(self, slot: str, *, ended: bool = False) -> None:
        """A worker's engine failed on an item, or its process `ended`; enough of them end a probation."""
        self.tallies.error(slot, ended=ended)

    def order(self, order_id: str, order: holds.Order) -> Answer:
        """Carry out what a person orders: saved first. One that comes again changes nothing."""
        return self._by_hand.order(order_id, order)

    def expects(self, slot: str) -> bool:
        """Whether a model serves in this slot or is on its way there."""
        record = self._records.get(slot)
        return record is not None and (record.active is not None or slot in self._seeding)

    def reports(self) -> dict[str, ModelReport]:
        """What every slot runs and how its updates stand."""
        return reports(self._slots, self._records, self._progress)

    def known_bad(self) -> list[BadReport]:
        """The newest of what is not installed here again; none while the store cannot say, which is told elsewhere."""
        return known_bad(self._store)

    # Decisions.

    def _reconcile(self) -> None:
        """Compare desired with what is; start and withdraw."""
        for name in self._slots:
            record = self._records[name]
            wanted = self._wanted.of(record)
            if wanted is not None:
                self._want(record, wanted)
            if wanted is not None and (record.active != wanted or record.state in UNDER_WAY):
                continue  # an adapter waits for its base
            adapter = self._records[name + ADAPTER]
            adapted, idle = self._wanted.of(adapter), adapter.state not in UNDER_WAY
            named = self._named.adapter(name)
            if named is not None and adapter.named != named:
                adapter.named = named
                self._records.save(adapter)
            if adapted is not None:
                self._want(adapter, adapted)
            elif wanted is not None and self._wanted.desired is not None and adapter.active is not None and idle:
                self._detach(adapter)
            elif adapter.named is not None:
                self._forget_named(adapter, idle)

    def _want(self, record: Record, wanted: ReleaseRef) -> None:
        if record.held is not None and record.pinned is None:
            if record.held == wanted:
                return  # a person took it off
            record.held = None
            self._records.save(record)
        if record.active == wanted:
            if record.candidate not in (None, wanted):
                self._apply(record, Event.WITHDRAWN, "")
            return
        if record.candidate == wanted and record.state is not State.IDLE:
            return  # under way, or it failed: `tick` tries again what may pass, and what was bad stays bad
        if record.state in {State.STAGED, State.SWITCHED, State.REVERTING}:
            return  # looked at again when that has ended
        self._told.forget(record.target)
        self._start(record, wanted)

    def _start(self, record: Record, wanted: ReleaseRef) -> None:
        record.candidate, record.retry_at, record.at_start, record.swap_ms = wanted, None, False, None
        self._apply(record, Event.DESIRED, "")

    def _apply(self, record: Record, event: Event, reason: str) -> bool:
        """One step of the table: save, then act; whether it was one."""
        before = record.state
        state, effects = step(before, event)
        if state is before and not effects:
            return False
        if state is not before:
            record.restarts, record.since = 0, self._clock.now()
            self._records.enter(record)
        if state is State.COMMITTED:
            record.previous, record.active = record.active, record.candidate
            record.before = None
            self._serves_since.pop(record.target, None)
        elif before is State.COMMITTED and event is Event.LOOPED:
            holds.step_back(record)
        if event in {Event.DESIRED, Event.WITHDRAWN}:
            self._store.count(f"updates_{event.value}")
        record.state, record.reason, record.settled = state, reason, state is not State.COMMITTED
        awaited = record.awaited
        if state is State.REVERTED:
            record.awaited = ""
        self._records.save(record, bad=Effect.REMEMBER_BAD in effects)
        log.info(
            "update %s: %s -> %s %s%s", record.target, before.value, state.value,
            record.candidate.release if record.candidate else "", f": {reason}" if reason else "",
            extra={"slot": record.slot, "release": record.candidate.release if record.candidate else ""},
        )  # fmt: skip
        if state is State.FAILED and before is not state and self._told.again(record.target, reason):
            self._store.count("updates_failed_again")  # one that may pass: it is tried again and again, and said once
        elif state in {State.FAILED, State.REVERTED} and before is not state:
            release = record.candidate.release if record.candidate else ""
            self._store.count(f"updates_{state.value}")
            self._say(f"update_{state.value}", f"{record.target}: {release}: {reason}", release=release, reason=reason)
        if awaited != record.awaited:
            self.answered(awaited, Answer("done"))
        for effect in effects:
            self._run(effect, record)
        return True

    def _run(self, effect: Effect, record: Record) -> None:
        if self._acts.submit(effect, record):
            return
        if effect is Effect.WATCH and record.candidate is not None:
            self.tallies.begin(record.slot, record.candidate.release)
        elif effect in {Effect.COMMIT, Effect.DISCARD}:
            gone = self._releases.keep_only(self._records.used())
            if gone:
                log.info("removed releases: %s", ", ".join(gone))
        elif effect is Effect.REPORT:
            self._report()

    def _forget_named(self, adapter: Record, idle: bool) -> None:
        """The configuration names no adapter any more: the one that it named is taken off, or not gone on with."""
        if adapter.candidate == adapter.named and adapter.state is not State.COMMITTED:
            self._apply(adapter, Event.WITHDRAWN, "")
        elif idle and adapter.active == adapter.named:
            self._detach(adapter)
        if adapter.named not in (adapter.active, adapter.candidate) or adapter.state is State.IDLE:
            adapter.named = None
            self._records.save(adapter)

    def _detach(self, adapter: Record) -> None:
        """Desired state names no adapter: take it off and forget it."""
        adapter.previous, adapter.active, adapter.candidate = adapter.active, None, None
        adapter.state, adapter.since = State.IDLE, self._clock.now()
        self._records.save(adapter)
        self._acts.detach(adapter)
