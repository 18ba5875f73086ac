"""Settings of tuners as configuration gives them; `LoraSettings` means the same for a detector and a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from edged.core.lora import LoraSettings, SettingsError

__all__ = ["DEVICE", "LoraSettings", "SettingsError", "parse_settings"]

DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"  # that trains; "auto": CUDA where there is one

Settings = TypeVar("Settings", bound=BaseModel)


def parse_settings(kind: type[Settings], values: Mapping[str, Any], table: str) -> Settings:
    """A tuner's settings; raises SettingsError naming each wrong key of `table`, its value and the fix."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        found = error.errors(include_url=False)
    lines = []
    for item in found:
        key = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            lines.append(f"{table}.{key} = {item['input']!r}: no such setting; use {', '.join(kind.model_fields)}")
        else:
            lines.append(f"{table}.{key} = {item['input']!r}: {item['msg'].removeprefix('Value error, ')}: correct it")
    raise SettingsError("; ".join(lines))
