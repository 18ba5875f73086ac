"""The trainer's configuration: a TOML file, overridden by the environment (`TRAINER_BROKER__HOST=...`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from edged.wire.manifest import Thresholds
from trainer.config_drift import Drift
from trainer.config_fleet import Cron, DatabaseAt, Notify, Storage, Triggers
from trainer.config_network import Broker, Http
from trainer.config_parts import Days, LoraTable, Name, Seconds, Section, Share, make_rules
from trainer.config_registration import TARGETS_MAX, Registration
from trainer.config_rollout import Rollout
from trainer.config_text import TextModel
from trainer.core.gate import Rules as GateRules
from trainer.core.placement import Needs
from trainer.core.split import SplitRules
from trainer.core.triggers import TriggerRules
from trainer.tuners.settings import DEVICE, LoraSettings


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key, the value and the fix, a line each."""


class Trust(Section):
    """The keys that sign releases and the metadata that says what is signed, in `folder` (`trainer keys init`).

    Days from signing to expiry; online metadata is renewed by `trainer serve` at half of it. See docs/security.md.
    """

    folder: Path = Path("trust")
    root_days: Days = 365.0
    targets_days: Days = 365.0
    models_days: Days = 7.0
    snapshot_days: Days = 7.0
    timestamp_days: Days = 1.0

    def lifetimes(self) -> dict[str, float]:
        """Days by role."""
        return {key.removesuffix("_days"): days for key, days in self.model_dump(exclude={"folder"}).items()}


class Blocks(Section):
    """Releases as blocks over MQTT: a block that several devices want is published once. It waits `window_s` for others who
    are about to ask, and up to `patience_s` for those who fetch the same file and are slower; when nobody was fetching
    anything the first ones wait for `gather_s` (core.asked).
    `kib_s`: no faster than this, 0: no limit. `samples`: they come up as blocks too, instead of by HTTPS."""

    window_s: Annotated[float, Field(ge=0, le=5)] = 0.1
    patience_s: Annotated[float, Field(ge=0, le=30)] = 6.0
    gather_s: Annotated[float, Field(ge=0, le=30)] = 1.0
    kib_s: Annotated[int, Field(ge=0)] = 0
    samples: bool = False


class Model(Section):
    """One model that the fleet improves; its name is the slot's name on the devices and the releases' name.

    `kind` says what it answers with: boxes, outlines, or one class of the whole image; images are labelled as it needs.
    The folders hold labelled images (`trainer.datasets`). `holdout` is the work as it is now, `holdout_clean` the
    beginnings that must not be forgotten, `calibration` what confidence is fitted on; no image may be in two of them.
    """

    kind: Literal["detect", "segment", "classify"] = "detect"
    checkpoint: Path  # .pt of the first release; later ones are kept beside the registry
    labels: Annotated[list[str], Field(min_length=1)]
    imgsz: Annotated[int, Field(ge=32, le=4096, multiple_of=32)] = 640
    replay: Path | None = None
    holdout: Path
    holdout_clean: Path
    holdout_test: Path | None = None  # what no gate looks at: for a last, unbiased word
    calibration: Path
    tier: str = ""  # only devices of this tier are the model's fleet; empty: all that run it
    method: Literal["lora", "head", "full"] = "lora"  # what of the network learns (docs/training-vision.md)
    lora: LoraTable = LoraSettings()
    epochs: Annotated[int, Field(ge=1, le=10000)] = 10
    patience: Annotated[int, Field(ge=0)] = 0  # epochs without a lower held-out loss until it stops; 0: it does not
    validation_share: Annotated[float, Field(gt=0, le=0.5)] = 0.1  # of what would train: says when to stop
    batch: Annotated[int, Field(ge=1, le=4096)] = 32
    lr: Annotated[float, Field(gt=0, lt=1)] = 0.002
    device: str = "auto"  # "auto": CUDA where there is one
    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # on a CPU; 0: all cores
    seed: int = 0
    replay_ratio: Annotated[float, Field(ge=0, le=100)] = 1.0  # replayed images for each new one
    calibration_share: Share = 0.15  # of the new samples: they calibrate and do not train
    gate_share: Share = 0.0  # of the new samples: kept for `trainer holdout extend`, they do not train
    test_share: Share = 0.0  # the same for the test set
    split_block_s: Seconds = 60.0  # what a device takes within a block falls on one side of the split
    split_guard_s: Annotated[float, Field(ge=0)] = 5.0  # kept free where two sides meet (core.split)
    near_duplicates: Literal["keep", "thin"] = "keep"  # of each other, within what trains
    score: Share = 0.25  # answers score at least this
    iou: Share = 0.7
    target_risk: Share = 0.05  # accepted answers that may be wrong; devices' policies aim at it
    threshold: Annotated[int, Field(ge=0)] = 100  # train when there are MORE new labelled samples
    minimum_interval_s: Annotated[float, Field(ge=0)] = 3600.0
    samples_min: Annotated[int, Field(ge=1)] = 10  # new samples that a schedule, a drift or an agent's wish needs
    cron: Cron | None = None  # the model's own schedule, "" for none; without it [triggers] says
    label_confidence_min: Share = 0.5
    samples_max: Annotated[int, Field(ge=1)] = 5000  # of one job
    archive: bool = False  # what trained a release that the fleet runs is archived on its devices
    claim_s_max: Seconds = 3600.0  # how long devices may take to hand samples over
    training_s_estimate: Seconds = 900.0  # until a job has shown how long it takes
    needs: dict[
        Literal["gpu_mib", "memory_mib", "disk_mib"], Annotated[int, Field(ge=0)]
    ] = {}  # of the host that trains
    gate: dict[str, float] = {}
    profiles: list[str] = []  # firmware profiles that a release must fit (docs/gate.md)
    # For proving that the gate works, never for use: `train` ships the old weights again, `labels` shuffles the labels.
    ablate: Literal["", "train", "labels"] = ""

    @field_validator("gate")
    @classmethod
    def _gate(cls, value: dict[str, float]) -> dict[str, float]:
        make_rules(GateRules, value)
        return value

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.match(DEVICE, value):
            raise ValueError('use "auto", "cpu", "cuda" or "cuda:NUMBER"')
        return value

    @model_validator(mode="after")
    def _split(self) -> Model:
        self.split_rules()
        return self

    def split_rules(self) -> SplitRules:
        """What `core.split` needs; raises ValueError for shares that do not fit together."""
        return SplitRules(
            self.calibration_share, self.gate_share, self.test_share, self.split_block_s, self.split_guard_s
        )

    def thresholds(self) -> Thresholds:
        """What a release of this model says about its answers."""
        return Thresholds(score=self.score, iou=self.iou)

    def placement_needs(self) -> Needs:
        """What `core.placement` needs."""
        return Needs(**self.needs)

    def trigger_rules(self) -> TriggerRules:
        """What `core.triggers` needs."""
        return TriggerRules(self.threshold, self.minimum_interval_s, self.samples_min)

    def gate_rules(self) -> GateRules:
        """What `core.gate` needs: its own defaults where the configuration says nothing."""
        return make_rules(GateRules, self.gate)


