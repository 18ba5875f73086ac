"""What every pipeline of a daemon shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from edged.beats import Beats
from edged.clock import Clock
from edged.in_hand import InHand
from edged.metrics import Window
from edged.outgoing import Outgoing
from edged.pace import Pace
from edged.recent import Recent
from edged.sources import Unsure, Waiting
from edged.store import Store
from edged.tallies import Tallies
from edged.wire.topics import Address


@dataclass(slots=True)
class Services:
    """The parts, and the calls into the control loop."""

    store: Store
    outgoing: Outgoing
    clock: Clock
    window: Window
    wait: Callable[[str, Waiting], None]  # for the verdict on this sample
    engine_error: Callable[..., None]  # slot name, whether its process `ended`: probation wants to know
    unsure: Callable[[Unsure], None]  # a responder's own answer does not do: ask the next tier
    wake: Callable[[], None]  # the outbox has something new
    publish: Callable[[Address, bytes], bool]  # now or not at all, for what may be lost
    beats: Beats  # the loops of this pipeline move
    pace: Pace  # how much of the time its worker may work
    tallies: Tallies = field(default_factory=Tallies)  # what each release did, for its probation
    recent: Recent | None = None  # the newest answers, where somebody looks at them
    in_hand: InHand = field(default_factory=InHand)  # which item is in hand, should this process crash
