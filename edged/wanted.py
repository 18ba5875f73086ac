"""Which release a slot, or the adapter in it, shall run: as people, the fleet and the configuration say, in this order."""

from __future__ import annotations

from edged.named import Named
from edged.update_record import Record
from edged.wire.manifest import ReleaseRef
from edged.wire.messages import Desired


class Wanted:
    """What is wanted now. `desired`: the fleet's last word, None before the first."""

    def __init__(self, named: Named) -> None:
        self._named = named
        self.desired: Desired | None = None

    def of_fleet(self, record: Record) -> ReleaseRef | None:
        """What the fleet says, and of an adapter, where that says nothing, the configuration."""
        desired = self.desired
        if not record.is_adapter:
            return desired.models.get(record.slot) if desired is not None else None
        told = desired.adapters.get(record.slot) if desired is not None else None
        return told or self._named.adapter(record.slot)

    def of(self, record: Record) -> ReleaseRef | None:
        """The release that a target shall run: a person's word goes before the fleet's."""
        return record.pinned or self.of_fleet(record)
