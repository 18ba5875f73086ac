"""A trained YOLO as an ONNX file that ONNX Runtime runs: static, batch 1, without NMS inside."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from trainer.tuners.yolo import prepare_process

OPSET = 17  # what every ONNX Runtime since 1.12 takes


def export_onnx(model: Path, out: Path, imgsz: int) -> Path:
    """Write the .pt `model` to `out` for images of `imgsz` x `imgsz` pixels (float32, RGB, 0..1); returns `out`.

    The output is (1, 4 + classes, anchors): x y w h in pixels and class scores. The file's metadata names the labels
    (`names`), `task`, `imgsz` and `stride`. Raises FileNotFoundError for a missing model.
    """
    if not model.is_file():
        raise FileNotFoundError(f"model {model} does not exist; give the path of a trained .pt file")
    out.parent.mkdir(parents=True, exist_ok=True)
    prepare_process()
    import logging

    from ultralytics.models.yolo import YOLO
    from ultralytics.utils import LOGGER

    LOGGER.setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as scratch:
        # Ultralytics writes beside the weights, under their name.
        copy = Path(scratch) / "model.pt"
        shutil.copyfile(model, copy)
        exported = YOLO(copy).export(
            format="onnx", imgsz=imgsz, batch=1, opset=OPSET, dynamic=False, simplify=True, nms=False, device="cpu"
        )
        Path(exported).replace(out)
    return out
