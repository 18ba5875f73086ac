"""The loop of transformers' Trainer for an adapter: it continues after a kill, answers a full memory, and says how it goes.

Several processes (`accelerate launch`, `torchrun`) run the same code: each trains on its share of every batch, the first
one writes.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.trainer_callback import TrainerState

from trainer.core.batching import Batching, shared
from trainer.core.curves import by_epoch, named, warm_then_decay
from trainer.tuners.base import Report, Tuned, Work
from trainer.tuners.joining import join
from trainer.tuners.language import adapter_config, bf16
from trainer.tuners.lora.settings import LanguageSettings
from trainer.tuners.scratch import Scratch, fingerprint, replace_folder
from trainer.tuners.settings import SettingsError
from trainer.tuners.together import OutOfMemoryTogether, Together, patience

log = logging.getLogger(__name__)

CHECKPOINTS_MAX = 3  # the best, the last whole one and the one that is being written
_LOGS_PER_EPOCH = 20
_STATE = "trainer_state.json"  # transformers' own name


@dataclass(frozen=True, slots=True)
class Prepared:
    """A trainer that is ready to train the adapter, and what a person should know of its model and data."""

    trainer: Any
    facts: Mapping[str, Any]


Prepare = Callable[[Batching, Scratch, Together], Prepared]


def device() -> PartialState:
    """The processes of this training and what they run on: GPUs where there are some, else the CPU."""
    gpu = torch.cuda.is_available()
    if not gpu:
        # Else accelerate numbers the CPUs of several processes, and torch.load knows no "cpu:1".
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    # The settings say what is computed how: not `accelerate launch --mixed_precision`, nor a training before this one, whose
    # TrainingArguments leave theirs here.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        join("nccl" if gpu else "gloo")
    return PartialState(cpu=not gpu, timeout=patience())


def run(work: Work, settings: LanguageSettings, prepare: Prepare) -> Tuned:
    """Train what `prepare` makes until it is done, from the last checkpoint on, and save the adapter as `work.out`.

    Out of memory in any process: half as many examples at once in all of them, and so many more passes for one step; the
    steps stay the same. Raises SettingsError when one example is too much, ValueError when nothing is left to train on.
    """
    if not (work.base / "config.json").is_file():
        raise SettingsError(f"base = {str(work.base)!r}: no Hugging Face checkpoint is there (config.json)")
    if settings.adapter is not None:
        adapter_config(settings.adapter)
    state = device()
    try:
        batching = shared(settings.batch, state.num_processes)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    told = {"settings": settings.model_dump(mode="json"), "seed": work.seed, "processes": state.num_processes}
    told["versions"] = [version(package) for package in ("torch", "transformers", "peft", "accelerate")]
    bases = [work.base, *([settings.adapter] if settings.adapter else [])]
    names = [fingerprint(told, [*work.data, None, *work.held_out], bases) if state.is_main_process else ""]
    broadcast_object_list(names)
    with state.main_process_first():
        scratch = Scratch(work.scratch, names[0], writes=state.is_main_process)
    together = Together(state.num_processes)
    batching = shared(batching.batch, batching.processes, scratch.at_once_max)
    prepared: Prepared | None = None
    with torch.random.fork_rng():
        torch.manual_seed(work.seed)  # the fresh adapter's weights
        while True:
            try:
                prepared = prepare(batching, scratch, together)
                resumed = _train(prepared.trainer, scratch)
                break
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                agreed = isinstance(error, OutOfMemoryTogether)
            # Outside of `except`: the traceback would keep the tensors alive, and so would the trainer the model.
            prepared = None
            batching = _answer(batching, scratch, state, agreed=agreed)
            torch.manual_seed(work.seed)
    trainer = prepared.trainer
    model = trainer.accelerator.unwrap_model(trainer.model)
    if state.is_main_process:
        _save(model, work.out)
    state.wait_for_everyone()
    scratch.remove()
    parameters = list(model.parameters())
    return Tuned(
        path=work.out,
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        parameters=sum(parameter.numel() for parameter in parameters),
        history=tuple(by_epoch(trainer.state.log_history)),
        facts={**prepared.facts, **_facts(trainer, batching, resumed)},
    )


def arguments(work: Work, settings: LanguageSettings, batching: Batching, scratch: Scratch) -> dict[str, Any]:
    """What every trainer here is told (transformers.TrainingArguments)."""
    gpu = torch.cuda.is_available()
    chosen = bool(work.held_out)
    return {
        "output_dir": str(scratch.checkpoints),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": batching.at_once,
        "per_device_eval_batch_size": batching.at_once,
        "gradient_accumulation_steps": batching.passes,
        "gradient_checkpointing": False,
        # What trl switches on again where four bits have it: the other kind gives frozen inputs no gradient.
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": settings.learning_rate,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": work.seed,
        "eval_strategy": "epoch" if chosen else "no",
        "save_strategy": "epoch" if chosen else "no",  # `Watch` asks for more of them
        "save_total_limit": CHECKPOINTS_MAX,
        "load_best_model_at_end": chosen,
        "metric_for_best_model": "eval_loss" if chosen else None,
        "greater_is_better": False if chosen else None,
        "restore_callback_states_from_checkpoint": True,
        "logging_strategy": "no",  # `Watch` decides
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "dataloader_pin_memory": gpu,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,  # they do not change, and nothing inside a step waits for another process
        "use_cpu": not gpu,
        "bf16": bf16(settings),
    }


def callbacks(work: Work, settings: LanguageSettings) -> list[TrainerCallback]:
    """Progress, checkpoints in between, and the early end."""
    watch: list[TrainerCallback] = [Watch(work.report, settings.checkpoint_steps)]
    return [*watch, *([EarlyStoppingCallback(settings.patience)] if work.held_out else [])]


def one_device(arguments: Any) -> Any:
    """Keep transformers from splitting batches over the GPUs of one process (DataParallel): that changes what a batch is.
    Several GPUs have a process each."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


