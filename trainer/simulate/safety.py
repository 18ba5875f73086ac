"""Whether a fleet may be simulated here: not among real devices, unless somebody says so."""

from __future__ import annotations

import queue
import time
from pathlib import Path

from sqlalchemy import select

from edged.link import Connected, Disconnected, Inbound, Link, LinkOptions
from edged.wire import messages, topics
from trainer.config import TrainerConfig
from trainer.database import Database, devices
from trainer.simulate.plan import Plan
from trainer.simulate.run import SimulationError

QUIET_S = 1.0  # without another retained birth: that were all
LOOK_S_MAX = 15.0
NAMED_MAX = 5


def refuse_real_devices(plan: Plan, config: TrainerConfig) -> None:
    """Raises SimulationError when the trainer's database or the broker knows devices of the site that are not simulated, or
    when there is no broker."""
    known = _in_database(plan, config)
    if plan.ca is None:
        known |= _at_broker(plan)
    if known:
        names = ", ".join(sorted(known)[:NAMED_MAX]) + (", ..." if len(known) > NAMED_MAX else "")
        raise SimulationError(
            f"site {plan.site!r} has {len(known)} real devices ({names}): simulated "
            "ones would count among them, in rollouts and in trainings. Use a trainer and a site of their own (--site sim), "
            "or --among-real-devices when that is what you want"
        )


def _in_database(plan: Plan, config: TrainerConfig) -> set[str]:
    where = config.database_at
    if plan.site != config.site or (isinstance(where, Path) and not where.is_file()):
        return set()
    database = Database(where)
    try:
        with database.read() as connection:
            names = connection.execute(select(devices.c.device)).scalars().all()
    finally:
        database.close()
    return {name for name in names if not name.startswith(plan.prefix)}


def _at_broker(plan: Plan) -> set[str]:
    """Devices whose birth the broker keeps. With certificates nobody may listen to all of them but the trainer, whose
    connection is not ours to take."""
    look = Link(
        LinkOptions(plan.host, plan.port, f"{plan.prefix}look", reconnect_s_max=1),
        [topics.STATE.filter(site=plan.site)],
    )
    look.start()
    found: set[str] = set()
    deadline, last, connected, why = time.monotonic() + LOOK_S_MAX, time.monotonic(), False, "no answer"
    try:
        while time.monotonic() < deadline and not (connected and time.monotonic() - last > QUIET_S):
            try:
                event = look.inbox.get(timeout=0.1)
            except queue.Empty:
                continue
            last = time.monotonic()
            if isinstance(event, Connected):
                connected = True
            elif isinstance(event, Disconnected):
                connected, why = False, event.reason
                if time.monotonic() > deadline - LOOK_S_MAX + 3.0:
                    break
            elif isinstance(event, Inbound):
                look.acknowledge(event)
                name = _device(event)
                if name is not None and not name.startswith(plan.prefix):
                    found.add(name)
    finally:
        look.stop()
    if not connected:
        raise SimulationError(f"no broker at {plan.host}:{plan.port}: {why}")
    return found


def _device(event: Inbound) -> str | None:
    try:
        _, fields, _ = messages.decode(event.topic, event.payload)
    except messages.InvalidPayload:
        return None
    return fields["dev"]


def check_certificates(plan: Plan) -> None:
    """Raises SimulationError when the broker wants certificates and some are missing."""
    if plan.ca is None:
        return
    if plan.certificates is None:
        raise SimulationError(
            "this broker wants a certificate of every client: `trainer enroll` the devices, and give the folder of what was "
            "issued with --certificates"
        )
    folder = plan.certificates
    missing = [
        name
        for name in plan.clients()
        if not ((folder / f"{name}.crt").is_file() and (folder / f"{name}.key").is_file())
    ]
    if missing:
        raise SimulationError(
            f"{folder}: {len(missing)} clients have no certificate and key there ({', '.join(missing[:NAMED_MAX])}...): "
            f"enroll them, the responders with --responder"
        )
