"""The configuration of a language model that is improved by LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from trainer.config_parts import LoraTable, Section, Share, make_rules
from trainer.core.gate_text import Rules
from trainer.tuners.settings import LoraSettings


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
    holdout: Path | None = None  # a frozen dataset.jsonl that judges; None: `holdout_share` of each data set, by hash
    holdout_share: Share = 0.3
    validation_share: Share = 0.1  # of the rest: ends the training early and gives the golden prompts
    threshold: Annotated[int, Field(ge=0)] = 49  # train when there are MORE new examples
    tier: str = ""  # only devices of this tier are the model's fleet; empty: all that run it
    gate: dict[str, float] = {}

    @field_validator("gate")
    @classmethod
    def _gate(cls, value: dict[str, float]) -> dict[str, float]:
        make_rules(Rules, value)
        return value

    def gate_rules(self) -> Rules:
        """What `core.gate_text` needs: its own defaults where the configuration says nothing."""
        return make_rules(Rules, self.gate)

    def asked(self) -> dict[str, Any]:
        """What the configuration says about the training, by the names that tuners have for it."""
        names = {"lora": "lora", "epochs": "epochs", "batch": "batch", "lr": "learning_rate"}
        said = {names[key]: getattr(self, key) for key in names if key in self.model_fields_set}
        return {**{name: value for name, value in said.items() if value is not None}, **self.tuning}