class Watch(TrainerCallback):
    """Reports each step's and epoch's numbers, and has checkpoints written at least every `checkpoint_steps`."""

    def __init__(self, report: Report, checkpoint_steps: int) -> None:
        self._report, self._checkpoint_steps = report, checkpoint_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log and save by the number of the step alone, so that a continued training does it where the other did."""
        epoch_steps = max(1, state.max_steps // max(1, int(args.num_train_epochs)))
        control.should_save |= state.global_step % self._checkpoint_steps == 0
        control.should_log |= state.global_step % max(1, epoch_steps // _LOGS_PER_EPOCH) == 0 or control.should_save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An epoch's numbers are its own."""
        control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Pass on what was logged."""
        told = named(logs or {})
        if state.is_world_process_zero and told:
            totals = {"epochs": float(args.num_train_epochs), "step": state.global_step, "steps": state.max_steps}
            self._report({"epoch": float(state.epoch or 0.0), **totals, **told})


class Checkpoints:
    """For a Trainer: checkpoints hold the adapter alone, and count when every process has written its part. The learning
    rate rises at once: transformers' own schedules waste the first step, which may be the only one."""

    scratch: Scratch
    together: Together
    lr_scheduler: Any
    accelerator: Any

    def __init__(self, scratch: Scratch, together: Together, **given: Any) -> None:
        self.scratch, self.together = scratch, together  # first: some trainers compute while they are made
        super().__init__(**given)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """As before; of several processes each takes its share alone, then they agree, then they add up."""
        if self.together.processes == 1:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]

        def alone() -> Any:
            self.together.room(model.parameters())
            with self.accelerator.no_sync(model):
                return super(Checkpoints, self).training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]

        loss = self.agreed(alone)
        if self.accelerator.sync_gradients:  # the last pass of a step
            self.together.average(model.parameters())
        return loss

    def prediction_step(self, *given: Any, **named: Any) -> Any:
        """As before, or all processes find that the memory of one is too small."""
        return self.agreed(lambda: super(Checkpoints, self).prediction_step(*given, **named))  # type: ignore[misc]

    def agreed(self, act: Callable[[], Any]) -> Any:
        """What `act` returns, when no process runs out of memory in it; raises OutOfMemoryTogether in all of them else."""
        if self.together.processes == 1:
            return act()
        found, short = None, False
        try:
            with _alone(self.accelerator):
                found = act()
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            log.warning("out of memory in process %d: %s", self.args.process_index, error)  # type: ignore[attr-defined]
            short = True
        if self.together.agree(short):
            raise OutOfMemoryTogether("out of memory in one of the processes")
        return found

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Up over the first 5 % of the steps, then down in a line to a tenth."""
        if self.lr_scheduler is None:
            factor = partial(warm_then_decay, total=num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)  # type: ignore[attr-defined]
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir  # type: ignore[attr-defined]
        write_adapter(self.accelerator.unwrap_model(self.model), Path(folder))  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():  # type: ignore[attr-defined]
            step = self.state.global_step  # type: ignore[attr-defined]
            self.scratch.complete(self.scratch.checkpoints / f"checkpoint-{step}")


@contextmanager
def _alone(accelerator: Any) -> Iterator[None]:
    """What gathers numbers for the log inside a step would wait for a process that has run out of memory: in the block each
    process has its own share's numbers."""
    names = ("gather", "gather_for_metrics")
    for name in names:
        setattr(accelerator, name, lambda own, *_, **__: own)
    try:
        yield
    finally:
        for name in names:
            delattr(accelerator, name)


