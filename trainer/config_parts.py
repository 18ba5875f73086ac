"""What every table of the trainer's configuration is made of."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from trainer.tuners.settings import LoraSettings, SettingsError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]
Days = Annotated[float, Field(gt=0, le=3650)]

Rules = TypeVar("Rules")


class Section(BaseModel):
    """Base of every table: an unknown key is a typing mistake and is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _lora(value: Any) -> Any:
    if isinstance(value, dict):
        try:
            return LoraSettings.parse(value)
        except SettingsError as error:
            raise ValueError(str(error)) from None
    return value


LoraTable = Annotated[LoraSettings, BeforeValidator(_lora)]


def make_rules(rules: type[Rules], value: dict[str, float]) -> Rules:
    """The bounds of a gate, a dataclass with defaults, with those of a table; raises ValueError."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(rules)}  # type: ignore[arg-type]
    unknown = sorted(value.keys() - defaults.keys())
    if unknown:
        raise ValueError(f"unknown rule {', '.join(unknown)}; known: {', '.join(defaults)}")
    for name, number in value.items():
        if not math.isfinite(number):
            raise ValueError(f"{name} = {number}: use a finite number")
    # Counts come as floats out of a table of numbers.
    return rules(**{name: type(defaults[name])(number) for name, number in value.items()})
