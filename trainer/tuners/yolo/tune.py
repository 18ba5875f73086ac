"""Training YOLO detectors: from scratch, further, and with PEFT LoRA on the convolutions.

Heavy libraries are imported inside the functions, so that settings can be checked without them. Nothing here uses the
network. A training belongs in a process of its own: ultralytics seeds and configures its whole process.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from trainer.tuners.settings import LoraSettings
from trainer.tuners.yolo.data import read_dataset
from trainer.tuners.yolo.process import prepare_process
from trainer.tuners.yolo.settings import OnEpoch, Trained, TrainSettings, overrides, threads


def train_full(
    dataset: Path, start: str | Path, out: Path, settings: TrainSettings, on_epoch: OnEpoch | None = None
) -> Trained:
    """Train every weight of `start` (a .pt, or a network such as "yolo11n.yaml") on `dataset` (folder or yaml); save
    to `out`.

    Raises ValueError for unusable settings or data, FileNotFoundError for a missing file.
    """
    return _run(dataset, start, out, settings, None, on_epoch)


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
    return _run(dataset, base, out, settings, lora, on_epoch)


def weights_sha256(checkpoint: Path) -> str:
    """Identity of the weights in a .pt file: its tensors by name. The file's own hash changes with every save.

    Raises FileNotFoundError for a missing file.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"model {checkpoint} does not exist; give the path of a .pt file")
    prepare_process()
    from ultralytics import YOLO

    digest = hashlib.sha256()
    for name, tensor in sorted(YOLO(str(checkpoint)).model.state_dict().items()):
        values = tensor.float().cpu().numpy()
        digest.update(f"{name}{values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


def _run(
    dataset: Path,
    start: str | Path,
    out: Path,
    settings: TrainSettings,
    lora: LoraSettings | None,
    on_epoch: OnEpoch | None,
) -> Trained:
    data = read_dataset(dataset)
    if str(start).endswith(".pt") and not Path(start).is_file():
        raise FileNotFoundError(f"model {start} does not exist; give the path of a .pt file")
    out.parent.mkdir(parents=True, exist_ok=True)
    prepare_process()
    from trainer.tuners.yolo.loop import run_training

    scratch = out.resolve().with_name(f".{out.stem}-run")
    try:
        return run_training(data, overrides(settings, str(start), scratch), threads(settings), lora, out, on_epoch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
