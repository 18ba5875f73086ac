"""What people order for a slot: roll back, pin, unpin, forget. Each changes the record of its target, or says why not.

Law: an order and what it changes are saved as one, so that one that comes again (after a crash, or because its answer was
lost) is known and not carried out twice. Nothing here needs the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edged.core.update import SWITCHING, Event, State
from edged.releases import Releases
from edged.slot import Slot
from edged.store import Store
from edged.update_record import ADAPTER, Record
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import ForgetCommand, PinCommand, RollbackCommand, SlotCommand, UnpinCommand

ORDERS_MAX = 16  # of a target, that are remembered
FORGET_MAX = 1000  # known bad releases among which the one to forget is looked for
BY_HAND = "rolled back by a person"

Order = RollbackCommand | PinCommand | UnpinCommand | ForgetCommand


@dataclass(frozen=True, slots=True)
class Answer:
    """How far an order is: `accepted` goes on to `done`; `failed` changed nothing and says why."""

    state: Literal["accepted", "done", "failed"]
    reason: str = ""


def target_of(order: SlotCommand) -> str:
    """The update that an order is about."""
    return order.slot + (ADAPTER if order.adapter else "")


def again(order: str, record: Record) -> Answer | None:
    """The answer to an order that was carried out before; None for a new one."""
    if order not in record.orders:
        return None
    return Answer("accepted" if order == record.awaited else "done")


def note(order: str, record: Record, *, awaited: bool = False) -> None:
    """This order is carried out with the next saving of the record."""
    record.orders = [*record.orders, order][-ORDERS_MAX:]
    record.awaited = order if awaited else record.awaited


def roll_back(record: Record, wanted: ReleaseRef | None, missing: Callable[[ReleaseRef], str]) -> str:
    """Make the record one of a slot on its way back; why not, or empty.

    `wanted`: what desired state names now; `missing`: why a release cannot serve here.
    """
    if record.state is State.REVERTING:
        return f"{record.target} is on its way back already"
    if record.state in SWITCHING:
        leaves, back = record.candidate, record.active
    else:
        leaves, back = record.active, record.previous
        if record.state is State.REVERTED and back is not None and back == record.candidate:
            return (
                f"{record.target} has just come back from {back.release}; `edged unpin` or `edged pin` with that release "
                "goes forward again"
            )
    if leaves is None:
        return f"{record.target} has no release that it could go back from"
    if back is None and not record.is_adapter:
        return f"{record.target} has no release before {leaves.release} to go back to"
    if back is not None and (why := missing(back)):
        return f"{record.target} cannot go back to {back.release}: {why}"
    record.candidate, record.held, record.pinned = leaves, wanted or leaves, None
    step_back(record)
    return ""


def step_back(record: Record) -> None:
    """The release before is the active one again. The one that leaves stays as what serves when that does not load."""
    if record.state not in SWITCHING:
        record.active, record.previous = record.previous, record.active


def serving(record: Record) -> ReleaseRef | None:
    """The release that answers, or is about to."""
    return record.candidate if record.state in SWITCHING else record.active


def shown(record: Record, adapter: Record) -> dict[str, str | None]:
    """What people hold in a slot, as its report names it."""
    refs = {
        "pinned": record.pinned,
        "held": record.held,
        "adapter_pinned": adapter.pinned,
        "adapter_held": adapter.held,
    }
    return {name: ref.release if ref else None for name, ref in refs.items()}


class ByHand:
    """Carries orders out, on the control loop. `apply` is a step of the update table, `save` keeps a record."""

    def __init__(
        self, records: dict[str, Record], slots: dict[str, Slot], releases: Releases, store: Store,
        report: Callable[[], None], desired_for: Callable[[Record], ReleaseRef | None],
        apply: Callable[[Record, Event, str], bool], save: Callable[[Record], None], reconcile: Callable[[], None],
    ) -> None:  # fmt: skip
        self._records, self._slots, self._releases, self._store, self._report = records, slots, releases, store, report
        self._desired_for, self._apply, self._save, self._reconcile = desired_for, apply, save, reconcile

    def order(self, order_id: str, order: Order) -> Answer:
        """Carry an order out, unless it was carried out before."""
        if isinstance(order, ForgetCommand):
            return self._forget(order)
        record = self._records.get(target_of(order))
        if record is None:
            return Answer("failed", f"no slot {order.slot!r} here; known: {', '.join(self._slots) or 'none'}")
        known = again(order_id, record)
        if known is not None:
            return known
        if isinstance(order, RollbackCommand):
            return self._roll_back(order_id, record)
        if isinstance(order, PinCommand):
            pinned = order.release or serving(record)
            if pinned is None:
                return Answer("failed", f"{record.target} has no release to be pinned to: name one")
            record.pinned = pinned
        else:
            record.pinned = record.held = None
        note(order_id, record)
        self._allow(record)
        return Answer("done")

    def _roll_back(self, order_id: str, record: Record) -> Answer:
        refused = roll_back(record, self._desired_for(record), self._missing)
        if refused:
            return Answer("failed", refused)
        note(order_id, record, awaited=True)
        self._store.count("rollbacks_by_hand")
        self._apply(record, Event.ROLLED_BACK, BY_HAND)
        return Answer("accepted")

    def _forget(self, order: ForgetCommand) -> Answer:
        rows = [row for row in self._store.known_bad(FORGET_MAX) if row.release == order.release]
        shas = {row.sha256 for row in rows if order.sha256 in (None, row.sha256)}
        for sha in shas:
            self._store.forget_bad(sha)
        # A repetition finds nothing in the store, and perhaps a record that a crash kept from being told.
        failed = [r for r in self._records.values() if r.state in {State.FAILED, State.REVERTED}]
        told = [r for r in failed if r.candidate is not None and r.candidate.release == order.release]
        for record in told:
            self._allow(record)
        if not shas and not told:
            return Answer("failed", f"nothing is known against {order.release} here")
        self._report()
        return Answer("done")

    def _allow(self, record: Record) -> None:
        """What failed or was put back may be tried again; saves the record."""
        if not self._apply(record, Event.ALLOWED, ""):
            self._save(record)
            self._report()
        self._reconcile()

    def _missing(self, ref: ReleaseRef) -> str:
        """Why a release cannot serve here, as far as that is known without reading it."""
        bad = self._store.bad(ref.sha256)
        if bad:
            return f"it is known to be bad ({bad}); `edged models forget {ref.release}` allows it again"
        return "" if self._releases.folder(ref).is_dir() else "its files are not here any more"
