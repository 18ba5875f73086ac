"""Signs of life of devices in the database: `seen_at`, and the rule of `core.presence` as a condition on their rows."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Connection, and_, not_, select, update

from trainer.core.presence import Lately, lately
from trainer.database import devices, note_changed, parts

WRITES = 100  # of `seen_at`, at most, in the time for which a device may be silent: not with every message


def there(heard: Lately) -> ColumnElement[bool]:
    """The condition that a row of `devices` is of one that is there (`core.presence.present`)."""
    return and_(devices.c.online.is_(True), devices.c.seen_at.between(heard.since, heard.until))


def silent(connection: Connection, heard: Lately) -> frozenset[str]:
    """The devices of which no will message came, and nothing was heard for too long."""
    query = select(devices.c.device).where(devices.c.online.is_(True), not_(there(heard)))
    return frozenset(connection.execute(query).scalars())


def touch(connection: Connection, names: Sequence[str], now: float, silent_s_max: float) -> None:
    """These devices have just said something; not to be written with every message (WRITES). Who seemed to have gone is told
    to whoever looks at changed devices."""
    heard = lately(now, silent_s_max)
    for part in parts(names):
        query = select(devices.c.device, devices.c.seen_at).where(devices.c.device.in_(part))
        before = {row.device: row.seen_at for row in connection.execute(query)}
        if before:
            connection.execute(update(devices).where(devices.c.device.in_(list(before))).values(seen_at=now))
            note_changed(connection, devices, [name for name, at in before.items() if not heard.holds(at)])