def write_adapter(model: Any, folder: Path) -> None:
    """Save the adapter "default" in PEFT's format. The base's embeddings belong to the base, adapted or not."""
    model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])


def _train(trainer: Any, scratch: Scratch) -> int:
    """Train to the end; the step that it was continued at."""
    trainer.remove_callback(PrinterCallback)  # standard output belongs to whoever called
    last = scratch.last()
    if last is None:
        trainer.train()
        return 0
    state = TrainerState.load_from_json(str(last / _STATE))
    ended = state.stateful_callbacks.get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)
    log.warning("continuing at step %d of %d", state.global_step, state.max_steps)
    if not ended:
        trainer.train(resume_from_checkpoint=str(last))
        return int(state.global_step)
    # It had ended and was killed before it saved the adapter. Transformers would train on: an early end is forgotten.
    best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else last
    set_peft_model_state_dict(trainer.model, load_file(best / "adapter_model.safetensors"))
    trainer.state = state
    return int(state.global_step)


def _out_of_memory(error: BaseException) -> bool:
    known = (torch.OutOfMemoryError, MemoryError, OutOfMemoryTogether)
    return isinstance(error, known) or should_reduce_batch_size(error)


def _answer(batching: Batching, scratch: Scratch, state: PartialState, *, agreed: bool) -> Batching:
    """The next smaller way to take the same step, the same in every process; raises SettingsError when there is none.

    `agreed`: every process is here. Else it is one alone, and the others wait for it somewhere.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    smaller = batching.smaller()
    if smaller is None:
        raise SettingsError(
            "out of memory with one example at once: use a smaller `context`, a smaller lora.r, load_4bit = true on a GPU, "
            "or a host with more memory"
        )
    log.warning(
        "out of memory with %d examples at once: now %d at once, %d times a step (%d examples a step, as before)",
        batching.at_once, smaller.at_once, smaller.passes, smaller.batch,
    )  # fmt: skip
    if batching.processes == 1 or not agreed or state.is_main_process:
        scratch.remember(smaller.at_once)
    if batching.processes > 1 and not agreed:
        raise SettingsError(
            f"out of memory with {batching.at_once} examples at once in one of {batching.processes} processes, outside of "
            f"a step: start it again, and it continues with {smaller.at_once}"
        )
    state.wait_for_everyone()
    return smaller


def _facts(trainer: Any, batching: Batching, resumed: int) -> dict[str, Any]:
    state = trainer.state
    facts: dict[str, Any] = {
        "steps": state.global_step,
        "processes": batching.processes,
        "batch": {"step": batching.batch, "at_once": batching.at_once, "passes": batching.passes},
    }
    if batching.passes > 1:
        whole = batching.at_once * batching.passes
        facts["smaller_batch"] = f"the memory held {batching.at_once} examples at once, not {whole}"
    if resumed:
        facts["continued_at_step"] = resumed
    if state.best_global_step:
        facts["best_step"] = state.best_global_step
        facts["stopped_early"] = state.global_step < state.max_steps
    return facts


def _save(model: Any, out: Path) -> None:
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(model, beside)
    replace_folder(beside, out)
