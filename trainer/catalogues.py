"""Devices are asked for their whole catalogue now and then: entries may be lost in a broker that was killed."""

from __future__ import annotations

from sqlalchemy import select, update

from trainer.core.presence import present
from trainer.database import commands, devices, parts
from trainer.fleet import OPEN
from trainer.host import Host

LISTINGS_MAX = 256  # that are awaited at once: ten thousand devices that come together are asked one after the other


def ask_for_catalogues(host: Host) -> None:
    """Ask who is online, and was not asked for `catalogue_refresh_s`; who has not answered yet is not asked twice. Who is
    silent is asked too, for an answer is a sign of life; but nobody waits for it."""
    now, heard = host.now(), host.lately()
    with host.database.read() as connection:
        before = now - host.config.catalogue_refresh_s
        due = select(devices.c.device).where(devices.c.online.is_(True), devices.c.listed_at < before)
        if connection.execute(due.limit(1)).first() is None:
            return
        waiting = connection.execute(
            select(commands.c.device, commands.c.body, devices.c.online, devices.c.seen_at)
            .join(devices, devices.c.device == commands.c.device)
            .where(commands.c.type == "samples", commands.c.state.in_(OPEN))
        ).all()
        asked = {
            row.device: present(row.online, row.seen_at, heard) for row in waiting if row.body.get("action") == "list"
        }
        room = LISTINGS_MAX - sum(asked.values())
        names = connection.execute(due.limit(room)).scalars().all() if room > 0 else []
    if not names:
        return
    for part in parts(names):  # one commit for many: a whole fleet may have come back at once
        with host.database.write() as connection:
            connection.execute(update(devices).where(devices.c.device.in_(part)).values(listed_at=now))
            host.ask_for_lists(connection, [device for device in part if device not in asked])
