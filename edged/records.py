"""The records of all updates on this device: as they stand, as they are saved, and for how long each stands so.

Law: what could not be saved has not happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edged.clock import Clock
from edged.core.update import UNDER_WAY, State
from edged.store import KnownBad, Store, StoreError
from edged.update_record import ADAPTER, Record
from edged.wire.manifest import ReleaseRef


class Records(dict[str, Record]):
    """Target -> its record. All calls on the control loop."""

    def __init__(self, store: Store, clock: Clock) -> None:
        super().__init__()
        self._store, self._clock = store, clock
        self._kept: dict[str, Record] = {}  # the same as they were saved last
        self._entered: dict[str, float] = {}  # when each came into its state: of a clock that never jumps

    def read(self, slot: str, saved: dict[str, dict[str, Any]]) -> Iterator[Record]:
        """The records of a slot and of the adapter in it, of what is `saved`; they count when they are `put`."""
        for target in (slot, slot + ADAPTER):
            yield Record.model_validate(saved[target]) if target in saved else Record(target=target)

    def put(self, record: Record) -> None:
        """This one counts from now on, in the state in which it is."""
        self[record.target], self._kept[record.target] = record, record.model_copy()
        self.enter(record)  # the time without power was no probation

    def enter(self, record: Record) -> None:
        """It has come into its state now."""
        self._entered[record.target] = self._clock.monotonic()

    def lasted_s(self, record: Record) -> float:
        """For how long it has been in its state, in this run."""
        return self._clock.monotonic() - self._entered[record.target]

    def forget(self, slot: str) -> None:
        """The slot is gone; what is known of its updates stays on the disk."""
        for target in (slot, slot + ADAPTER):
            self.pop(target, None)

    def save(self, record: Record, *, bad: bool = False) -> None:
        """Keep the record, and with it, in one transaction, that its candidate is `bad`. Raises StoreError, and then the
        record is again what it was."""
        known = None
        if bad and record.candidate is not None:
            known = KnownBad(record.candidate.release, record.candidate.sha256, record.reason, self._clock.now())
        try:
            self._store.save_update(record.target, record.model_dump(mode="json"), known)
        except StoreError:
            kept = self._kept.get(record.target, Record(target=record.target))
            for name in Record.model_fields:
                setattr(record, name, getattr(kept, name))
            raise
        self._kept[record.target] = record.model_copy()

    def count_start(self, record: Record, excused: bool) -> None:
        """A start may count against the release that was on trial; one that serves for good is on no trial."""
        if excused:
            return
        if record.state in UNDER_WAY:
            record.restarts += 1  # saved with the step that follows
        elif record.state is State.COMMITTED and not record.settled and (record.previous or record.is_adapter):
            record.restarts += 1
            self.save(record)

    def used(self) -> list[ReleaseRef]:
        """The releases that must stay on the disk."""
        keep = [ref for record in self.values() for ref in (record.active, record.previous) if ref is not None]
        return keep + [r.candidate for r in self.values() if r.candidate and (r.state in UNDER_WAY or r.retry_at)]
