"""Who this device is to the broker: its session, its last will, and what it listens to."""

from __future__ import annotations

import queue
from typing import Any

from edged.config import Settings
from edged.link import Link, LinkOptions
from edged.outgoing import Outgoing
from edged.responders import presences
from edged.wire import messages, topics
from edged.wire.bundle import BULK


def subscriptions(settings: Settings) -> list[str]:
    """The topics that this device listens to."""
    device = settings.device
    own = {"site": device.site, "dev": device.id}
    listens = [
        topics.DESIRED.filter(**own),
        topics.VERDICT.filter(**own),
        topics.INFER.filter(**own),
        topics.COMMAND.filter(**own),
        topics.HOST.filter(),
        topics.METADATA.filter(),
    ]
    if device.group:
        listens.append(topics.GROUP_DESIRED.filter(site=device.site, group=device.group))
    if any(agent.callers for agent in settings.agents.values()):
        listens.append(topics.INVOKE.filter(**own))
    if settings.peers:
        listens.append(topics.INVOKED.filter(**own))
    asked = [p.escalate_to for p in settings.pipelines.values()] + [r.escalate_to for r in settings.responders.values()]
    for tier in sorted(set().union(*asked)):
        listens.append(topics.RESPONDER.filter(tier=tier))
    for r in settings.responders.values():
        listens.append(topics.ESCALATION.shared(f"{r.tier}-{r.task}", site=device.site, tier=r.tier, task=r.task))
    return listens


def session_expiry_s(settings: Settings) -> int:
    """How long the broker keeps this device's session. A dead responder's would go on taking its half of the shared
    questions."""
    return 0 if settings.responders else settings.broker.session_expiry_s


def link(settings: Settings, outgoing: Outgoing, inbox: queue.Queue[Any]) -> Link:
    """The connection of this device, not started; raises BadCredentials."""
    device, broker = settings.device, settings.broker
    own = {"site": device.site, "dev": device.id}
    will = messages.State(**outgoing.stamp(), state="offline", device=device.id)
    return Link(
        LinkOptions(
            broker.host, broker.port, device.id, broker.ca, broker.certificate, broker.key, broker.keepalive_s,
            session_expiry_s=session_expiry_s(settings), reconnect_s_max=broker.reconnect_s_max,
        ),
        subscriptions(settings),
        will=(topics.STATE(**own), messages.encode(will)),
        inbox=inbox,
    )  # fmt: skip


def bulk_options(settings: Settings) -> LinkOptions | str:
    """The second connection, `{device}~blk`; a text: why there is none."""
    device, broker = settings.device, settings.broker
    if broker.ca is not None and (broker.bulk_certificate is None or broker.bulk_key is None):
        return "broker.bulk_certificate and broker.bulk_key are not set: without them nothing comes over MQTT"
    return LinkOptions(
        broker.host, broker.port, f"{device.id}{BULK}", broker.ca, broker.bulk_certificate, broker.bulk_key,
        broker.keepalive_s, reconnect_s_max=broker.reconnect_s_max,
    )  # fmt: skip


def announcements(
    settings: Settings, outgoing: Outgoing, state: str, models: dict[str, str]
) -> list[tuple[topics.Address, bytes]]:
    """Birth (or death) certificate of the device and of each responder in it."""
    body = messages.State(
        **outgoing.stamp(), state=state, device=outgoing.device, profile=settings.device.profile,  # type: ignore[arg-type]
        tier=settings.device.tier, models=models, capabilities=sorted(settings.pipelines),
        labels={**settings.device.labels, **({"group": settings.device.group} if settings.device.group else {})},
    )  # fmt: skip
    out = [(topics.STATE(site=outgoing.site, dev=outgoing.device), messages.encode(body))]
    return out + presences(settings, outgoing, state, models)


def reannouncements(
    before: Settings, after: Settings, outgoing: Outgoing, models: dict[str, str]
) -> list[tuple[topics.Address, bytes]]:
    """What a new configuration makes of them: responders that are gone or others now take their leave first."""
    gone = {name: r for name, r in before.responders.items() if r != after.responders.get(name)}
    farewells = presences(before.model_copy(update={"responders": gone}), outgoing, "offline", {})
    return farewells + announcements(after, outgoing, "online", models)
