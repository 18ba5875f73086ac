"""The ultralytics training loop as this project runs it; imported after `process.prepare_process`.

What differs from ultralytics: the data set is handed over instead of looked up; nothing is plotted; an epoch's chance
depends on the seed and its number alone and its last batch ends with a step, so that an epoch can be repeated and a
training continued exactly; validation is the loss on the held-out images; the state is saved whole after each epoch.
"""

from __future__ import annotations

import random
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from ultralytics.data import ClassificationDataset
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.nn.tasks import guess_model_task
from ultralytics.utils.torch_utils import unwrap_model

from trainer.tuners.base import Report
from trainer.tuners.settings import SettingsError
from trainer.tuners.together import OutOfMemoryTogether, Together
from trainer.tuners.yolo import methods
from trainer.tuners.yolo.data import class_folder
from trainer.tuners.yolo.process import Place
from trainer.tuners.yolo.settings import YoloSettings
from trainer.tuners.yolo.state import States


@dataclass(frozen=True, slots=True)
class Run:
    """What a loop is given before ultralytics' constructor needs it."""

    settings: YoloSettings
    data: dict[str, Any]
    seed: int
    threads: int
    place: Place
    states: States
    report: Report
    together: Together


_Untyped: Any = object  # ultralytics has no types: what its trainers bring is known when they are mixed in


