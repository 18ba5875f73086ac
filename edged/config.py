"""The device's configuration: a TOML file, overridden by the environment (`EDGED_BROKER__HOST=...`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from edged.core.policy import Policy
from edged.core.providers import long_name
from edged.wire.messages import BEAT_S_MAX

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Seconds = Annotated[float, Field(gt=0)]
TIERS_MAX = 8
# One tier, or several in order of preference.
Tiers = Annotated[
    tuple[Name, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(max_length=TIERS_MAX),
]
MIB = 1 << 20


def _policy(value: Any) -> Any:
    if isinstance(value, dict):
        unknown = set(value) - set(Policy.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown key {sorted(unknown)[0]!r}; known: {', '.join(Policy.__dataclass_fields__)}")
        return Policy(**value)
    return value


PolicyTable = Annotated[Policy, BeforeValidator(_policy)]


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


class ConfigError(Exception):
    """The configuration cannot be used; the message names the key, the value and the fix, a line each."""


class Section(BaseModel):
    """Base of every table: an unknown key is a typing mistake and is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Device(Section):
    """Who this device is. `id` is also the MQTT client id and the common name of its certificate."""

    id: Name
    site: Name = "default"
    group: Name | None = None
    profile: Name = "generic"
    tier: Name = "device"
    state_dir: Path = Path("/var/lib/edged")


class Broker(Section):
    """Where the MQTT broker is. Without `ca` the connection is plain TCP, which is refused off loopback."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8883
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    keepalive_s: Annotated[int, Field(ge=5, le=3600)] = 30
    session_expiry_s: Annotated[int, Field(ge=0, le=30 * 86400)] = 86400
    reconnect_s_max: Annotated[int, Field(ge=1, le=3600)] = 60

    @model_validator(mode="after")
    def _encrypted(self) -> Broker:
        if self.ca is None and self.host not in {"127.0.0.1", "localhost", "::1"}:
            raise ValueError(
                f"host {self.host!r} without `ca`: traffic off this machine is encrypted; set ca, certificate, key"
            )
        return self


def _provider(name: str) -> str:
    long_name(name)
    return name


Provider = Annotated[str, AfterValidator(_provider)]


class Slot(Section):
    """A place for one live model. `seed` is the release folder that a device starts with before the fleet says more.

    `isolation`: whether the engine lives in a process of its own or in the daemon; None: in its own for a language model.
    """

    seed: Path | None = None
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    providers: list[Provider] = ["cpu"]
    probation_s: Seconds = 60.0
    prove_s_max: Seconds = 60.0
    isolation: Literal["process", "daemon"] | None = None
    extra: dict[str, Any] = {}


class DirectorySource(Section):
    """Files that appear in a folder, each exactly one item. Writers rename into place, or close after writing."""

    type: Literal["directory"] = "directory"
    path: Path
    after: Literal["delete", "move"] = "move"  # `move` to `<path>/done`; rejected files always go to `<path>/rejected`


class MqttSource(Section):
    """Requests on `down/infer/{pipeline}`."""

    type: Literal["mqtt"] = "mqtt"


class Pipeline(Section):
    """Items from one source through one slot."""

    slot: Name
    source: Annotated[DirectorySource | MqttSource, Field(discriminator="type")]
    task: Name = "detect"
    results: Literal["off", "durable"] = "off"  # publish every answer on up/result
    policy: PolicyTable = Policy()
    escalate_to: Tiers = ()  # the tiers that are asked, the first that lives; none: nothing leaves the device
    answer_by_s: Seconds = 5.0  # whoever waits gets the local answer after this
    label_by_s: Seconds = 7 * 86400.0  # a verdict is wanted for this long
    queue_max: Annotated[int, Field(ge=1, le=10_000)] = 64
    roi: Roi = WHOLE  # the part of the frame that the model sees
    ordered: bool = False  # the items are the frames of one stream, in order: objects are followed through them


class Responder(Section):
    """This device answers the escalations of others on `up/esc/{tier}/{task}` with the model in `slot`, and asks the next
    tier where that is unsure itself."""

    tier: Name
    task: Name = "detect"
    slot: Name
    queue_max: Annotated[int, Field(ge=1, le=10_000)] = 64
    escalate_to: Tiers = ()  # none: it always answers itself
    wait_s: Seconds = 60.0  # for the next tier, before it answers itself; less where somebody waits at the origin
    policy: PolicyTable = Policy()

    @model_validator(mode="after")
    def _not_itself(self) -> Responder:
        if self.tier in self.escalate_to:
            raise ValueError(f"escalate_to names its own tier {self.tier!r}: name the next one")
        return self


class Host(Section):
    """The trainer: `url` overrides the address that it announces; TLS files are the broker's unless given."""

    url: str | None = None
    fetch_retry_s: Seconds = 10.0


