"""The configuration of a language model that is improved by LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trainer.config_fleet import Cron
from trainer.config_parts import LoraTable, Seconds, Section, Share, make_rules
from trainer.core.gate_text import Rules
from trainer.core.placement import Needs
from trainer.core.split import SplitRules
from trainer.core.triggers import TriggerRules
from trainer.tuners.dpo.settings import DpoSettings
from trainer.tuners.settings import LoraSettings, parse_settings


class TextModel(Section):
    """A language model in a slot of this name. Its releases are whole models of kind `llm`; what is trained are adapters
    for one of them, releases of kind `lora` called `adapter`.

    Settings of the strategy that are not named here go into `tuning`. What is not set is the strategy's own default.
    """

    kind: Literal["llm"]
    checkpoint: Path  # the Hugging Face checkpoint that the base release was exported from, a folder
    base: str = ""  # NAME@VERSION that adapters are made for; "": the newest registered whole model of this name
    adapter: str = ""  # the adapters' name; "": NAME-lora
    lora: LoraTable = LoraSettings()
    epochs: Annotated[int, Field(ge=1, le=10000)] | None = None
    batch: Annotated[int, Field(ge=1, le=4096)] | None = None
    lr: Annotated[float, Field(gt=0, lt=1)] | None = None
    tuning: dict[str, Any] = {}
    seed: int = 0
    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # 0: all cores
    # A dataset.jsonl that judges, frozen at its first use; None: `holdout_share` of what is new in each data set.
    holdout: Path | None = None
    # Of answers that must not be forgotten, frozen the same way; None: what `trainer holdout freeze --set base` froze.
    holdout_base: Path | None = None
    holdout_share: Share = 0.3
    calibration_share: Share = 0.15  # of what is new: confidence is fitted on it, it does not train
    calibration_max: Annotated[int, Field(ge=1)] = 500  # the newest of them: each is answered once
    test_share: Share = 0.0  # of what is new: no gate looks at it
    split_block_s: Seconds = 60.0  # what a device was asked within a block falls on one side
    split_guard_s: Annotated[float, Field(ge=0)] = 5.0  # kept free where two sides meet (core.split)
    resemblance: Annotated[float, Field(ge=0.5, le=1)] = (
        0.8  # from which on two questions count as the same (docs/data.md)
    )
    label_confidence_min: Share = 0.5
    target_risk: Share = 0.05  # accepted answers that may be wrong; devices' policies aim at it
    validation_share: Share = 0.1  # of the rest: ends the training early and gives the golden prompts
    threshold: Annotated[int, Field(ge=0)] = 49  # train when there are MORE new examples
    # What `trainer serve` does with the texts that devices have asked about; they count once the fleet runs `base`.
    strategy: Literal["lora", "dpo"] = "lora"
    minimum_interval_s: Annotated[float, Field(ge=0)] = 3600.0
    samples_max: Annotated[int, Field(ge=1)] = 5000  # of one job
    archive: bool = False  # what trained an adapter is archived on its devices
    claim_s_max: Seconds = 3600.0  # how long devices may take to hand samples over
    training_s_estimate: Seconds = 900.0  # until a job has shown how long it takes
    needs: dict[
        Literal["gpu_mib", "memory_mib", "disk_mib"], Annotated[int, Field(ge=0)]
    ] = {}  # of the host that trains
    samples_min: Annotated[int, Field(ge=1)] = 10  # new samples that a schedule, a drift or an agent's wish needs
    cron: Cron | None = None  # the model's own schedule, "" for none; without it [triggers] says
    tier: str = ""  # only devices of this tier are the model's fleet; empty: all that run it
    gate: dict[str, float] = {}
    profiles: list[str] = []  # firmware profiles that base and adapter together must fit (docs/gate.md)

    @field_validator("gate")
    @classmethod
    def _gate(cls, value: dict[str, float]) -> dict[str, float]:
        make_rules(Rules, value)
        return value

    @field_validator("tuning")
    @classmethod
    def _paths(cls, value: dict[str, Any]) -> dict[str, Any]:
        # As a path it is resolved with the others of the file.
        return value | ({"adapter": Path(value["adapter"])} if isinstance(value.get("adapter"), str) else {})

    @model_validator(mode="after")
    def _tunes(self) -> TextModel:
        # Of the strategy that has the most settings: the other one is told of a key that is not its own by its job.
        told = parse_settings(DpoSettings, self.asked(), "tuning").lora
        if told.bias != "none":
            raise ValueError(
                f'lora.bias = "{told.bias}": an adapter that devices run (GGUF) holds no biases; use "none"'
            )
        return self

    @model_validator(mode="after")
    def _split(self) -> TextModel:
        self.split_rules()
        return self

    def adapter_name(self, model: str) -> str:
        """What the adapters of this model are called."""
        return self.adapter or f"{model}-lora"

    def split_rules(self) -> SplitRules:
        """What `core.split` needs; raises ValueError for shares that do not fit together. A configured holdout judges
        alone."""
        share = 0.0 if self.holdout is not None else self.holdout_share
        return SplitRules(self.calibration_share, share, self.test_share, self.split_block_s, self.split_guard_s)

    def placement_needs(self) -> Needs:
        """What `core.placement` needs."""
        return Needs(**self.needs)

    def trigger_rules(self) -> TriggerRules:
        """What `core.triggers` needs."""
        return TriggerRules(self.threshold, self.minimum_interval_s, self.samples_min)

    def gate_rules(self) -> Rules:
        """What `core.gate_text` needs: its own defaults where the configuration says nothing."""
        return make_rules(Rules, self.gate)

    def asked(self) -> dict[str, Any]:
        """What the configuration says about the training, by the names that tuners have for it."""
        names = {"lora": "lora", "epochs": "epochs", "batch": "batch", "lr": "learning_rate"}
        said = {names[key]: getattr(self, key) for key in names if key in self.model_fields_set}
        return {**{name: value for name, value in said.items() if value is not None}, **self.tuning}


def own_names(model: str, settings: object) -> tuple[str, ...]:
    """The names under which a model has releases, adapters too: what they answer is no label for it."""
    return (model, settings.adapter_name(model)) if isinstance(settings, TextModel) else (model,)
