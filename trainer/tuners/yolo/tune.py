"""Training YOLOs: from scratch, further, their head alone, and with PEFT LoRA on the convolutions.

Heavy libraries are imported inside the functions, so that settings can be checked without them. Nothing here uses the
network. A training belongs in a process of its own: ultralytics seeds and configures its whole process.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.files import sha256_of
from trainer.tuners.base import Report, Tuned, Work
from trainer.tuners.settings import LoraSettings, SettingsError
from trainer.tuners.yolo.data import Files, mix, read_dataset, write_examples
from trainer.tuners.yolo.process import Place, prepare_process
from trainer.tuners.yolo.settings import OnEpoch, Trained, TrainSettings, YoloSettings, overrides, threads
from trainer.tuners.yolo.weights import open_weights

log = logging.getLogger(__name__)

NETWORKS = (".yaml", ".yml")  # what ultralytics builds a fresh network from
_INTEGRATIONS = ("sync", "clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def tune(work: Work) -> Tuned:
    """Train `work.base` (a .pt, or a network such as "yolo11n.yaml") on `work.data`, Examples of trainer.tuners.yolo.data.

    Examples with `replay` are those of the base's data that may be mixed in (`settings.replay_ratio`). The result is
    the average of the weights (EMA) after the last epoch, with `patience` after the best one. What a killed training
    left in `work.scratch` is continued at its last finished epoch.
    Raises SettingsError for settings that the network cannot honour, ValueError for unusable data, FileNotFoundError for
    a missing base, MemoryError when not one image fits.
    """
    settings = work.settings
    if not isinstance(settings, YoloSettings):
        raise SettingsError(f"settings of {type(settings).__name__}: the yolo tuner takes YoloSettings")
    mixed = mix(work.data, settings.replay_ratio, work.seed)
    place = Place.here()
    folder = work.scratch / f"data-{place.host}"

    def written() -> Files:
        shutil.rmtree(folder, ignore_errors=True)
        return write_examples(folder, settings.task, settings.labels, mixed.examples, work.held_out)

    tuned = _tune(work.base, written, work.out, work.scratch, settings, work.seed, work.report, place)
    named = {settings.labels[index] if index >= 0 else "": count for index, count in mixed.by_class.items()}
    replay = {"asked": mixed.asked, "taken": mixed.taken, "images_by_class": named}
    return Tuned(tuned.path, tuned.trainable, tuned.parameters, tuned.history, {**tuned.facts, "replay": replay})


def train_full(
    dataset: Path, start: str | Path, out: Path, settings: TrainSettings, on_epoch: OnEpoch | None = None
) -> Trained:
    """Train every weight of `start` (a .pt, or a network such as "yolo11n.yaml") on `dataset` (folder or yaml); save
    to `out`.

    Raises ValueError for unusable settings or data, FileNotFoundError for a missing file, CheckpointError for a .pt that is
    none.
    """
    return _train(dataset, Path(start), out, settings, None, on_epoch)


def tune_lora(
    base: Path,
    dataset: Path,
    out: Path,
    lora: LoraSettings,
    settings: TrainSettings,
    on_epoch: OnEpoch | None = None,
) -> Trained:
    """Fine-tune the .pt `base` with LoRA on its convolutions, its batch-norm training too; save it merged to `out`.

    "all" of `target_modules` are the ungrouped convolutions; `bias` concerns the few that have one, the head's last.
    The result has the base's structure and no trace of LoRA. Raises as `train_full`, and SettingsError when
    `target_modules` match nothing or a layer that cannot be adapted.
    """
    return _train(dataset, base, out, settings, lora, on_epoch)


def weights_sha256(checkpoint: Path) -> str:
    """Identity of the weights in a .pt file: its tensors by name. The file's own hash changes with every save.

    Raises FileNotFoundError for a missing file, CheckpointError for one that is no checkpoint.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(open_weights(checkpoint).model.state_dict().items()):
        values = tensor.float().cpu().numpy()
        digest.update(f"{name}{values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


def _train(
    dataset: Path,
    start: Path,
    out: Path,
    settings: TrainSettings,
    lora: LoraSettings | None,
    on_epoch: OnEpoch | None,
) -> Trained:
    files = read_dataset(dataset)
    names = files.data["names"]
    method = "full" if lora is None else "lora"
    checked = settings.settings(tuple(names[i] for i in sorted(names)), method, lora or LoraSettings())  # type: ignore[arg-type]

    def report(row: Any) -> None:
        if on_epoch is not None:
            told = {name: value for name, value in row.items() if name not in ("epoch", "epochs")}
            on_epoch(int(row["epoch"]), int(row["epochs"]), told)

    scratch = out.resolve().with_name(f".{out.stem}-run")
    try:
        tuned = _tune(start, lambda: files, out, scratch, checked, settings.seed, report, Place())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    last = {name: value for name, value in tuned.history[-1].items() if name not in ("epoch", "epochs")}
    return Trained(out, tuned.trainable, tuned.parameters, last)


def _tune(
    base: Path,
    written: Callable[[], Files],
    out: Path,
    scratch: Path,
    settings: YoloSettings,
    seed: int,
    report: Report,
    place: Place,
) -> Tuned:
    if base.suffix == ".pt":
        open_weights(base)  # what is wrong with it is said before anything is written
    elif base.suffix not in NETWORKS:
        raise SettingsError(f"base {base}: give the path of a .pt file, or of a network ({', '.join(NETWORKS)})")
    for folder in (out.parent, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    prepare_process()
    from ultralytics.utils import LOGGER, SETTINGS

    LOGGER.setLevel(logging.ERROR)
    SETTINGS.update(dict.fromkeys(_INTEGRATIONS, False))
    from trainer.tuners.together import Together
    from trainer.tuners.yolo.loop import Run
    from trainer.tuners.yolo.state import States, fingerprint

    with _joined(place, settings) as (device, share):
        files = share(written)
        start = sha256_of(base) if base.is_file() else str(base)
        states = States(scratch, fingerprint(settings, seed, start, files.sha256))
        run = Run(settings, files.data, seed, threads(settings), place, states, report, Together(place.count))
        loop, asked = _with_memory(run, str(base), scratch, device)
        tuned = _finish(loop, out, files, asked)
        if place.rank == 0:
            states.clear()
        for name in ("run", f"data-{place.host}"):
            if place.local_rank == 0:
                shutil.rmtree(scratch / name, ignore_errors=True)
        return tuned


@contextmanager
def _joined(place: Place, settings: YoloSettings) -> Iterator[tuple[str, Callable[[Callable[[], Files]], Files]]]:
    """The device by ultralytics' name, and a way to make something once a host; processes wait for each other."""
    import torch
    from torch import distributed

    from trainer.tuners.joining import join

    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device != "cpu" and not torch.cuda.is_available():
        raise SettingsError(f'yolo.device = {device!r}: this host has no CUDA device; use "auto" or "cpu"')
    if device != "cpu":
        device = str(place.local_rank) if place.launched else device.partition(":")[2] or "0"
    if not place.launched:
        yield device, lambda make: make()
        return
    joins = not distributed.is_initialized()
    if joins:
        if device != "cpu":
            torch.cuda.set_device(int(device))
        join("gloo" if device == "cpu" else "nccl")

    def share(make: Callable[[], Files]) -> Files:
        everywhere: list[Any] = [None] * place.count
        distributed.all_gather_object(everywhere, make() if place.local_rank == 0 else None)
        mine: Files = everywhere[place.rank - place.local_rank]  # made by the first process of this host
        return mine

    try:
        yield device, share
        distributed.barrier()
    finally:
        if joins:
            distributed.destroy_process_group()


def _with_memory(run: Any, start: str, scratch: Path, device: str) -> tuple[Any, int]:
    """The loop, trained to its end with as large a batch as fits, and how many images a batch were asked for."""
    import torch

    from trainer.tuners.together import OutOfMemoryTogether
    from trainer.tuners.yolo.loop import LOOPS, shared_state

    batch = asked = run.settings.batch
    while True:
        state = shared_state(run)
        batch = min(batch, state["batch"]) if state else batch
        keys = overrides(run.settings, start, scratch, run.seed, batch) | {"device": device}
        loop = None
        try:
            loop = LOOPS[run.settings.task](run, keys, state)
            if state is not None and state["finished"]:
                loop._setup_train()  # it was killed between its last epoch and its result
            else:
                loop.train()
            return loop, asked
        except (RuntimeError, MemoryError) as error:
            together = isinstance(error, OutOfMemoryTogether)
            if not together and not is_out_of_memory(error):
                raise
            if not together and run.place.count > 1 and loop is not None and loop.in_step:
                log.warning("out of memory in process %d: %s", run.place.rank, error)
                together = run.together.agree(True)  # the others hear of it at the end of this step
            if batch < 2 * run.place.count or (run.place.count > 1 and not together):
                raise MemoryError(
                    f"out of memory with {batch} images of {run.settings.imgsz} pixels at once in {run.place.count} "
                    f"processes: {error}; use a smaller imgsz, batch or network"
                ) from None
        loop = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller = batch // 2 // run.place.count * run.place.count
        log.warning("out of memory with %d images at once: %d now, and a step still sees %d", batch, smaller, asked)
        batch = smaller


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, CUDA or Python found no memory."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def _finish(loop: Any, out: Path, files: Files, asked: int) -> Tuned:
    """Save the averaged weights to `out`, whole or not at all, merged and as the base was made."""
    import torch
    import ultralytics
    from ultralytics.utils.torch_utils import unwrap_model

    from trainer.tuners.yolo import methods

    run = loop.run
    settings: YoloSettings = run.settings
    trainable = sum(p.numel() for p in unwrap_model(loop.model).parameters() if p.requires_grad)
    model = loop.ema.ema
    best_epoch = None
    if settings.patience and files.data["held_out"] and run.place.rank == 0:
        best = run.states.load_best()
        if best is not None:
            model.load_state_dict(best)
            best_epoch = loop.stopper.best_epoch
    model = model.to("cpu", memory_format=torch.contiguous_format)
    if settings.method == "lora":
        methods.merge(model)
    model.criterion = None
    keys = vars(loop.args)
    left_out = ("project", "name", "save_dir", "model", "data", "device")  # this host's own
    model.args = {key: value for key, value in keys.items() if key not in left_out}
    model.requires_grad_(False)
    parameters = sum(p.numel() for p in model.parameters())
    if run.place.rank == 0:
        if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
            raise ValueError(
                f"training on {files.data['path']} diverged: weights are not finite; lower lr={settings.lr}"
            )
        checkpoint = {"epoch": -1, "model": model, "train_args": model.args, "version": ultralytics.__version__}
        beside = out.with_name(out.name + ".part")
        torch.save(checkpoint, beside)
        beside.replace(out)
    epochs = len(loop.history)
    facts = {
        "task": settings.task,
        "method": settings.method,
        "device": str(loop.device),
        "processes": run.place.count,
        "epochs": epochs,
        "steps": loop.ema.updates,  # of the optimizer
        "stopped_early": epochs < settings.epochs,
        "best_epoch": best_epoch,
        "resumed_at_epoch": loop.resumed_at or None,
        "batch": {"asked": asked, "at_once": loop.batch_size, "accumulated": loop._micro},
        "objects_left_out": files.left_out,
    }
    return Tuned(out, trainable, parameters, tuple(loop.history), facts)