def _text_or_vision(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "text" if kind == "llm" else "vision"


AnyModel = Annotated[
    Annotated[Model, Tag("vision")] | Annotated[TextModel, Tag("text")], Discriminator(_text_or_vision)
]


class Worker(Section):
    """Who trains. `embedded`: `trainer serve` does it itself; False: a `trainer worker` on this host does."""

    embedded: bool = True
    lease_s: Annotated[float, Field(ge=1, le=3600)] = 60.0  # a worker that is silent for so long has lost its job


class Enrolment(Section):
    """The authority that issues everybody's certificates, and the broker that must know whom it issued them to."""

    folder: Path = Path("ca")  # ca.crt, ca.key, crl.pem, issued/
    broker: str = ""  # HOST:PORT that devices are told; by default broker.host and broker.port
    broker_folder: Path = Path("/etc/mosquitto/edged")  # what `trainer broker config` writes
    broker_reload: str = "systemctl reload mosquitto"  # has the broker read its list of revoked certificates again


class TrainerConfig(BaseSettings):
    """Everything a trainer needs. `name` is its MQTT client id and the common name of its certificate."""

    model_config = SettingsConfigDict(
        env_prefix="TRAINER_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    name: Name = "trainer"
    site: Name = "default"
    data_dir: Path = Path("/var/lib/edged-trainer")
    broker: Broker = Broker()
    http: Http = Http()
    trust: Trust = Trust()
    blocks: Blocks = Blocks()
    models: dict[Name, AnyModel] = {}
    rollout: Rollout = Rollout()
    drift: Drift = Drift()
    worker: Worker = Worker()
    triggers: Triggers = Triggers()
    notify: Notify = Notify()
    database: DatabaseAt = DatabaseAt()
    storage: Storage = Storage()
    enrolment: Enrolment = Enrolment()
    registration: Annotated[list[Registration], Field(max_length=TARGETS_MAX)] = []  # servers that are told of releases
    command_resend_s: Seconds = 30.0
    catalogue_refresh_s: Seconds = 3600.0  # ask every device for its whole catalogue this often
    silent_s_max: Seconds = 7200.0  # of which nothing was heard for longer does not count as online

    @field_validator("registration")
    @classmethod
    def _registration(cls, value: list[Registration]) -> list[Registration]:
        names = [each.name for each in value]
        if len(set(names)) != len(names):
            raise ValueError("two of them have the same name: give each its own")
        return value

    @model_validator(mode="after")
    def _heard(self) -> TrainerConfig:
        # A device that has nothing to do says nothing but the answer to that question.
        if self.silent_s_max <= self.catalogue_refresh_s:
            raise ValueError(
                f"silent_s_max = {self.silent_s_max:g} is not above catalogue_refresh_s = {self.catalogue_refresh_s:g}, "
                "in which every device says something: use twice of that"
            )
        return self

    @property
    def database_at(self) -> Path | str:
        """Where everything is that must outlive the process: a SQLite file, or an URL with its password."""
        return self.database.where(self.data_dir)

    @property
    def releases(self) -> Path:
        """The registry's folder."""
        return self.data_dir / "releases"

    @property
    def samples(self) -> Path:
        """The folder of uploaded pixels, each file named by its SHA-256."""
        return self.data_dir / "samples"

    @property
    def holdouts(self) -> Path:
        """The folder of what was frozen and of what was trained on (trainer/holdout.py)."""
        return self.data_dir / "holdouts"

    @property
    def pool(self) -> Path:
        """The folder of the local pool of labelled samples (trainer/pool.py)."""
        return self.data_dir / "pool"

    @property
    def runs(self) -> Path:
        """The folder of training runs, one folder each."""
        return self.data_dir / "runs"

    @property
    def checkpoints(self) -> Path:
        """The folder of the releases' trainable weights, `name@version.pt`."""
        return self.data_dir / "checkpoints"

    def any_model(self, name: str) -> Model | TextModel:
        """The settings of a model of whatever kind; raises ConfigError naming those that are there."""
        try:
            return self.models[name]
        except KeyError:
            known = ", ".join(sorted(self.models)) or "none"
            raise ConfigError(f"models.{name}: no such model; configured: {known}") from None

    def model(self, name: str) -> Model:
        """The settings of a vision model; raises ConfigError."""
        found = self.any_model(name)
        if not isinstance(found, Model):
            raise ConfigError(f"models.{name} is of kind {found.kind}: name a vision model here")
        return found

    def text(self, name: str) -> TextModel:
        """The settings of a language model; raises ConfigError."""
        found = self.any_model(name)
        if not isinstance(found, TextModel):
            raise ConfigError(f'models.{name} is of kind {found.kind}: name a language model (kind = "llm") here')
        return found

    def checkpoint(self, release: str, model: str) -> Path:
        """The trainable weights of a release: its own where a job made it, else the configured first ones."""
        own = self.checkpoints / f"{release}.pt"
        return own if own.is_file() else self.any_model(model).checkpoint


_FIXES = {
    "extra_forbidden": "remove it, or correct its spelling",
    "greater_than_equal": "use a larger number",
    "greater_than": "use a larger number",
    "less_than_equal": "use a smaller number",
    "less_than": "use a smaller number",
    "int_parsing": "use a whole number",
    "float_parsing": "use a number",
    "literal_error": "use one of the values named",
    "path_type": "use a path in quotes",
    "string_type": "put it in quotes",
    "string_pattern_mismatch": "use letters, digits, '_', '.' and '-'",
}


def load_config(path: Path) -> TrainerConfig:
    """The configuration in the TOML file `path` with the environment on top; relative paths start at the file's folder.

    Raises ConfigError.
    """
    if not path.is_file():
        raise ConfigError(f"configuration {path} does not exist; give the path of a TOML file with --config")

    class FromFile(TrainerConfig):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return env_settings, TomlConfigSettingsSource(settings_cls, path)

    try:
        config = FromFile()
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_explain(item)}" for item in error.errors(include_url=False))) from None
    except ValueError as error:  # TOML's and pydantic-settings' own
        raise ConfigError(f"{path}: {error}") from None
    # Of the class that other processes know: a job with its configuration is handed to one (`trainer.watched`).
    plain = TrainerConfig.model_construct(config.model_fields_set, **dict(config))
    resolved: TrainerConfig = _resolve(plain, path.resolve().parent)
    return resolved


def _explain(item: Any) -> str:
    # pydantic puts the tag of a model behind its name; the file has no such table.
    parts = [part for place, part in enumerate(item["loc"]) if not (item["loc"][0] == "models" and place == 2)]
    key = ".".join(map(str, parts)) or "configuration"
    if item["type"] == "missing":
        return f"{key} is missing: add it"
    value = item.get("input")
    secret = item["loc"][:2] in (("database", "url"), ("notify", "urls"))
    shown = "" if secret or isinstance(value, dict | BaseModel) else f" = {str(value)[:80]!r}"
    fix = _FIXES.get(item["type"])
    return f"{key}{shown}: {item['msg'].removeprefix('Value error, ')}" + (f"; fix: {fix}" if fix else "")


def _resolve(value: Any, folder: Path) -> Any:
    """The same settings with every path absolute."""
    if isinstance(value, Path):
        return folder / value.expanduser()
    if isinstance(value, BaseModel):
        changes = {name: _resolve(getattr(value, name), folder) for name in type(value).model_fields}
        return value.model_copy(update=changes)
    if isinstance(value, dict):
        return {name: _resolve(each, folder) for name, each in value.items()}
    if isinstance(value, list):
        return [_resolve(each, folder) for each in value]
    return value
