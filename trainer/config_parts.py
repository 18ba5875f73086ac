"""What every table of the trainer's configuration is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from trainer.tuners.settings import LoraSettings, SettingsError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]
Days = Annotated[float, Field(gt=0, le=3650)]


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


def check_rules(rules: type, value: dict[str, float]) -> dict[str, float]:
    """The bounds of a gate, all of them known to the dataclass `rules`; raises ValueError."""
    from dataclasses import fields

    known = [field.name for field in fields(rules)]
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"unknown rule {', '.join(unknown)}; known: {', '.join(known)}")
    return value
