"""A trained YOLO as an ONNX file that ONNX Runtime runs: static, batch 1, without suppression added to its head."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from trainer.tuners.yolo import prepare_process

OPSET = 17  # what every ONNX Runtime since 1.12 takes


def export_onnx(model: Path, out: Path, imgsz: int) -> Path:
    """Write the .pt `model` to `out` for images of `imgsz` x `imgsz` pixels (float32, RGB, 0..1); returns `out`.

    A detector answers (1, 4 + classes, anchors), x y w h in pixels and class scores, or where its head is end-to-end
    (YOLO26) (1, boxes, 6), x1 y1 x2 y2 score class; a segmenter adds 32 numbers a box and their prototypes; a classifier
    answers (1, classes). The file's metadata names the labels (`names`), `task`, `end2end`, `imgsz` and `stride`.
    Raises FileNotFoundError for a missing model.
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
