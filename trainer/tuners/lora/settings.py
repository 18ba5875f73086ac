"""What a training of a language model's adapter follows besides its data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.tuners.settings import LoraSettings

Count = Annotated[int, Field(ge=1, strict=True)]


class LanguageSettings(BaseModel):
    """`batch`: examples a step, whatever fits the memory at once and however many processes share it. `context`: examples
    of more tokens are left out; None: what the model can hold. `patience`: epochs without a better loss on the held-out
    examples before the training ends; the best epoch's adapter is kept. `load_4bit`: the base in four bits (bitsandbytes);
    "auto": where there is a GPU and the package. `bf16`: the base and its steps in bfloat16, the adapter in 32 bits;
    "auto": on a GPU that has it. `adapter`: a PEFT adapter to train further; None: a fresh one. `checkpoint_steps`: a killed
    training loses at most so many steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Count = 3
    batch: Count = 16
    learning_rate: float = Field(default=2e-4, gt=0, allow_inf_nan=False)  # at its highest, AdamW's
    lora: LoraSettings = LoraSettings()
    context: Count | None = None  # tokens
    patience: Count = 3
    load_4bit: bool | Literal["auto"] = "auto"
    bf16: bool | Literal["auto"] = "auto"
    adapter: Path | None = None
    checkpoint_steps: Count = 200
