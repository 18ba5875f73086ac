"""Trains an adapter to prefer the better of two answers (direct preference optimisation, trl)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import DPOConfig, DPOTrainer

from trainer.core.batching import Batching
from trainer.tuners import language, loop
from trainer.tuners.base import Tuned, Work
from trainer.tuners.dpo.data import Pair
from trainer.tuners.dpo.settings import DpoSettings
from trainer.tuners.scratch import Scratch
from trainer.tuners.settings import SettingsError
from trainer.tuners.together import Together


def tune(work: Work) -> Tuned:
    """Train an adapter for the Hugging Face checkpoint in `work.base` on `work.data` (dpo.data.Pair) and save it in PEFT's
    format as folder `work.out`: a fresh one, or `settings.adapter` further. The base stays as it is.

    What the training must not move far away from is the model as it begins: the base, or the base with that adapter.
    Raises SettingsError for settings that the model cannot honour, ValueError when nothing is left to train on.
    """
    settings = work.settings
    if not isinstance(settings, DpoSettings):
        raise SettingsError(f"dpo: settings of {type(settings).__name__}; use DpoSettings")
    return loop.run(work, settings, partial(_prepare, work, settings))


class _Trainer(loop.Checkpoints, DPOTrainer):
    """trl's own, with whole checkpoints, on pairs that are tokens already, and without a word to anybody outside."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """The reference's log-probabilities; its dropout would make noise of them."""
        model.eval()
        return self.agreed(lambda: super(_Trainer, self).compute_ref_log_probs(model, inputs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The log's numbers are of all processes; inside a step each had those of its own share (`loop.Checkpoints`)."""
        told = self._metrics["train" if self.model.training else "eval"]
        if self.together.processes > 1 and told:
            own = torch.tensor([sum(values) / len(values) for values in told.values()], device=self.args.device)
            means = self.accelerator.reduce(own, "mean").tolist()
            told.update({name: [mean] for name, mean in zip(told, means, strict=True)})
        super().log(logs, start_time)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Leave the card to the run that this training belongs to."""

    def _send_telemetry(self) -> None:
        pass


def _prepare(
    work: Work, settings: DpoSettings, batching: Batching, scratch: Scratch, together: Together
) -> loop.Prepared:
    disable_progress_bars()  # `Work.report` tells how it goes
    base = language.load(work.base, settings)
    rows, held_out, facts = language.as_tokens(base, work, encode, "pairs")
    model = language.adapted(base, settings)
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise SettingsError("lora.target_modules: dpo cannot train an adapter on the output layer; leave it out")
    _still(model)
    told = loop.arguments(work, settings, batching, scratch)
    arguments = DPOConfig(
        **told, beta=settings.beta, max_length=None, disable_dropout=False, precompute_ref_log_probs=True
    )
    if settings.adapter is None:
        # Without its adapter the model is the reference. trl must wrap it itself: of one that is wrapped it makes a copy.
        wrapped = {"model": model.unload(), "peft_config": model.peft_config["default"]}
    else:
        wrapped = {"model": model, "ref_model": _reference(work.base, settings)}
    trainer = _Trainer(
        scratch,
        together,
        **wrapped,
        args=loop.one_device(arguments),
        processing_class=base.words,
        train_dataset=_stored(rows, scratch.folder / "pairs"),
        eval_dataset=_stored(held_out, scratch.folder / "held-out") if held_out else None,
        callbacks=loop.callbacks(work, settings),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # on a base in four bits trl makes it 16: small steps would be lost
    return loop.Prepared(trainer, base.facts | facts | {"beta": settings.beta})


def encode(base: language.Base, pairs: Sequence[Pair]) -> tuple[list[dict[str, list[int]]], int]:
    """The pairs as tokens, and how many are left out: longer than the context, or the same tokens twice."""
    rows = []
    for pair in pairs:
        messages = pair.get("messages")
        prompt = language.prompt_tokens(base, pair["prompt"], messages)
        chosen = language.answer_tokens(base, pair["chosen"], messages)
        rejected = language.answer_tokens(base, pair["rejected"], messages)
        if len(prompt) + max(len(chosen), len(rejected)) <= base.context and chosen != rejected:
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows, len(pairs) - len(rows)


def _reference(folder: Path, settings: DpoSettings) -> Any:
    """The model as it begins, where PEFT cannot hold it beside the one that trains: an adapter with biases of its own
    changes the base. None where trl's copy of the adapter will do."""
    if settings.adapter is None or language.adapter_config(settings.adapter)["bias"] == "none":
        return None
    base = language.load(folder, settings)
    return PeftModel.from_pretrained(base.model, settings.adapter).merge_and_unload().eval()


def _still(model: Any) -> None:
    """No dropout but the adapter's own: what two answers are compared by must not be chance."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0


def _stored(rows: list[dict[str, list[int]]], folder: Path) -> Any:
    """The rows as a dataset on disk, where every process finds what the first one computes of them."""
    with loop.device().main_process_first():
        if not folder.is_dir():
            beside = folder.with_name(f".{folder.name}.part")
            Dataset.from_list(rows).save_to_disk(str(beside))
            beside.rename(folder)
    return load_from_disk(str(folder))
