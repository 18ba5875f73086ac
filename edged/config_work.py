"""What a device's models do: its slots, and the pipelines and responders that answer with them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from edged.config_server import SEED, Server
from edged.config_sources import (
    CameraSource,
    DirectorySource,
    LiveSource,
    MqttSource,
    Name,
    RtspSource,
    Seconds,
    Section,
)
from edged.core.policy import Policy
from edged.core.probation import Criteria
from edged.core.providers import long_name

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TIERS_MAX = 8
# One tier, or several in order of preference.
Tiers = Annotated[
    tuple[Name, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(max_length=TIERS_MAX),
]
CONCURRENCY_MAX = 64
ANSWERS_MAX = 512  # of a release that its probation looks at, the last


def _made(kind: type) -> BeforeValidator:
    """A TOML table becomes a dataclass of the cores; a key that it does not have is named."""

    def make(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = [field.name for field in fields(kind)]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(known)}")
        return kind(**value)

    return BeforeValidator(make)


PolicyTable = Annotated[Policy, _made(Policy)]
HealthTable = Annotated[Criteria, _made(Criteria)]


WHOLE = (0.0, 0.0, 1.0, 1.0)  # a region of interest: left, top, right, bottom as shares of the frame's sides


def _roi(value: Any) -> Any:
    numbers = isinstance(value, list | tuple) and [v for v in value if type(v) in (int, float)]
    if not numbers or not len(numbers) == len(value) == 4:
        raise ValueError("must be four numbers: left, top, right, bottom, for example [0.25, 0.0, 0.75, 1.0]")
    left, top, right, bottom = numbers
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            "left, top, right, bottom are shares of the frame's sides: 0 <= left < right <= 1 and 0 <= top < bottom <= 1, "
            "for example [0.25, 0.0, 0.75, 1.0]"
        )
    return (float(left), float(top), float(right), float(bottom))


Roi = Annotated[tuple[float, float, float, float], BeforeValidator(_roi)]


def _provider(name: str) -> str:
    long_name(name)
    return name


Provider = Annotated[str, AfterValidator(_provider)]


class Slot(Section):
    """A place for one live model. `seed` is the release folder that a device starts with before the fleet says more, and
    `adapter` that of a LoRA adapter for the model in it, unless the fleet names one. `server`: the model is another
    machine's, and asked over HTTP.

    `isolation`: whether the engine lives in a process of its own or in the daemon; None: in its own for a language model.
    """

    seed: Path | None = None
    adapter: Path | None = None
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    providers: list[Provider] = ["cpu"]
    probation_s: Seconds = 60.0
    probation_items: Annotated[int, Field(ge=0, le=ANSWERS_MAX)] = 0  # a probation lasts until so many were answered,
    probation_s_max: Seconds = 86400.0  # but no longer than this
    health: HealthTable = Criteria()  # what ends a probation
    prove_s_max: Seconds = 60.0
    latency_ms_max: Milliseconds | None = None  # for a golden input, of a language model for a token; None: any
    isolation: Literal["process", "daemon"] | None = None
    swap: Literal["beside", "replace"] = "beside"  # `replace`: the old model leaves before the new one is loaded
    extra: dict[str, Any] = {}
    server: Server | None = None

    @model_validator(mode="before")
    @classmethod
    def _served(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("server") is not None:
            if value.get("extra"):
                raise ValueError("extra and server: keys of an engine here mean nothing to a server; remove extra")
            return {"seed": SEED, **{name: each for name, each in value.items() if (name, each) != ("seed", None)}}
        return value

    def engine_keys(self) -> dict[str, Any]:
        """What the slot's engine is told beside threads and providers."""
        return self.extra if self.server is None else {"server": self.server.model_dump(mode="json")}


class Pipeline(Section):
    """Items from one source through one slot."""

    slot: Name
    source: Annotated[DirectorySource | MqttSource | CameraSource | RtspSource, Field(discriminator="type")]
    task: Name = "detect"
    results: Literal["off", "durable"] = "off"  # publish every answer on up/result
    policy: PolicyTable = Policy()
    escalate_to: Tiers = ()  # the tiers that are asked, the first that lives; none: nothing leaves the device
    answer_by_s: Seconds = 5.0  # whoever waits gets the local answer after this
    label_by_s: Seconds = 7 * 86400.0  # a verdict is wanted for this long
    queue_max: Annotated[int, Field(ge=1, le=10_000)] = 64
    roi: Roi = WHOLE  # the part of the frame that the model sees
    ordered: bool = False  # the items are the frames of one stream, in order: objects are followed through them

    @model_validator(mode="after")
    def _newest_only(self) -> Pipeline:
        if isinstance(self.source, LiveSource) and "queue_max" in self.model_fields_set:
            raise ValueError("queue_max: of a live source only the newest frame counts, none waits: remove queue_max")
        return self


class Responder(Section):
    """This device answers the escalations of others on `up/esc/{tier}/{task}` with the model in `slot`, and asks the next
    tier where that is unsure itself."""

    tier: Name
    task: Name = "detect"
    slot: Name
    queue_max: Annotated[int, Field(ge=1, le=10_000)] = 64
    escalate_to: Tiers = ()  # none: it always answers itself
    wait_s: Seconds = 60.0  # for the next tier, before it answers itself; less where somebody waits at the origin
    concurrency: Annotated[int, Field(ge=1, le=CONCURRENCY_MAX)] = 1  # questions that a slot's server is asked at once
    policy: PolicyTable = Policy()

    @model_validator(mode="after")
    def _not_itself(self) -> Responder:
        if self.tier in self.escalate_to:
            raise ValueError(f"escalate_to names its own tier {self.tier!r}: name the next one")
        return self
