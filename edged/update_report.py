"""What a device says of its slots: which release runs in each, and how its update stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edged import holds
from edged.core.update import UNDER_WAY
from edged.slot import Slot
from edged.store import Store, StoreError
from edged.update_record import ADAPTER, Record
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import BAD_MAX, BadReport, ModelReport, Progress


def reports(
    slots: Mapping[str, Slot], records: Mapping[str, Record], progress: Callable[[ReleaseRef], Progress | None]
) -> dict[str, ModelReport]:
    """What every slot runs and how its updates stand; `progress`: of a release that is being fetched."""
    out = {}
    for name, slot in list(slots.items()):
        record, adapter = records.get(name), records.get(name + ADAPTER)
        if record is None or adapter is None:  # it is just coming
            continue
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
            **holds.shown(record, adapter),
            progress=progress(shown.candidate) if shown.candidate else None,
        )
    return out


def known_bad(store: Store) -> list[BadReport]:
    """The newest of what is not installed here again; none while the store cannot say, which is told elsewhere."""
    try:
        known = store.known_bad(BAD_MAX)
    except StoreError:
        return []
    return [BadReport(release=bad.release, sha256=bad.sha256, reason=bad.reason, at=bad.at) for bad in known]
