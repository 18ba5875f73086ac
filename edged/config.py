"""The device's configuration: a TOML file, overridden by the environment (`EDGED_BROKER__HOST=...`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from edged.config_agents import Agent, Peer, wrong
from edged.config_host import Host
from edged.config_server import SERVED_TASK
from edged.config_sources import Name, Seconds, Section
from edged.config_work import ANSWERS_MAX as ANSWERS_MAX
from edged.config_work import WHOLE as WHOLE
from edged.config_work import Pipeline as Pipeline
from edged.config_work import Provider as Provider
from edged.config_work import Responder as Responder
from edged.config_work import Roi as Roi
from edged.config_work import Slot as Slot
from edged.core import lay
from edged.core.retention import EVICTABLE
from edged.wire.messages import BEAT_S_MAX

Days = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LABELS_MAX = 32
LABELS_OWN = ("device", "site", "profile", "tier", "group")  # what a device is called by anyway
MIB = 1 << 20


class ConfigError(Exception):
    """The configuration cannot be used; the message names the key, the value and the fix, a line each."""


class BadOverrides(ConfigError):
    """The overrides file cannot be used; without it the configuration can."""


class Device(Section):
    """Who this device is. `id` is also the MQTT client id and the common name of its certificate."""

    id: Name
    site: Name = "default"
    group: Name | None = None
    labels: Annotated[dict[Name, Name], Field(max_length=LABELS_MAX)] = {}  # for choosing among devices (docs/fleet.md)
    # A profile's name, the path of its file, "auto" (`edged profile detect`), or "generic": the defaults of this file alone.
    profile: Annotated[str, Field(min_length=1, max_length=4096)] = "generic"
    tier: Name = "device"
    state_dir: Path = Path("/var/lib/edged")
    overrides: Path | None = None  # a file that names adapters for slots (edged.overrides); it need not be there

    @model_validator(mode="after")
    def _own_labels(self) -> Device:
        taken = sorted(set(self.labels) & set(LABELS_OWN))
        if taken:
            raise ValueError(f"labels.{taken[0]} is what the device's own settings say: call the label something else")
        return self


class Broker(Section):
    """Where the MQTT broker is. Without `ca` the connection is plain TCP, which is refused off loopback."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8883
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    bulk_certificate: Path | None = None  # for `{device}~blk`, the second connection, which carries blocks of files
    bulk_key: Path | None = None
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


class Trust(Section):
    """Whose releases this device accepts: `root` is the TUF root that it was enrolled with.

    `unsigned`: without a root, take whatever desired state names, pinned by its hash alone.
    """

    root: Path | None = None
    unsigned: bool = False

    @model_validator(mode="after")
    def _either(self) -> Trust:
        if self.root is not None and self.unsigned:
            raise ValueError("root and unsigned = true: a device that has a root accepts nothing unsigned; remove one")
        return self


class Store(Section):
    """Limits of what is kept. Nothing is unbounded."""

    blob_bytes_max: Annotated[int, Field(ge=MIB)] = 1024 * MIB
    free_bytes_min: Annotated[int, Field(ge=0)] = 128 * MIB  # of the file system: samples leave this much free
    # Evictable samples are given up this long after their capture: all of them, or by state; 0: kept while there is room.
    age_days: Days | dict[Literal["used", "archived", "rejected", "captured", "unresolved"], Days] = 0.0
    class_max: Annotated[int, Field(ge=0)] = 0  # evictable samples that show the same label; 0: while there is room
    outbox_rows_max: Annotated[int, Field(ge=10)] = 20_000
    outbox_bytes_max: Annotated[int, Field(ge=MIB)] = 512 * MIB

    def ages(self) -> dict[str, float]:
        """`age_days` by state."""
        if isinstance(self.age_days, dict):
            return {str(state): days for state, days in self.age_days.items()}
        return dict.fromkeys(EVICTABLE, self.age_days)


class Delivery(Section):
    """Clocks of the outbox: how soon a message without an answer is sent again, growing up to the maximum."""

    retry_s: Seconds = 20.0
    retry_s_max: Seconds = 900.0
    window_s: Seconds = 60.0  # length of a metrics window
    # Between two heartbeats of a responder here; after three missed ones it counts as gone.
    presence_s: Annotated[float, Field(gt=0, le=BEAT_S_MAX)] = 30.0


class Metrics(Section):
    """Where Prometheus finds the metrics: `address:port`; None: nowhere."""

    listen: str | None = None
    allow_remote: bool = False  # who reaches the port reads the metrics: nobody is asked for a password

    @model_validator(mode="after")
    def _local(self) -> Metrics:
        if self.listen is not None and not loopback(endpoint(self.listen)[0]) and not self.allow_remote:
            raise ValueError(
                f"listen {self.listen!r} is reachable from other machines: use 127.0.0.1, or set allow_remote = true"
            )
        return self


def endpoint(text: str) -> tuple[str, int]:
    """The address and port of `127.0.0.1:9416`, `localhost:9416` or `[::1]:9416`; raises ValueError with the fix."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or not int(port) < 65536:
        raise ValueError(f"listen {text!r} is no address and port: write 127.0.0.1:9416")
    return host, int(port)


def loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    from ipaddress import ip_address

    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Log(Section):
    """What is logged to standard error. `auto`: to the journal with all fields where standard error is the journal, else
    text."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "journald", "text", "json"] = "auto"