class _Loop(_Untyped):
    """What the loops of all tasks share; mixed in before ultralytics' trainer of the task."""

    model: Any
    accumulate: int

    def __init__(self, run: Run, overrides: dict[str, Any], state: dict[str, Any] | None) -> None:
        self.run, self._state = run, state
        self.history: list[dict[str, float]] = []
        self._fresh: set[str] = set()
        self._still: list[nn.Module] = []
        self._micro, self._waiting, self._seen = 1, 0, 0
        self.in_step = False  # between two words with the other processes: what fails here may be said there
        self.resumed_at = 0
        super().__init__(overrides=overrides)
        self.world_size = run.place.count if run.place.launched else 0
        self.args.val = self._validates
        self.add_callback("on_train_epoch_start", _Loop._begin_epoch)
        self.add_callback("on_train_batch_start", _Loop._begin_batch)
        self.add_callback("on_fit_epoch_end", _Loop._tell)

    @property
    def _validates(self) -> bool:
        return bool(self.run.data["held_out"])

    def get_dataset(self) -> dict[str, Any]:
        return self.run.data

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        settings = self.run.settings
        found = guess_model_task(cfg)
        if found != settings.task:
            raise SettingsError(f"yolo.task = {settings.task!r}: {self.args.model} is made to {found}; use one for it")
        model: nn.Module = super().get_model(cfg, weights, verbose)
        if weights is None:
            if settings.method != "full":
                raise SettingsError(
                    f"yolo.method = {settings.method!r}: {self.args.model} has no weights to keep; "
                    'begin from a .pt file, or use method = "full"'
                )
            return model
        self._fresh = methods.fresh_layers(model, weights)
        if settings.task == "classify":
            methods.copy_class_rows(model, weights, self.run.data["names"])
        if settings.method == "lora":
            methods.inject(model, settings.lora, self._fresh)
        return model

    def _setup_ddp(self) -> None:
        """Nothing: `tune` has joined the processes, on a CPU too."""

    def _setup_train(self) -> None:
        processes, self.world_size = self.world_size, 0  # ultralytics wraps only models on GPUs
        super()._setup_train()
        self.world_size = processes
        model = self.model
        # Ultralytics leaves a core idle and switches every parameter's gradient on; both are put right only here.
        torch.set_num_threads(self.run.threads)
        # Channels last: a step takes three quarters of the time on a CPU, with the same result.
        model.to(memory_format=torch.channels_last)
        methods.freeze(model, self.run.settings.method, self.run.settings.lora, self._fresh)
        self._still = methods.still_norms(model, self.run.settings.method)
        self._restore(self._state)
        if processes > 1:
            on_gpu = self.device.type == "cuda"
            self.model = DistributedDataParallel(
                model,
                device_ids=[self.device.index] if on_gpu else None,
                find_unused_parameters=True,
                broadcast_buffers=False,
            )
            # Nothing inside a step waits for another process: `optimizer_step` adds up.
            self.model.require_backward_grad_sync = False

    def _build_train_pipeline(self) -> None:
        super()._build_train_pipeline()
        # Ultralytics carries gradients over the end of an epoch; here `optimizer_step` counts the batches of a step.
        self._micro, self.accumulate = self.accumulate, 1

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        if mode == "val":
            if not self._validates or self.run.place.rank != 0:
                return self.train_loader  # asked for, but never read
            rank = -1  # one process sees all of them
        elif self.run.place.count > 1:
            batch_size = max(1, batch_size // self.run.place.count)
        with redirect_stdout(StringIO()):  # the one progress bar that its settings do not silence
            return super().get_dataloader(dataset_path, batch_size, rank, mode)

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = super().preprocess_batch(batch)
        batch["img"] = batch["img"].contiguous(memory_format=torch.channels_last)
        return batch

    def _model_train(self) -> None:
        super()._model_train()
        for layer in self._still:
            layer.eval()

    def _begin_epoch(self) -> None:
        self._waiting = self._seen = 0
        self._oom_retries = 3  # none left: `tune` answers, from the last state and in every epoch
        seed_epoch(self.train_loader, self.run.seed, self.epoch, self.run.place.rank)

    def _begin_batch(self) -> None:
        self.in_step = True

    def optimizer_step(self) -> None:
        """Step when enough batches wait and at the epoch's end; a classifier's loss is a mean, not a sum of images."""
        self._waiting, self._seen = self._waiting + 1, self._seen + 1
        self.run.together.room(self.model.parameters())
        self.in_step = False
        if self.run.together.agree(False):
            raise OutOfMemoryTogether("out of memory in one of the processes")
        if self._waiting < self._micro and self._seen < len(self.train_loader):
            return
        if self.run.settings.task == "classify" and self._waiting > 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= self._waiting
        self._waiting = 0
        self.run.together.average(self.model.parameters())
        super().optimizer_step()

    def validate(self) -> tuple[dict[str, float], float | None]:
        """The averaged weights' loss an image on the held-out images; what is lower is fitter."""
        if not self._validates or self.run.place.rank != 0:
            return {}, None
        seed_epoch(self.test_loader, 0, 0, 0)
        average, total, images = self.ema.ema, 0.0, 0
        with torch.no_grad():
            for given in self.test_loader:
                batch = self.preprocess_batch(given)
                count = len(batch["img"])
                _, items = average.loss(batch, average(batch["img"]))
                total += sum(float(value) for value in items.values()) * count
                images += count
        loss = total / images
        return {"held_out_loss": loss}, -loss

    def _handle_nan_recovery(self, epoch: int) -> bool:
        if self.loss is not None and not torch.isfinite(self.loss).all():
            raise ValueError(
                f"training on {self.run.data['path']} diverged in epoch {epoch + 1}: the loss is not finite; "
                f"lower lr={self.run.settings.lr}"
            )
        return False

    def save_model(self) -> bool:
        """The state after an epoch, whole; then `_tell` reports what can no longer be lost."""
        row = {"epoch": float(self.epoch + 1), "epochs": float(self.epochs)}
        row |= {name: float(value) for name, value in self.tloss.items()}
        row["loss"] = sum(float(value) for value in self.tloss.values())
        row["lr"] = float(self.optimizer.param_groups[0]["lr"])
        row |= {name: float(value) for name, value in self.metrics.items() if name == "held_out_loss"}
        self.history.append(row)
        if self.run.settings.patience and self.stopper.best_epoch == self.epoch + 1:
            self.run.states.save_best(self.ema.ema.state_dict())
        self.run.states.save({
            "epoch": self.epoch,
            "finished": bool(self.stop),
            "batch": self.batch_size,
            "model": unwrap_model(self.model).state_dict(),
            "ema": self.ema.ema.state_dict(),
            "updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "stopper": {"best_fitness": float(self.stopper.best_fitness), "best_epoch": self.stopper.best_epoch},
            "history": self.history,
        })  # fmt: skip
        return True

    def _tell(self) -> None:
        if self.run.place.rank == 0:
            self.run.report(dict(self.history[-1]))

    def final_eval(self) -> None:
        """Nothing: it would fuse layers that LoRA has replaced."""

    def _restore(self, state: dict[str, Any] | None) -> None:
        self._state = None
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.ema.ema.load_state_dict(state["ema"])
        self.ema.updates = state["updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.stopper.__dict__.update(state["stopper"])
        self.history = list(state["history"])
        self.start_epoch = self.resumed_at = state["epoch"] + 1
        self.scheduler.last_epoch = self.start_epoch - 1
        criterion = self.model.init_criterion()
        if hasattr(criterion, "update"):  # an end-to-end head's, whose parts change their weight with the epochs
            criterion.updates = self.start_epoch - 1
            criterion.update()
            self.model.criterion = criterion


def shared_state(run: Run) -> dict[str, Any] | None:
    """The first process's state, in every process; None for a training that begins."""
    found = [run.states.load() if run.place.rank == 0 else None]
    if run.place.count > 1:
        torch.distributed.broadcast_object_list(found, 0)
    return found[0]


def seed_epoch(loader: Any, seed: int, epoch: int, rank: int) -> None:
    """Make what an epoch draws depend on these numbers alone: order, augmentation, dropout."""
    drawn = int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)
    loader.generator.manual_seed(drawn)
    if hasattr(loader.sampler, "set_epoch"):  # several processes share one order
        loader.sampler.seed = seed
        loader.sampler.set_epoch(epoch)
    loader.reset()


class _Detect(_Loop, DetectionTrainer):
    """Boxes."""


class _Segment(_Loop, SegmentationTrainer):
    """Boxes and outlines."""


class _Classify(_Loop, ClassificationTrainer):
    """Whole images."""

    def build_dataset(self, img_path: str, mode: str = "train", batch: Any = None) -> Any:
        folders = {index: class_folder(index) for index in self.run.data["names"]}
        return ClassificationDataset(img_path, self.args, augment=mode == "train", prefix=mode, names=folders)


LOOPS: dict[str, type[Any]] = {"detect": _Detect, "segment": _Segment, "classify": _Classify}
