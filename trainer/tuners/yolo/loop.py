"""The ultralytics training loop as this project runs it, LoRA included; imported after `process.prepare_process`.

What differs from ultralytics: the data set is handed over instead of looked up, nothing is validated, plotted or saved
on the way, all cores are used, and the averaged (EMA) weights are saved once, in full precision.
"""

from __future__ import annotations

import logging
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
import ultralytics
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOGGER, SETTINGS

from trainer.tuners.settings import LoraSettings, SettingsError
from trainer.tuners.yolo.settings import OnEpoch, Trained

_INTEGRATIONS = ("sync", "clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")


class Loop(DetectionTrainer):
    """One run; `data`, `threads` and `lora` are set by `run_training` before ultralytics' constructor needs them."""

    def __init__(
        self, data: dict[str, Any], overrides: dict[str, Any], threads: int, lora: LoraSettings | None
    ) -> None:
        self._given, self._threads, self._lora = data, threads, lora
        super().__init__(overrides=overrides)

    def get_dataset(self) -> dict[str, Any]:
        return self._given

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        model: nn.Module = super().get_model(cfg, weights, verbose)
        if self._lora is not None:
            _inject(model, self._lora)
        return model

    def _setup_train(self) -> None:
        super()._setup_train()
        model = cast(nn.Module, self.model)  # a path until here
        # Ultralytics leaves a core idle and switches every parameter's gradient on; both are put right only here.
        torch.set_num_threads(self._threads)
        # Channels last: a step takes three quarters of the time on a CPU, with the same result.
        model.to(memory_format=torch.channels_last)
        if self._lora is not None:
            _freeze_base(model, self._lora)

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        if mode == "val":
            return self.train_loader  # asked for, but never read: nothing is validated here
        with redirect_stdout(StringIO()):  # the one progress bar that its settings do not silence
            return super().get_dataloader(dataset_path, batch_size, rank, mode)

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = super().preprocess_batch(batch)
        batch["img"] = batch["img"].contiguous(memory_format=torch.channels_last)
        return batch

    def validate(self) -> tuple[dict[str, float], None]:
        return {}, None

    def save_model(self) -> bool:
        return False

    def final_eval(self) -> None:
        """Nothing: it would fuse layers that LoRA has replaced."""


def run_training(
    data: dict[str, Any],
    overrides: dict[str, Any],
    threads: int,
    lora: LoraSettings | None,
    out: Path,
    on_epoch: OnEpoch | None,
) -> Trained:
    """Train as `overrides` (ultralytics' keys) say and save the result to `out`, whole or not at all."""
    LOGGER.setLevel(logging.ERROR)
    SETTINGS.update(dict.fromkeys(_INTEGRATIONS, False))
    loop = Loop(data, overrides, threads, lora)
    metrics: dict[str, float] = {}

    def report(trainer: Any) -> None:
        metrics.update({name: float(value) for name, value in trainer.tloss.items()})
        metrics["loss"] = sum(float(value) for value in trainer.tloss.values())
        metrics["lr"] = float(trainer.optimizer.param_groups[0]["lr"])
        if on_epoch is not None:
            on_epoch(trainer.epoch + 1, trainer.epochs, dict(metrics))

    loop.add_callback("on_fit_epoch_end", report)
    loop.train()
    live = cast(nn.Module, loop.model)
    trainable = sum(p.numel() for p in live.parameters() if p.requires_grad)
    average: Any = loop.ema
    model = average.ema.to(memory_format=torch.contiguous_format)
    if lora is not None:
        _merge(model)
    model.criterion = None
    model.args = {key: value for key, value in overrides.items() if key not in ("project", "name")}
    model.requires_grad_(False)
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
        raise ValueError(f"training on {data['path']} diverged: weights are not finite; lower lr={overrides['lr0']}")
    checkpoint = {"epoch": -1, "model": model, "train_args": model.args, "version": ultralytics.__version__}
    beside = out.with_name(out.name + ".part")
    torch.save(checkpoint, beside)
    beside.replace(out)
    return Trained(out, trainable, sum(p.numel() for p in model.parameters()), metrics)


def _is_adaptable(name: str, module: nn.Module) -> bool:
    # The DFL "convolution" holds the constants 0..15 of the box decoder and must not learn.
    return isinstance(module, nn.Conv2d) and module.groups == 1 and ".dfl." not in f".{name}"


def _targets(model: nn.Module, wanted: tuple[str, ...] | str) -> list[str]:
    """Full names of the layers to adapt; raises SettingsError when there is none or one that LoRA cannot adapt."""
    adaptable = [name for name, module in model.named_modules() if _is_adaptable(name, module)]
    if wanted == "all":
        return adaptable
    chosen = [
        name
        for name, _ in model.named_modules()
        if any(name == ending or name.endswith(f".{ending}") for ending in wanted)
    ]
    fix = f'name convolutions such as {adaptable[0]!r}, or use "all"'
    if not chosen:
        raise SettingsError(f"lora.target_modules = {wanted!r}: no layer of the model is called so; fix: {fix}")
    for name in chosen:
        if name not in adaptable:
            raise SettingsError(
                f"lora.target_modules = {wanted!r}: {name!r} is no ungrouped convolution that learns; fix: {fix}"
            )
    return chosen


def _inject(model: nn.Module, lora: LoraSettings) -> None:
    keys = lora.model_dump(exclude={"target_modules"})
    inject_adapter_in_model(LoraConfig(target_modules=_targets(model, lora.target_modules), **keys), model)
    # Ultralytics warns once a frozen parameter; `_freeze_base` freezes them after its set-up.
    model.requires_grad_(True)


def _freeze_base(model: nn.Module, lora: LoraSettings) -> None:
    """Leave only LoRA's matrices, batch-norm and the biases that `lora.bias` names to learn."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(True)
        elif isinstance(module, BaseTunerLayer):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name.startswith("lora_"))
            base = module.get_base_layer()
            if lora.bias == "lora_only" and base.bias is not None:
                base.bias.requires_grad_(True)
        elif lora.bias == "all" and isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.requires_grad_(True)


def _merge(model: nn.Module) -> None:
    """Add every LoRA product to its base layer's weights and put the base layer back in its place."""
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
