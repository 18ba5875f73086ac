"""Opens the .pt files of ultralytics, and says in words what is wrong with a file that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.checkpoints import CheckpointError
from trainer.tuners.yolo.process import prepare_process


def open_weights(checkpoint: Path) -> Any:
    """The ultralytics model in a .pt file.

    Raises FileNotFoundError for a missing file, CheckpointError for one that is cut, damaged or something else.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"model {checkpoint} does not exist; give the path of a .pt file")
    prepare_process()
    from ultralytics.models.yolo import YOLO

    try:
        return YOLO(checkpoint)
    except Exception as error:  # whatever unpickling foreign bytes raises
        why = error.__cause__ or error  # ultralytics' own words advise to download another model
        said = (str(why).strip() or "nothing is in it").splitlines()[0].partition(". ")[0].rstrip(".")
        raise CheckpointError(
            f"{checkpoint}: not a checkpoint of ultralytics ({type(why).__name__}: {said}); give a whole .pt file as a "
            "training of ultralytics writes it"
        ) from error
