"""LoRA for causal language models: an adapter that learns the answers of examples."""

from __future__ import annotations

from trainer.tuners.base import Tuner, register
from trainer.tuners.lora.settings import LanguageSettings

register(Tuner(name="lora", kinds=("llm", "lora"), settings=LanguageSettings))
