"""What a preference training follows besides its data."""

from __future__ import annotations

from pydantic import Field

from trainer.tuners.lora.settings import LanguageSettings


class DpoSettings(LanguageSettings):
    """`beta`: how dear it is to move away from the model that the training began with (Rafailov et al. 2023,
    https://arxiv.org/abs/2305.18290, equation 7); small values allow more. `learning_rate` is lower than for examples:
    preferences overfit fast."""

    learning_rate: float = Field(default=2e-5, gt=0, allow_inf_nan=False)
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
