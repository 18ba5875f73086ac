"""How the update of one target stands, and what its worker and the control loop tell each other."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

from edged.core.probation import Signs
from edged.core.update import Event, State
from edged.wire.manifest import ReleaseRef

ADAPTER = "/adapter"  # the update of a slot's adapter is a target of its own: `phi/adapter`


class Record(BaseModel):
    """How the update of one target stands; saved at every change."""

    target: str
    state: State = State.IDLE
    candidate: ReleaseRef | None = None
    active: ReleaseRef | None = None
    previous: ReleaseRef | None = None
    reason: str = ""
    since: float = 0.0
    restarts: int = 0
    retry_at: float | None = None  # a failure that may pass: when to try again
    at_start: bool = (
        False  # refused for what only another start, or another configuration, can change: tried again then
    )
    swap_ms: float | None = None
    before: Signs | None = None  # what the predecessor did, for the probation
    settled: bool = True  # False from a commit until the release has served for SETTLED_S in one go
    pinned: ReleaseRef | None = None  # by a person: this, whatever desired state says
    held: ReleaseRef | None = (
        None  # what desired state named when a person rolled back: not again, until it names another
    )
    named: ReleaseRef | None = None  # what the configuration named: gone from there, it is taken off here
    orders: list[str] = []  # ids of the last orders of people that were carried out, so that none is twice
    awaited: str = ""  # the one of them that is under way

    @property
    def slot(self) -> str:
        """The slot that this target belongs to."""
        return self.target.removesuffix(ADAPTER)

    @property
    def is_adapter(self) -> bool:
        """Whether this is the update of an adapter."""
        return self.target.endswith(ADAPTER)


@dataclass(frozen=True, slots=True)
class UpdateEvent:
    """What a worker did, for the control loop; `candidate` tells whether it is still about the same release."""

    target: str
    candidate: ReleaseRef | None
    event: Event
    reason: str = ""
    swap_ms: float | None = None
    passing: bool = False  # the failure may pass: try again later
    at_start: bool = False  # it may pass with another start or configuration


@dataclass(frozen=True, slots=True)
class Seeded:
    """The seed of a slot that came while the daemon runs is installed (None: it cannot be), for the control loop."""

    slot: str
    ref: ReleaseRef | None
