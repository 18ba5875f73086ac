"""YOLOs overfit in seconds on the photos that ship with ultralytics and scikit-learn, because no weights can be fetched.

What they find means nothing; that they find it surely, and everywhere the same, is what comparisons of two runtimes and
measurements of speed need. Each is kept under the hash of its recipe.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from bench.kept import kept
from edged.engines.letterbox import Letterbox
from trainer.export.onnx import export_onnx
from trainer.tuners.yolo import prepare_process

Image = NDArray[np.uint8]  # (height, width, 3), BGR

CACHE = Path(__file__).parents[1] / "build" / "models"
LABELS = ("brick", "cloth", "glass", "leaf", "stone")
STEPS = 25
LEARNING_RATE = 5e-3
OBJECT_LOGIT = -2.0  # every score begins at 0.12: from the usual 0.01 it takes longer to rise than to learn
# So few steps leave the scores low and close together. In the end they are spread, so that this many anchors over all
# photos score above ANSWERED, and few between that and nothing.
ANSWERS = 80
ANSWERED = 0.25
SPREAD = 12.0
ONE_TO_ONE = 0.7  # the share of an end-to-end head in its loss from the first step: it is what is exported
TRAIN_SIZE = 128  # pixels
ROWS, COLUMNS = 2, 3  # regions of a photo that count as objects


@lru_cache(maxsize=1)
def photos() -> tuple[Image, ...]:
    """Four photos: 1080 x 810, 720 x 1280, and two of 427 x 640 pixels."""
    prepare_process()
    from sklearn.datasets import load_sample_images
    from ultralytics.utils import ASSETS

    shipped = [cv2.imread(str(ASSETS / name)) for name in ("bus.jpg", "zidane.jpg")]
    assert all(photo is not None for photo in shipped), f"{ASSETS} lacks the photos that ultralytics ships"
    return (*shipped, *(np.ascontiguousarray(photo[..., ::-1]) for photo in load_sample_images().images))  # type: ignore[arg-type]


def overfit(network: str, size: int) -> Path:
    """The ONNX file, for `size` x `size` pixels, of a network such as "yolo11n.yaml" or "yolo26n-seg.yaml"; made once."""
    told = hashlib.sha256(Path(__file__).read_bytes() + f"{network} {size} {version('ultralytics')}".encode())
    told.update((Path(__file__).parents[1] / "trainer" / "export" / "onnx.py").read_bytes())

    def make(out: Path) -> None:
        trained = out.with_suffix(".pt")
        _train(network, size, trained)
        export_onnx(trained, out, size)

    return kept(CACHE / f"{Path(network).stem}-{size}-{told.hexdigest()[:12]}.onnx", make)


def _train(network: str, size: int, out: Path) -> None:
    prepare_process()
    import torch
    from ultralytics import YOLO
    from ultralytics.utils import DEFAULT_CFG

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    whole = YOLO(network)
    settings: dict[str, Any] = {"nc": len(LABELS), "verbose": False}
    model = type(whole.model)(network, **settings)
    model.args = DEFAULT_CFG  # the weights of the parts of the loss
    model.names, model.task = dict(enumerate(LABELS)), whole.task
    batch = _classes_batch() if whole.task == "classify" else _regions_batch()
    if whole.task != "classify":
        for branch in _score_layers(model, "cv3") + _score_layers(model, "one2one_cv3"):
            torch.nn.init.constant_(branch.bias, OBJECT_LOGIT)
        model.criterion = model.init_criterion()
        if hasattr(model.criterion, "o2o"):
            model.criterion.o2m, model.criterion.o2o = 1 - ONE_TO_ONE, ONE_TO_ONE
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.15)
    model.train()
    for _ in range(STEPS):
        loss, _ = model(batch)
        optimizer.zero_grad()
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    # So few steps leave the running statistics behind: they are taken anew, all from the batch that was learned.
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    with torch.no_grad():
        model(batch)
    model.eval()
    if whole.task != "classify":
        _spread_scores(model, _images([_letterboxed(photo, size) for photo in photos()]))
    whole.model, whole.ckpt = model, {}
    whole.save(out)


def _score_layers(model: Any, name: str) -> list[Any]:
    """The last layers of a detection head's scores, one a scale; none where the network has no such head."""
    return [branch[-1] for branch in getattr(model.model[-1], name, None) or ()]


