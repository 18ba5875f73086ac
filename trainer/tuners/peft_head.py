"""`PeftHead`: a learning head for an agent's model. It gives any tuner here the configuration of an agent
(`learning_head="peft"`, `learning_head_config={...}`), all of whose keys count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from trainer.checkpoints import find_checkpoint
from trainer.tuners.base import Report, Tuned, Work, tuner
from trainer.tuners.settings import LoraSettings, SettingsError, parse_settings

_LANGUAGE = ("llm", "lora")  # kinds of releases whose models are of transformers


class PeftHead:
    """A model with a LoRA adapter to learn: `model` is its checkpoint, `learning_head_config` has PEFT's keys `r`,
    `lora_alpha`, `target_modules`, `lora_dropout` and `bias`, `learner` is the tuner that trains it.

    The weights live with the trainer, and so does the head; the device's agent holds the configuration and the
    experience. After `tune`, `adapter` is where the adapter lies.
    """

    def __init__(
        self, model: str | Path, learning_head_config: Mapping[str, Any] | None = None, *, learner: str = "lora"
    ) -> None:
        """Raises SettingsError naming every key that is wrong, ValueError for a learner that is none."""
        self.model = Path(model)
        self.peft_config = LoraSettings.parse(dict(learning_head_config or {}))
        self.tuner = tuner(learner)
        self._key = _lora_key(learner, self.tuner.settings)
        self.adapter: Path | None = None

    def settings(self, **values: Any) -> BaseModel:
        """The tuner's settings with this head's adapter; `values` are the tuner's others (`epochs`, a vision model's
        `labels`, ...). Raises SettingsError naming every one that is wrong, or that would leave the adapter out."""
        if self._key in values:
            raise SettingsError(f"{self._key} = {values[self._key]!r}: the head has its own; set learning_head_config")
        method = values.get("method", self._key)  # of a tuner that can train without an adapter too
        if method != self._key:
            raise SettingsError(f"method = {method!r}: a head trains its adapter; leave the key out")
        return parse_settings(self.tuner.settings, {self._key: self.peft_config, **values}, self.tuner.name)

    def tune(
        self,
        data: Sequence[Any],
        out: Path,
        scratch: Path,
        *,
        seed: int = 0,
        held_out: Sequence[Any] = (),
        report: Report = lambda _values: None,
        **values: Any,
    ) -> Tuned:
        """Train the adapter on the tuner's examples and leave it at `out`; raises what the tuner's `tune` raises."""
        settings = self.settings(**values)
        tuned = self.tuner.tune(Work(self.model, data, out, scratch, settings, seed, held_out, report))
        self.adapter = tuned.path
        return tuned

    def prepare_peft_model(self, loaded: Any = None) -> Any:
        """The model with this head's fresh adapter, for whoever trains the weights himself; only what learns has gradients.

        `loaded`: a transformers model to wrap, for `learner="yolo"` the network (the `model` of ultralytics' YOLO); without
        it the checkpoint is loaded: a folder or an id of the hub, for `learner="yolo"` a .pt file. Raises SettingsError for
        keys that the model cannot honour and for a checkpoint that is broken or of another kind of model, CheckpointError
        for one that is nowhere and for a broken .pt file, FileNotFoundError for an absent one.
        """
        if not set(self.tuner.kinds) & set(_LANGUAGE):
            return self._prepare_network(loaded)
        if loaded is None and self.model.is_file():
            raise SettingsError(
                f"model {str(self.model)!r}: the learner {self.tuner.name!r} takes the Hugging Face folder of a language "
                "model; name that folder"
            )
        from peft import get_peft_model  # heavy

        from trainer.tuners.language import causal_lm, lora_config

        model = causal_lm(find_checkpoint(str(self.model))) if loaded is None else loaded
        return get_peft_model(model, lora_config(model, self.peft_config))

    def _prepare_network(self, loaded: Any) -> Any:
        from trainer.tuners.yolo.process import prepare_process

        prepare_process()
        from trainer.tuners.yolo import methods  # heavy
        from trainer.tuners.yolo.weights import open_weights

        loaded = open_weights(self.model).model if loaded is None else loaded
        methods.inject(loaded, self.peft_config, set())
        methods.freeze(loaded, "lora", self.peft_config, set())
        return loaded


def _lora_key(name: str, settings: type[BaseModel]) -> str:
    """The field of a tuner's settings that says how its adapter is; raises ValueError when it trains none."""
    for key, field in settings.model_fields.items():
        if LoraSettings in (field.annotation, *getattr(field.annotation, "__args__", ())):
            return key
    raise ValueError(f"learner {name!r} trains no adapter: none of its settings is a LoraSettings")
