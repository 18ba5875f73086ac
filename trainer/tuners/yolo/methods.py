"""What of a network learns: LoRA's matrices, the head, or everything; and the network as it was, afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from trainer.tuners.settings import LoraSettings, SettingsError
from trainer.tuners.yolo.settings import Method


def fresh_layers(model: nn.Module, base: nn.Module) -> set[str]:
    """Names of the layers of `model` whose shape the base's weights do not fit: a class is new, they begin anew."""
    known = {name: value.shape for name, value in base.state_dict().items()}
    return {
        name.rpartition(".")[0] for name, value in model.state_dict().items() if known.get(name) != value.shape
    }  # fmt: skip


def copy_class_rows(model: nn.Module, base: nn.Module, labels: dict[int, str]) -> None:
    """Give a classifier's last layer the base's rows of the labels that it knows; ultralytics does so for detectors."""
    new, old = model.model[-1].linear, base.model[-1].linear  # type: ignore[index, union-attr]
    names = {str(name): int(index) for index, name in getattr(base, "names", {}).items()}
    rows = [(to, names[label]) for to, label in labels.items() if label in names]
    if new.in_features != old.in_features or not rows:
        return
    with torch.no_grad():
        for to, of in rows:
            new.weight[to] = old.weight[of]
            new.bias[to] = old.bias[of]


def inject(model: nn.Module, lora: LoraSettings, fresh: set[str]) -> None:
    """Wrap the layers that LoRA adapts; a layer that begins anew needs no adapter, it trains whole."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds, and only LoRA needs it

    keys = lora.model_dump(exclude={"target_modules"})
    targets = [name for name in _targets(model, lora.target_modules) if name not in fresh]
    inject_adapter_in_model(LoraConfig(target_modules=targets, **keys), model)
    # Ultralytics warns once a frozen parameter; `freeze` freezes them after its set-up.
    model.requires_grad_(True)


def freeze(model: nn.Module, method: Method, lora: LoraSettings, fresh: set[str]) -> None:
    """Leave only what learns with a gradient; the box decoder's constants (DFL) never learn."""
    model.requires_grad_(method == "full")
    if method == "lora":
        _freeze_all_but_lora(model, lora)
    elif method == "head":
        head(model).requires_grad_(True)
    for name in fresh:
        model.get_submodule(name).requires_grad_(True)
    for name, parameter in model.named_parameters():
        if ".dfl." in name:
            parameter.requires_grad_(False)


def head(model: nn.Module) -> nn.Module:
    """The last module: Detect, Segment or Classify."""
    last: nn.Module = model.model[-1]  # type: ignore[index, assignment]
    return last


def still_norms(model: nn.Module, method: Method) -> list[nn.Module]:
    """The batch norms whose running statistics must not move."""
    if method != "head":
        return []
    moving = set(head(model).modules())
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d) and layer not in moving]


def merge(model: nn.Module) -> None:
    """Add every LoRA product to its base layer's weights and put the base layer back in its place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _adaptable(model: nn.Module) -> Iterator[str]:
    # The DFL "convolution" holds the constants 0..15 of the box decoder and must not learn.
    for name, module in model.named_modules():
        convolution = isinstance(module, nn.Conv2d) and module.groups == 1 and ".dfl." not in f".{name}"
        if convolution or isinstance(module, nn.Linear):  # a classifier's last layer is the only linear one
            yield name


def _targets(model: nn.Module, wanted: tuple[str, ...] | str) -> list[str]:
    """Full names of the layers to adapt; raises SettingsError when there is none or one that LoRA cannot adapt."""
    adaptable = list(_adaptable(model))
    if wanted == "all":
        return adaptable
    chosen = [
        name
        for name, _ in model.named_modules()
        if any(name == ending or name.endswith(f".{ending}") for ending in wanted)
    ]
    fix = f'name convolutions such as {adaptable[0]!r}, or use "all"'
    for ending in wanted:
        if not any(name == ending or name.endswith(f".{ending}") for name in chosen):
            raise SettingsError(f"lora.target_modules = {ending!r}: no layer of the model is called so; fix: {fix}")
    for name in chosen:
        if name not in adaptable:
            raise SettingsError(
                f"lora.target_modules = {wanted!r}: {name!r} is no ungrouped convolution that learns; fix: {fix}"
            )
    return chosen


def _freeze_all_but_lora(model: nn.Module, lora: LoraSettings) -> None:
    """Leave LoRA's matrices, batch norm and the biases that `lora.bias` names to learn."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(True)
        elif isinstance(module, BaseTunerLayer):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name.startswith("lora_"))
            base = module.get_base_layer()
            if lora.bias == "lora_only" and base.bias is not None:
                base.bias.requires_grad_(True)
        elif lora.bias == "all" and isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            module.bias.requires_grad_(True)
