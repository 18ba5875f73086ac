"""A trainer with a tiny segmenter or classifier of shapes to improve: it has learned clear pictures, and now there is fog.

`shapes@1.0` is made of a base that learned the pictures of `tests.support.shapes`; `new/` holds pictures of the same kind
with a third of the contrast. The base is kept below build/ so that only the first run trains it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bench.demo.scenes import encode_png
from edged.wire.manifest import Thresholds
from tests.support import shapes as pictures
from tests.support.shapes import LABELS, SIZE, shapes, tiny_network
from trainer.datasets import LabelledBox, LabelledImage, write_folder
from trainer.holdout import near_duplicates
from trainer.package import package_vision
from trainer.releases import Registry
from trainer.tuners.base import Work, tuner
from trainer.tuners.yolo import prepare_process
from trainer.tuners.yolo.settings import YoloSettings

CACHE = Path("build/test-shapes").absolute()
CLASSES = LABELS[:3]
NETWORKS = {"segment": "yolo11n-seg", "classify": "yolo11n-cls"}
SEES_FOG = 12  # epochs of the teacher
LEARNED = {"segment": (120, 20, 0.01), "classify": (90, 8, 0.004)}  # pictures, epochs, learning rate
TEACHES = {"segment": 120, "classify": 120}  # pictures in fog, and half as many clear ones
FOG = 0.3  # of the contrast is left
PICTURES = {"segment": 36, "classify": 48}  # new ones, and as many to replay
PERSON = {"kind": "person", "who": "ann"}

CONFIG = """
data_dir = "data"
[models.shapes]
kind = "{kind}"
checkpoint = "{checkpoint}"
labels = {labels}
imgsz = {size}
holdout = "holdout"
holdout_clean = "clean"
calibration = "calibration"
replay = "replay"
device = "cpu"
threads = 1
calibration_share = 0.0
{more}
# One shape a picture, few pictures, answers of a millisecond: what is lost by chance is more than usual.
[models.shapes.gate]
boxes_min = 50
forget_max = 0.1
class_drop_max = 0.25
export_drop_max = 0.1
latency_ratio_max = 20.0
"""


def base(kind: str) -> Path:
    """The .pt of a tiny network that knows the three bright shapes."""
    told = hashlib.sha256(f"{kind} {LEARNED[kind]} {version('ultralytics')}".encode())
    told.update(Path(pictures.__file__).read_bytes())
    out = CACHE / f"{kind}-{told.hexdigest()[:12]}.pt"
    if out.is_file():
        return out
    CACHE.mkdir(parents=True, exist_ok=True)
    prepare_process()
    count, epochs, lr = LEARNED[kind]
    settings = YoloSettings(
        labels=CLASSES, task=kind, method="full", epochs=epochs, imgsz=SIZE, batch=16, lr=lr, device="cpu",  # type: ignore[arg-type]
        replay_ratio=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".base-", dir=CACHE) as name:
        scratch = Path(name)
        work = Work(
            tiny_network(scratch, NETWORKS[kind]), shapes(count, 1, kind), scratch / "m.pt", scratch, settings, 1
        )
        os.replace(tuner("yolo").tune(work).path, out)
    return out


def teacher(kind: str) -> Path:
    """The .pt of a network of the same size that knows the shapes in fog too: `base` trained on."""
    start = base(kind)
    told = hashlib.sha256(f"{start.name} {FOG} {SEES_FOG} {TEACHES[kind]}".encode())
    out = CACHE / f"{kind}-teacher-{told.hexdigest()[:12]}.pt"
    if out.is_file():
        return out
    foggy, clear = shapes(TEACHES[kind], 41, kind), shapes(TEACHES[kind] // 2, 42, kind)
    for example in foggy:
        pixels = np.asarray(example.image, np.uint8)
        example.image[...] = (128 + FOG * (pixels - 128.0)).astype(np.uint8)  # type: ignore[index]
    settings = YoloSettings(
        labels=CLASSES, task=kind, method="full", epochs=SEES_FOG, imgsz=SIZE, batch=16, lr=LEARNED[kind][2],  # type: ignore[arg-type]
        device="cpu", replay_ratio=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".teacher-", dir=CACHE) as name:
        scratch = Path(name)
        os.replace(tuner("yolo").tune(Work(start, [*foggy, *clear], scratch / "m.pt", scratch, settings, 2)).path, out)
    return out


def pictured(count: int, seed: int, *, fog: bool) -> list[LabelledImage]:
    """Pictures of a shape each with its outline, as a person labels them."""
    found = []
    for example in shapes(count, seed, "segment"):
        pixels = np.asarray(example.image, np.uint8)
        data = encode_png((128 + FOG * (pixels - 128.0)).astype(np.uint8) if fog else pixels)
        outline = np.asarray(example.outlines[0], float)  # type: ignore[index]
        corners = (*outline.min(axis=0).tolist(), *outline.max(axis=0).tolist())
        label = CLASSES[int(np.asarray(example.classes)[0])]
        box = LabelledBox(label, corners, (tuple(outline.reshape(-1).tolist()),))
        found.append(LabelledImage(hashlib.sha256(data).hexdigest(), data, (box,), PERSON))
    return found


def shaped_trainer(folder: Path, kind: str, **keys: object) -> Path:
    """A configuration with the registered `shapes@1.0` and its labelled folders; `keys`: further ones of the model."""
    calibration = [*pictured(54, 23, fog=True), *pictured(54, 24, fog=False)]
    sets = {"calibration": calibration, "holdout": pictured(66, 21, fog=True), "clean": pictured(66, 22, fog=False),
            "replay": pictured(PICTURES[kind], 1, fog=False), "new": pictured(PICTURES[kind], 25, fog=True)}  # fmt: skip
    before: list[LabelledImage] = []
    for name, items in sets.items():
        # One shape before the same ground: some are nearly the same by chance, and would be refused or left out.
        fresh = [item for item, again in zip(items, near_duplicates(items, before), strict=True) if not again]
        write_folder(folder / name, fresh)
        before += fresh
    checkpoint = base(kind)
    config = folder / "trainer.toml"
    more = "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
    config.write_text(CONFIG.format(kind=kind, checkpoint=checkpoint, labels=json.dumps(CLASSES), size=SIZE, more=more))
    known = [item.decode(CLASSES, kind) for item in calibration[54:]]  # type: ignore[arg-type]
    first = folder / "shapes-1.0"
    package_vision(
        checkpoint, first, "shapes@1.0", labels=CLASSES, imgsz=SIZE, calibration=known, thresholds=Thresholds(),
        precision="fp32",
    )  # fmt: skip
    Registry(folder / "data" / "releases").register(first)
    return config
