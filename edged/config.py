"""The device's configuration: a TOML file, overridden by the environment (`EDGED_BROKER__HOST=...`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from edged.core.policy import Policy

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Seconds = Annotated[float, Field(gt=0)]
MIB = 1 << 20


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


class Slot(Section):
    """A place for one live model. `seed` is the release folder that a device starts with before the fleet says more."""

    seed: Path | None = None
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    providers: list[str] = ["CPUExecutionProvider"]
    probation_s: Seconds = 60.0
    prove_s_max: Seconds = 60.0
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
    policy: Policy = Policy()
    escalate_to: Name | None = None  # the tier that is asked; none: nothing leaves the device
    answer_by_s: Seconds = 5.0  # whoever waits gets the local answer after this
    label_by_s: Seconds = 7 * 86400.0  # a verdict is wanted for this long
    queue_max: Annotated[int, Field(ge=1, le=10_000)] = 64

    @field_validator("policy", mode="before")
    @classmethod
    def _policy(cls, value: Any) -> Any:
        if isinstance(value, dict):
            unknown = set(value) - set(Policy.__dataclass_fields__)
            if unknown:
                raise ValueError(f"unknown key {sorted(unknown)[0]!r}; known: {', '.join(Policy.__dataclass_fields__)}")
            return Policy(**value)
        return value


class Responder(Section):
    """This device answers the escalations of others on `up/esc/{tier}/{task}` with the model in `slot`."""

    tier: Name
    task: Name = "detect"
    slot: Name
    queue_max: Annotated[int, Field(ge=1, le=10_000)] = 64


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