class Store(Section):
    """Limits of what is kept. Nothing is unbounded."""

    blob_bytes_max: Annotated[int, Field(ge=MIB)] = 1024 * MIB
    outbox_rows_max: Annotated[int, Field(ge=10)] = 20_000
    outbox_bytes_max: Annotated[int, Field(ge=MIB)] = 512 * MIB


class Delivery(Section):
    """Clocks of the outbox: how soon a message without an answer is sent again, growing up to the maximum."""

    retry_s: Seconds = 20.0
    retry_s_max: Seconds = 900.0
    window_s: Seconds = 60.0  # length of a metrics window
    # Between two heartbeats of a responder here; after three missed ones it counts as gone.
    presence_s: Annotated[float, Field(gt=0, le=BEAT_S_MAX)] = 30.0


class Settings(BaseSettings):
    """All of it. Order of precedence: environment, then the TOML file, then the defaults."""

    model_config = SettingsConfigDict(env_prefix="EDGED_", env_nested_delimiter="__", extra="forbid", frozen=True)

    device: Device
    broker: Broker = Broker()
    host: Host = Host()
    store: Store = Store()
    delivery: Delivery = Delivery()
    slots: dict[Name, Slot] = {}
    pipelines: dict[Name, Pipeline] = {}
    responders: dict[Name, Responder] = {}

    @model_validator(mode="after")
    def _slots_exist(self) -> Settings:
        for kind, table in (("pipelines", self.pipelines), ("responders", self.responders)):
            for name, entry in table.items():
                if entry.slot not in self.slots:
                    known = ", ".join(sorted(self.slots)) or "none"
                    raise ValueError(
                        f"{kind}.{name}.slot={entry.slot!r}: no such slot; add [slots.{entry.slot}] (known: {known})"
                    )
        return self

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource, dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
        return env_settings, init_settings


def load(path: Path) -> Settings:
    """Read `path`, apply the environment, validate; raises ConfigError."""
    import tomllib

    if not path.is_file():
        raise ConfigError(f"{path}: no such file; docs/edged.example.toml is a commented one to start from")
    try:
        tables = TomlConfigSettingsSource(Settings, path)()
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; it must be readable by the user that runs edged") from None
    try:
        return Settings(**tables)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, item) for item in error.errors(include_url=False))) from None


def _explain(path: Path, item: Any) -> str:
    # pydantic puts the type of a source behind its key; the file has no such table.
    before = ("", *item["loc"])
    key = ".".join(str(part) for last, part in zip(before, item["loc"], strict=False) if last != "source") or "(file)"
    if item["type"] == "missing":
        return f"{path}: {key} is missing: add it"
    if item["type"] == "extra_forbidden":
        return f"{path}: {key} is no known key: remove it or correct its spelling"
    value = item.get("input")
    shown = "" if isinstance(value, dict | BaseModel) else f" = {value!r}"
    return f"{path}: {key}{shown}: {item['msg'].removeprefix('Value error, ')}"
