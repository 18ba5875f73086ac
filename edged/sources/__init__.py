"""Where items come from. A source keeps its item until `settle` was called: a crash before that brings it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from edged.engines.base import GenerateRequest, Image
from edged.wire.messages import Escalation, Opinion


@dataclass(frozen=True, slots=True)
class Asked:
    """An escalation that this device answers in `tier`: it came from `site`/`device`, at `received` of the monotonic
    clock."""

    site: str
    device: str
    tier: str
    task: str
    escalation: Escalation
    received: float


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to answer. `id` becomes the sample's id, and is the same when the item comes again."""

    id: str
    name: str
    captured: float  # seconds since the epoch
    image: bytes = b""  # the file's bytes, undecoded
    frame: Image | None = None  # of a live stream: decoded already, instead of `image`
    prompt: GenerateRequest | None = None
    request: str | None = None  # somebody waits for the reply to this request
    stream: bool = False  # and wants the text of the answer while it is made
    asked: Asked | None = None
    # Called once, after everything about the item is committed; the argument is why it was rejected, or empty.
    settle: Callable[[str], None] = field(default=lambda _reason: None)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Somebody waits for the answer to `request`: the verdict on its sample, or the local `reply` from `answer_by` (of the
    monotonic clock) on."""

    request: str
    reply: dict[str, Any]
    answer_by: float
    settle: Callable[[str], None]
    corner: tuple[int, int] = (0, 0)  # where the sample's pixels lie in the image that came: a verdict speaks of those
    wanted: Callable[[], str] = lambda: ""  # empty, or why nobody waits any longer: the local answer is due


@dataclass(frozen=True, slots=True)
class Unsure:
    """A responder's own answer to a question, of which it is not sure (`reason`): the next tier is to be asked."""

    asked: Asked
    own: Opinion
    reason: str
    settle: Callable[[str], None]


class Source(Protocol):
    """Puts items into its pipeline's bounded queue from a thread of its own, waiting while the queue is full."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def alive(self) -> bool: ...
