"""Direct preference optimisation of an adapter: what it learns is to prefer one answer over another."""

from __future__ import annotations

from trainer.tuners.base import Tuner, register
from trainer.tuners.dpo.settings import DpoSettings

register(Tuner(name="dpo", kinds=("llm", "lora"), settings=DpoSettings))
