"""What is simulated: one plan, written by the command and read by every process that carries out a part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edged.link import LinkOptions
from edged.wire.bundle import BULK
from trainer.core.simulated import Nature, name_of

Share = Annotated[float, Field(ge=0, le=1)]
PREFIX = "sim-"  # of the devices' names: real ones are told from them by it
TIER = "simulated"  # who answers their questions: nobody else's responders are asked
PIPELINE, TASK, PROFILE = "simulated", "detect", "simulated"
SESSION_S = 300  # that the broker keeps what waits for a device that is gone: nobody comes back for it after a run
END = Literal["offline", "clear", "will"]


class Plan(BaseModel):
    """A fleet and what it does. Seconds where nothing else is said."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str
    port: int
    site: str
    devices: Annotated[int, Field(ge=1, le=99_999)]
    processes: Annotated[int, Field(ge=1, le=64)] = 2
    certificates: Path | None = None  # a folder with NAME.crt and NAME.key of every client; None: plain TCP
    ca: Path | None = None
    prefix: str = PREFIX
    model: str
    classes: Annotated[list[str], Field(min_length=1)]
    release: str
    window_s: Annotated[float, Field(gt=0)] = 60.0
    items: Annotated[int, Field(ge=1)] = 20
    escalate_share: Share = 0.05
    audit_share: Share = 0.02
    accuracy: Share = 0.9
    bad_share: Share = 0.0
    bad_loss: Share = 0.3
    revert_share: Share = 0.0
    lost_per_hour: Annotated[float, Field(ge=0)] = 0.0  # connections that each device loses
    lost_s: Annotated[float, Field(ge=0)] = 60.0  # how long it is away then
    will_delay_s: Annotated[int, Field(ge=0)] = 30
    responders: Annotated[int, Field(ge=0, le=16)] = 1
    connects_s: Annotated[float, Field(gt=0)] = 100.0  # devices that connect in a second, of all processes together
    keepalive_s: Annotated[int, Field(ge=5, le=3600)] = 60
    prove_s: Annotated[float, Field(ge=0)] = 2.0
    probation_s: Annotated[float, Field(ge=0)] = 5.0
    seed: int = 0
    end: END = "offline"
    trail: Path | None = None  # where each process writes the ids of the reports that the broker took

    def nature(self) -> Nature:
        """What of it the devices decide by."""
        return Nature(
            tuple(self.classes), self.release, self.seed, self.items, self.escalate_share, self.audit_share,
            self.accuracy, self.bad_share, self.bad_loss, self.revert_share,
        )  # fmt: skip

    def name(self, number: int) -> str:
        """The name of a device, from 1 on."""
        return name_of(number, self.prefix)

    def link(self, client: str, *, session_s: int = 0) -> LinkOptions:
        """Who `client` is to the broker."""
        certificate = key = None
        if self.certificates is not None:
            certificate, key = self.certificates / f"{client}.crt", self.certificates / f"{client}.key"
        return LinkOptions(
            self.host, self.port, client, self.ca, certificate, key, self.keepalive_s, session_expiry_s=session_s
        )

    def clients(self) -> list[str]:
        """Everybody who connects, with the second connections that fetch releases."""
        devices = [self.name(number) for number in range(1, self.devices + 1)]
        return [*devices, *(f"{name}{BULK}" for name in devices), *map(self.responder, range(1, self.responders + 1))]

    def responder(self, number: int) -> str:
        """The name of a responder, from 1 on."""
        return f"{self.prefix}teacher-{number}"
