"""Devices are asked for their whole catalogue now and then: entries may be lost in a broker that was killed."""

from __future__ import annotations

from sqlalchemy import select, update

from trainer.database import commands, devices
from trainer.fleet import ENDED
from trainer.host import Host


def ask_for_catalogues(host: Host) -> None:
    """Ask who is online, and was not asked for `catalogue_refresh_s`; who has not answered yet is not asked twice."""
    now = host.now()
    with host.database.read() as connection:
        before = now - host.config.catalogue_refresh_s
        names = connection.execute(
            select(devices.c.device).where(devices.c.online.is_(True), devices.c.listed_at < before)
        ).scalars()
        due = list(names)
    for device in due:
        with host.database.write() as connection:
            connection.execute(update(devices).where(devices.c.device == device).values(listed_at=now))
            asked = connection.execute(
                select(commands.c.body).where(commands.c.device == device, commands.c.state.notin_(ENDED))
            ).scalars()
            if not any(body.get("action") == "list" for body in asked):
                host.command_samples(connection, device, "list")