def _spread_scores(model: Any, images: Any) -> None:
    """Make the logits of a head's scores SPREAD times as far apart, with ANSWERS of them above ANSWERED on `images`."""
    import torch

    with torch.no_grad():
        raw = model(images)[1]
    for name, answer in (("cv3", raw.get("one2many", raw)), ("one2one_cv3", raw.get("one2one"))):
        if answer is not None:
            edge = float(answer["scores"].amax(dim=1).flatten().topk(ANSWERS).values[-1])
            for layer in _score_layers(model, name):
                layer.weight.data *= SPREAD
                layer.bias.data = (layer.bias.data - edge) * SPREAD + math.log(ANSWERED / (1 - ANSWERED))


def _regions_batch() -> dict[str, Any]:
    """The photos as ultralytics' detection and segmentation losses take them; of every region an ellipse is the mask."""
    side = TRAIN_SIZE // 4  # masks have a quarter of the resolution
    images, boxes, classes, belongs = [], [], [], []
    masks = np.zeros((len(photos()), side, side), np.float32)  # number of the region within its photo, from 1
    kinds = np.zeros(masks.shape, np.int64)
    for number, photo in enumerate(photos()):
        box = Letterbox.fit((photo.shape[0], photo.shape[1]), (TRAIN_SIZE, TRAIN_SIZE))
        images.append(_letterboxed(photo, TRAIN_SIZE))
        for region in range(ROWS * COLUMNS):
            row, column = divmod(region, COLUMNS)
            x = (box.left + box.width * (column + 0.5) / COLUMNS) / TRAIN_SIZE
            y = (box.top + box.height * (row + 0.5) / ROWS) / TRAIN_SIZE
            width, height = 0.15 + 0.04 * ((number + column) % 3), 0.15 + 0.05 * ((number + row) % 2)
            boxes.append((x, y, width, height))
            classes.append((number + column + 2 * row) % len(LABELS))
            belongs.append(number)
            ellipse = np.zeros((side, side), np.uint8)
            centre, half = (round(x * side), round(y * side)), (round(width * side / 2), round(height * side / 2))
            cv2.ellipse(ellipse, centre, half, 0, 0, 360, 1, -1)
            masks[number][ellipse > 0] = region + 1
            kinds[number][ellipse > 0] = classes[-1]
    return _tensors(images, classes, boxes, belongs, masks, kinds)


def _classes_batch() -> dict[str, Any]:
    """Pieces of the photos; the class of a piece is the photo that it comes from."""
    images, classes = [], []
    for number, photo in enumerate(photos()):
        for piece in pieces(photo):
            images.append(cv2.resize(piece, (TRAIN_SIZE, TRAIN_SIZE), interpolation=cv2.INTER_AREA))
            classes.append(number)
    return _tensors(images, classes)


def pieces(photo: Image) -> list[Image]:
    """A photo cut into `ROWS` x `COLUMNS` equal pieces."""
    height, width = photo.shape[0] // ROWS, photo.shape[1] // COLUMNS
    return [
        np.ascontiguousarray(photo[row * height : (row + 1) * height, column * width : (column + 1) * width])
        for row in range(ROWS)
        for column in range(COLUMNS)
    ]


def _letterboxed(photo: Image, size: int) -> Image:
    box = Letterbox.fit((photo.shape[0], photo.shape[1]), (size, size))
    canvas = np.full((size, size, 3), 114, np.uint8)
    canvas[box.rows, box.columns] = cv2.resize(photo, (box.width, box.height))
    return canvas


def _images(pictures: Sequence[Any]) -> Any:
    """BGR pictures of one size as a batch, RGB in 0..1."""
    import torch

    return torch.from_numpy(np.stack(pictures)[..., ::-1].transpose(0, 3, 1, 2).copy()) / 255


def _tensors(
    images: Sequence[Any],
    classes: Sequence[int],
    boxes: Sequence[tuple[float, float, float, float]] = (),
    belongs: Sequence[int] = (),
    masks: NDArray[np.float32] | None = None,
    kinds: NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    import torch

    batch: dict[str, Any] = {"img": _images(images)}
    if masks is None:
        return batch | {"cls": torch.tensor(classes)}
    return batch | {
        "cls": torch.tensor(classes, dtype=torch.float32)[:, None],
        "bboxes": torch.tensor(boxes, dtype=torch.float32),
        "batch_idx": torch.tensor(belongs, dtype=torch.float32),
        "masks": torch.from_numpy(masks),
        "sem_masks": torch.from_numpy(kinds),
    }
