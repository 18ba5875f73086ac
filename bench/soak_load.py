"""The mixed load of the soak: what goes in, good and bad, and whether all of it came out, once.

A sender of requests behaves as a careful client: it sends a request again, under the same id, until it has the reply.
"""

from __future__ import annotations

import base64
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edged.wire import messages, topics
from edged.wire.messages import InferReply, InferRequest
from tests.support.device import SITE, Bus
from tests.support.models import PLAIN, STRANGE, picture

RESEND_S = 5.0
EVERY_S = {"file": 0.1, "image": 0.3, "prompt": 1.0, "nonsense": 3.0, "huge": 40.0}  # between two of a kind
BAD_SHARE = 0.1
HUGE_BYTES = (32 << 20) + 1  # one more than an image may have


@dataclass(slots=True)
class _Request:
    body: InferRequest
    pipeline: str
    sent: float
    first: float  # when it was sent first, seconds since the epoch


@dataclass(slots=True)
class Load:
    """Everything that was put in. `tick` is called often, and does what is due."""

    bus: Bus
    device: str
    inbox: Path
    chance: random.Random
    every_s: Mapping[str, float] = field(default_factory=lambda: EVERY_S)  # a kind that is not named does not come
    files: list[str] = field(default_factory=list)
    put_in: Counter[str] = field(default_factory=Counter)
    requests: dict[str, _Request] = field(default_factory=dict)  # every one, by id
    open: set[str] = field(default_factory=set)  # without a reply
    replies: dict[str, dict[str, str]] = field(default_factory=dict)  # request -> id of each reply -> its error
    _next: dict[str, float] = field(default_factory=dict)
    _heard: int = 0

    def tick(self, now: float) -> None:
        """Put in what is due, and send again what has no reply."""
        for name, act in (
            ("file", self._file), ("image", self._image), ("prompt", self._prompt), ("nonsense", self._nonsense),
            ("huge", self._huge),
        ):  # fmt: skip
            if name in self.every_s and now >= self._next.get(name, 0.0):
                self._next[name] = now + self.every_s[name]
                act()
        self.repeat(now)

    def repeat(self, now: float) -> None:
        """Take in the replies; send again what has none."""
        heard = self.bus.heard
        for _, _, message in heard[self._heard : len(heard)]:
            self._heard += 1
            if isinstance(message, InferReply):
                self.replies.setdefault(message.request, {})[message.id] = message.error or ""
                self.open.discard(message.request)
        for key in [key for key in self.open if now - self.requests[key].sent > RESEND_S]:
            self.requests[key].sent = now
            self._send(self.requests[key])

    def _bad(self) -> bool:
        return self.chance.random() < BAD_SHARE

    def _picture(self) -> bytes:
        value = PLAIN if self.chance.random() < 0.7 else STRANGE
        return picture(value, self.chance.randrange(1 << 16))

    def _write(self, kind: str, data: bytes) -> None:
        name = f"{len(self.files):06d}-{kind}.png"
        (self.inbox / f".{name}").write_bytes(data)
        (self.inbox / f".{name}").rename(self.inbox / name)
        self.files.append(name)
        self.put_in[f"files, {kind}"] += 1

    def _file(self) -> None:
        if not self._bad():
            self._write("good", self._picture())
        elif self._bad():
            self._write("empty", b"")
        else:
            self._write("corrupt", self._picture()[: self.chance.randrange(8, 60)])

    def _huge(self) -> None:
        self._write("too large", bytes(HUGE_BYTES))

    def _ask(self, kind: str, pipeline: str, **fields: object) -> None:
        body = InferRequest(**self.bus.stamp(), **fields)  # type: ignore[arg-type]
        request = _Request(body, pipeline, time.monotonic(), time.time())
        self.requests[body.id] = request
        self.open.add(body.id)
        self.put_in[f"requests, {kind}"] += 1
        self._send(request)

    def _send(self, request: _Request) -> None:
        # Not delivered now: it is sent again later, as every request without a reply.
        address = topics.INFER(site=SITE, dev=self.device, pipeline=request.pipeline)
        self.bus.link.publish(address, messages.encode(request.body))

    def _image(self) -> None:
        if not self._bad():
            self._ask("image", "ask", image=base64.b64encode(self._picture()).decode())
        else:
            self._ask("bad image", "ask", image=self.chance.choice(["no base64!", "AAAA", ""]))

    def _prompt(self) -> None:
        text = f"line {self.chance.randrange(9)} read a 7 with score 0.{self.chance.randrange(1, 9)}. What to do?\n"
        if not self._bad():
            self._ask("prompt", "chat", generation_prompt=text, tokens_max=32)
        else:
            self._ask("prompt that is too long", "chat", generation_prompt=text * 2000)

    def _nonsense(self) -> None:
        to = {"site": SITE, "dev": self.device}
        payload = self.chance.choice([b"{", b"\xff\xfe", b"[]", b'{"id": 1}', b'{"id":"x","ts":1,"boot":"b","seq":1}'])
        address = self.chance.choice(
            [
                topics.INFER(**to, pipeline="ask"),
                topics.INFER(**to, pipeline="nobody"),
                topics.COMMAND(**to, type="samples", id=f"c{self.chance.randrange(1 << 30)}"),
                topics.COMMAND(**to, type="dance", id="c1"),
                topics.VERDICT(**to),
            ]
        )
        self.put_in["nonsense"] += 1
        self.bus.link.publish(address, payload)
