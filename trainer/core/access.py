"""Who may say and hear what at the broker: the one table of rights, literal for each identity.

Law: nothing is allowed that does not stand here. The broker knows a client by the common name of its certificate alone, so
what an identity may do follows from its name, its site, its group and its roles, and from nothing that it says itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from edged.wire import topics
from edged.wire.bundle import BULK, NAME

Role = Literal["device", "responder", "trainer", "observer", "admin", "broker", "peer"]
ROLES: tuple[Role, ...] = ("device", "responder", "trainer", "observer", "admin", "broker", "peer")
CONTROL = "$CONTROL/dynamic-security/v1"  # of Mosquitto's plugin

_OWN_UP = topics.STATE.template.removesuffix("state") + "#"
_OWN_DOWN = topics.DESIRED.template.removesuffix("desired") + "#"
_HOSTS = topics.HOST.filter()
_RESPONDERS = topics.RESPONDER.filter()
_EVERYTHING = topics.HOST.template.partition("_host")[0] + "#"


class BadName(ValueError):
    """A name, site, group or role cannot be used; the message names it and the fix."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Somebody with a certificate. Raises BadName."""

    name: str
    site: str = "default"
    group: str = ""  # empty: none
    roles: tuple[Role, ...] = ("device",)

    def __post_init__(self) -> None:
        for what, text in (("name", self.name), ("site", self.site), ("group", self.group or "none")):
            if not re.fullmatch(NAME, text):
                raise BadName(
                    f"{what} {text!r}: use up to 60 letters, digits and _.- with a letter or digit in front "
                    "(it becomes a topic level)"
                )
        unknown = sorted(set(self.roles) - set(ROLES))
        if unknown or not self.roles:
            raise BadName(f"roles of {self.name}: {', '.join(unknown) or 'none'}; known: {', '.join(ROLES)}")

    @property
    def common_names(self) -> tuple[str, ...]:
        """Of its certificates: devices and trainers have two, one of them for blocks of files."""
        return tuple(name for name, _ in rights(self))


@dataclass(slots=True)
class Rights:
    """Topic filters that one client may publish to, hear, and join as shared subscriptions (`$share/...`, written out)."""

    send: list[str] = field(default_factory=list)
    hear: list[str] = field(default_factory=list)
    join: list[str] = field(default_factory=list)


# What every device may hear, so that it need not be repeated for each of ten thousand.
COMMON = Rights(hear=[_HOSTS, topics.METADATA.filter(), _RESPONDERS, topics.BLOCK.filter()])


def rights(identity: Identity) -> Iterator[tuple[str, Rights]]:
    """What each common name of an identity may do, beside COMMON for a device's."""
    own = Rights()
    for role in identity.roles:
        more = _OF[role](identity)
        own.send += more.send
        own.hear += more.hear
        own.join += more.join
    yield identity.name, own
    bulk = [_BULK_OF[role](identity) for role in identity.roles if role in _BULK_OF]
    if bulk:
        yield (
            identity.name + BULK,
            Rights([topic for each in bulk for topic in each.send], [topic for each in bulk for topic in each.hear]),
        )


def _bulk_of_device(who: Identity) -> Rights:
    here = {"site": who.site, "dev": who.name}
    return Rights(
        send=[topics.WANT.filter(**here), topics.BLOB.filter(**here)], hear=[topics.ASK_BLOCKS.filter(**here)]
    )


def _bulk_of_trainer(who: Identity) -> Rights:
    return Rights(
        send=[topics.BLOCK.filter(), topics.ASK_BLOCKS.filter(site=who.site), topics.METADATA.filter(trainer=who.name)],
        hear=[topics.WANT.filter(site=who.site), topics.BLOB.filter(site=who.site)],
    )


def _device(who: Identity) -> Rights:
    here = {"site": who.site, "dev": who.name}
    group = [topics.GROUP_DESIRED.filter(site=who.site, group=who.group)] if who.group else []
    return Rights(send=[_OWN_UP.format(**here)], hear=[_OWN_DOWN.format(**here), *group])


def _responder(who: Identity) -> Rights:
    asked = topics.ESCALATION.filter(site=who.site)
    # A shared subscription needs its own right: it is what keeps devices from taking others' escalations away.
    # Its presence is written under `{device}.{name}`, a level that no filter can pin to the device.
    return Rights(
        send=[topics.VERDICT.filter(site=who.site), _RESPONDERS], hear=[asked], join=[f"$share/+/{asked}"]
    )  # fmt: skip


def _peer(who: Identity) -> Rights:
    # Its own name is a level of both topics: nobody asks or answers in another's name.
    return Rights(
        send=[
            topics.INVOKE.filter(site=who.site, caller=who.name),
            topics.INVOKED.filter(site=who.site, by=who.name),
        ]
    )


def _trainer(who: Identity) -> Rights:
    everyone = {"site": who.site, "dev": "+"}
    return Rights(
        send=[
            _OWN_DOWN.format(**everyone),
            topics.GROUP_DESIRED.filter(site=who.site),
            topics.EVENT.filter(site=who.site, dev=who.name),
            topics.HOST.filter(trainer=who.name),
        ],
        hear=[_OWN_UP.format(**everyone)],
    )


def _observer(_who: Identity) -> Rights:
    return Rights(send=[topics.INFER.filter(), topics.COMMAND.filter(type="cancel")], hear=[_EVERYTHING])


def _admin(_who: Identity) -> Rights:
    # What is retained of a device that may not come back is emptied; who may give rights could take this one anyway.
    return Rights(send=[CONTROL, topics.STATE.filter(), topics.REPORTED.filter()], hear=[f"{CONTROL}/response"])


_OF: dict[Role, Callable[[Identity], Rights]] = {
    "device": _device,
    "responder": _responder,
    "trainer": _trainer,
    "observer": _observer,  # reads everything, asks devices to infer, and cancels
    "admin": _admin,  # tells the broker whom it no longer knows, and to keep nothing of him
    "broker": lambda _who: Rights(),  # a server: it connects to nobody
    "peer": _peer,  # a device whose agents ask those of other devices, or answer them
}
# Of the second connection, which carries blocks of files.
_BULK_OF: dict[Role, Callable[[Identity], Rights]] = {"device": _bulk_of_device, "trainer": _bulk_of_trainer}
