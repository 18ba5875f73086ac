"""Every topic of the system: built here, parsed here, with its delivery beside it, and in no other place."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_ROOT = "edged/v1"
LEVEL = r"[A-Za-z0-9_.@:-]{1,128}"  # what a field of a topic may be
_HOLE = re.compile(r"\{(\w+)\}")

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400


@dataclass(frozen=True, slots=True)
class Address:
    """A concrete topic with how it is delivered; `expiry_s` None means that the broker keeps it."""

    topic: str
    qos: int
    retain: bool
    expiry_s: int | None

    def expiring(self, seconds: float) -> Address:
        """The same address with another expiry, at least one second."""
        return replace(self, expiry_s=max(1, int(seconds)))


class Route:
    """One row of the topic table: call it to build an address, `filter` to subscribe, `match` to parse. `raw`: what it
    carries is bytes of a file, no message."""

    __slots__ = ("_pattern", "expiry_s", "fields", "qos", "raw", "retain", "template")

    def __init__(self, template: str, qos: int, retain: bool, expiry_s: int | None, *, raw: bool = False) -> None:
        self.template = f"{_ROOT}/{template}"
        self.qos, self.retain, self.expiry_s, self.raw = qos, retain, expiry_s, raw
        self.fields = tuple(_HOLE.findall(self.template))
        self._pattern = re.compile(_HOLE.sub(lambda hole: f"(?P<{hole[1]}>{LEVEL})", self.template))

    def __call__(self, **fields: str) -> Address:
        """The address with every field filled in; raises ValueError when a field is missing or not a topic level."""
        for name in self.fields:
            if not re.fullmatch(LEVEL, fields.get(name, "")):
                raise ValueError(
                    f"topic {self.template}: {name}={fields.get(name)!r} is no topic level; "
                    "use letters, digits and _.@:-"
                )
        return Address(self.template.format(**fields), self.qos, self.retain, self.expiry_s)

    def filter(self, **fields: str) -> str:
        """The subscription that matches every topic of this row with these fields; the rest are wildcards."""
        return self.template.format(**{name: fields.get(name, "+") for name in self.fields})

    def shared(self, group: str, /, **fields: str) -> str:
        """The same as a shared subscription: each message goes to one member of `group`."""
        return f"$share/{group}/{self.filter(**fields)}"

    def match(self, topic: str) -> dict[str, str] | None:
        """The fields of `topic` when it is of this row."""
        found = self._pattern.fullmatch(topic)
        return found.groupdict() if found else None


#                template                                  QoS retained expiry
STATE = Route("{site}/{dev}/up/state", 1, True, None)
REPORTED = Route("{site}/{dev}/up/reported", 1, True, None)
ESCALATION = Route("{site}/{dev}/up/esc/{tier}/{task}", 1, False, 7 * DAY_S)
SAMPLE = Route("{site}/{dev}/up/sample", 1, False, DAY_S)
RESULT = Route("{site}/{dev}/up/result/{pipeline}", 1, False, MINUTE_S)
METRICS = Route("{site}/{dev}/up/metrics", 1, False, HOUR_S)
EVENT = Route("{site}/{dev}/up/event", 1, False, DAY_S)
REPLY = Route("{site}/{dev}/up/reply/{id}", 1, False, MINUTE_S)
PARTIAL = Route("{site}/{dev}/up/partial/{id}", 0, False, MINUTE_S)
COMMAND_STATE = Route("{site}/{dev}/up/cmd/{type}/{id}", 1, False, DAY_S)
DESIRED = Route("{site}/{dev}/down/desired", 1, True, None)
GROUP_DESIRED = Route("{site}/_g/{group}/down/desired", 1, True, None)
VERDICT = Route("{site}/{dev}/down/verdict", 1, False, DAY_S)
INFER = Route("{site}/{dev}/down/infer/{pipeline}", 1, False, MINUTE_S)
COMMAND = Route("{site}/{dev}/down/cmd/{type}/{id}", 1, False, DAY_S)
INVOKE = Route("{site}/{dev}/down/invoke/{agent}/{caller}", 1, False, HOUR_S)
INVOKED = Route("{site}/{dev}/down/invoked/{by}/{id}", 1, False, MINUTE_S)
HOST = Route("_host/{trainer}/state", 1, True, None)
RESPONDER = Route("_resp/{tier}/{task}/{responder}", 1, True, 90)
METADATA = Route("_host/{trainer}/metadata", 1, True, None)
WANT = Route("{site}/{dev}/up/want/{sha256}", 1, False, MINUTE_S)
BLOCK = Route("_blocks/{sha256}/{n}", 0, False, MINUTE_S, raw=True)
ASK_BLOCKS = Route("{site}/{dev}/down/blocks/{sha256}", 1, False, MINUTE_S)
BLOB = Route("{site}/{dev}/up/blob/{sha256}/{n}", 0, False, MINUTE_S, raw=True)

ROUTES: tuple[Route, ...] = (
    STATE, REPORTED, ESCALATION, SAMPLE, RESULT, METRICS, EVENT, REPLY, PARTIAL, COMMAND_STATE,
    GROUP_DESIRED, DESIRED, VERDICT, INFER, COMMAND, HOST, RESPONDER, METADATA, WANT, BLOCK, ASK_BLOCKS, BLOB,
    INVOKE, INVOKED,
)  # fmt: skip


def parse(topic: str) -> tuple[Route, dict[str, str]] | None:
    """The row and the fields of a topic; None for a topic that is not ours."""
    for route in ROUTES:
        fields = route.match(topic)
        if fields is not None:
            return route, fields
    return None