class Limits(Section):
    """What the daemon may take of the machine: it works less, or refuses a model, before it goes over.

    `memory_mib`: the daemon and its children together; None: the control group's limit, or the machine's memory less a
    reserve. Temperatures in degrees Celsius. `cpu_share`: of the cores that this process may use.
    """

    memory_mib: Annotated[int, Field(ge=64)] | None = None
    temperature_soft_c: Annotated[float, Field(ge=0, le=150)] = 75.0
    temperature_hard_c: Annotated[float, Field(ge=0, le=150)] = 85.0
    thermal_root: Path = Path("/sys/class/thermal")
    cpu_share: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Limits:
        if not self.temperature_soft_c < self.temperature_hard_c:
            raise ValueError(
                f"temperature_soft_c = {self.temperature_soft_c:g} is not below "
                f"temperature_hard_c = {self.temperature_hard_c:g}: work slows down between the two"
            )
        return self


class Settings(BaseSettings):
    """All of it. Order of precedence: environment, then the TOML file, then the profile, then the defaults."""

    model_config = SettingsConfigDict(env_prefix="EDGED_", env_nested_delimiter="__", extra="forbid", frozen=True)

    device: Device
    broker: Broker = Broker()
    host: Host = Host()
    trust: Trust = Trust()
    store: Store = Store()
    delivery: Delivery = Delivery()
    limits: Limits = Limits()
    metrics: Metrics = Metrics()
    log: Log = Log()
    slots: dict[Name, Slot] = {}
    pipelines: dict[Name, Pipeline] = {}
    responders: dict[Name, Responder] = {}
    agents: dict[Name, Agent] = {}
    peers: dict[Name, Peer] = {}
    _profile: Any = None

    @model_validator(mode="after")
    def _slots_exist(self) -> Settings:
        for kind, table in (("pipelines", self.pipelines), ("responders", self.responders)):
            for name, entry in table.items():
                if entry.slot not in self.slots:
                    known = ", ".join(sorted(self.slots)) or "none"
                    raise ValueError(
                        f"{kind}.{name}.slot={entry.slot!r}: no such slot; add [slots.{entry.slot}] (known: {known})"
                    )
                served = self.slots[entry.slot].server is not None
                if not served and isinstance(entry, Responder) and entry.concurrency > 1:
                    raise ValueError(
                        f"{kind}.{name}.concurrency={entry.concurrency}: the model of slots.{entry.slot} is here and "
                        "answers one question at a time; only a server is asked several at once: remove concurrency"
                    )
                if served and entry.task != SERVED_TASK:
                    raise ValueError(
                        f"{kind}.{name}.task={entry.task!r}: slots.{entry.slot} asks a server, which labels no images: "
                        f'boxes of a chat have neither scores nor coordinates to rely on; use task = "{SERVED_TASK}"'
                    )
        return self

    @model_validator(mode="after")
    def _agents_fit(self) -> Settings:
        if why := wrong(self.agents, self.peers, self.slots, self.device.id):
            raise ValueError(why)
        return self

    @property
    def profile(self) -> Any:
        """The profiles.Profile that lies beneath; None: there is none."""
        return self._profile

    def under(self, profile: Any) -> Settings:
        """The same with `profile` as what lies beneath, by its name in `device.profile`; None changes nothing."""
        if profile is None:
            return self
        settings = self.model_copy(update={"device": self.device.model_copy(update={"profile": profile.name})})
        settings._profile = profile
        return settings

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource, dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
        return env_settings, init_settings


def load(path: Path, *, overridden: bool = True) -> Settings:
    """Read `path`, lay its profile beneath it and its overrides over it, apply the environment, validate.

    `overridden`: False leaves the overrides out. Raises ConfigError, and BadOverrides when they alone are wrong.
    """
    import tomllib

    from edged.overrides import OverridesError, laid

    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; docs/edged.example.toml is a commented one to start from")
        tables = TomlConfigSettingsSource(Settings, path)()
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; it must be readable by the user that runs edged; or be root"
        ) from None
    try:
        return _with_profile(path, laid(tables, EnvSettingsSource(Settings)()) if overridden else tables)
    except OverridesError as error:
        raise BadOverrides(str(error)) from None
    except SettingsError as error:
        raise ConfigError(f"the environment: {error}") from None
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, item) for item in error.errors(include_url=False))) from None


def _with_profile(path: Path, tables: dict[str, Any]) -> Settings:
    environment = EnvSettingsSource(Settings)()
    if not lay.wanted(lay.beneath(tables, environment)):
        return Settings(**tables)
    from edged import profiles

    try:
        profile, tables = profiles.laid(tables, environment, Settings.model_fields)
    except profiles.ProfileError as error:
        raise ConfigError(f"{path}: device.profile: {error}") from None
    return Settings(**tables).under(profile)


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
    if key.endswith(".url"):
        shown = " (not shown here: it may hold a password)"
    return f"{path}: {key}{shown}: {item['msg'].removeprefix('Value error, ')}"
