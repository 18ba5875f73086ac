"""How a LoRA adapter is to be: one class for every tuner of the trainer and for the agents that ask for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator


class SettingsError(ValueError):
    """A training setting is wrong; the message names the key, its value and the fix."""


_FIXES = {
    "r": "use a whole number from 1 to 512",
    "lora_alpha": "use a number above 0, often r or 2 * r",
    "target_modules": 'name at least one module (["qkv_proj"]), or use "all" for every one the tuner supports',
    "lora_dropout": "use a number from 0 up to, not including, 1",
    "bias": 'use "none", "all" or "lora_only"',
}


class LoraSettings(BaseModel):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685), with PEFT's names and meanings.

    `r` is the rank, the update is scaled by `lora_alpha / r`; `target_modules` are module names or their endings, or
    "all" for every module the tuner supports; `lora_dropout` applies to the adapter's input while training; `bias`
    says which bias terms train too. `LoraSettings.parse` raises SettingsError, the constructor pydantic's own error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(default=16, ge=1, le=512, strict=True)
    lora_alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] | Literal["all"] = "all"
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"] = "none"

    @field_validator("lora_alpha", mode="before")
    @classmethod
    def _a_number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("true and false are no numbers")
        return value

    @field_validator("target_modules", mode="before")
    @classmethod
    def _modules_named(cls, value: Any) -> Any:
        if value == "all":
            return value
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ValueError("not a list of module names")
        if not value or not all(isinstance(name, str) and name for name in value):
            raise ValueError("no module is named, or a name is empty")
        return tuple(value)

    @classmethod
    def parse(cls, values: Mapping[str, Any], table: str = "lora") -> LoraSettings:
        """Settings from configuration; raises SettingsError naming every wrong key of `table`, its value and the fix."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            wrong = {str(item["loc"][0]): item["msg"] for item in error.errors()}
        unknown = f"remove it, known keys are {', '.join(cls.model_fields)}"
        lines = [
            f"{table}.{key} = {values.get(key)!r}: {message}; fix: {_FIXES.get(key, unknown)}"
            for key, message in wrong.items()
        ]
        raise SettingsError("; ".join(lines))
