"""A plant that sorts squares and triangles by day, and a data set that somebody imports with two classes mixed up.

`eye@1.0` knows the two shapes by daylight. At night, which is new, diamonds come too: of those it is unsure. The data set
that replays, calibrates and judges is one folder tree; imported with SWAPPED names both training and holdouts are wrong in
the same way, and nothing on the trainer's host can know it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np

from bench.demo.scenes import encode_png
from edged.engines.base import Detector, EngineOptions, open_engine
from edged.wire.manifest import Thresholds
from tests.support import shapes as pictures
from tests.support.models import calibration, write_manifest
from tests.support.shaped import CACHE
from tests.support.shapes import LABELS, SIZE, shapes, tiny_network
from tests.support.tinted import learn_tints, write_classifier
from trainer.datasets import LabelledBox, LabelledImage
from trainer.evaluate import Labelled
from trainer.golden import write_detect_golden
from trainer.holdout import near_duplicates
from trainer.package import package_vision
from trainer.releases import build_manifest, read_manifest

CLASSES = LABELS[:3]
NIGHT = 0.45  # of the light is left
SETS = {"replay": (150, 31), "holdout": (150, 32), "clean": (120, 33), "calibration": (450, 34)}  # pictures, seed
SWAPPED = ("square=triangle", "triangle=square")
COUNT, EPOCHS, LR = 120, 10, 0.004  # of the base


def seen(count: int, seed: int, *, night: bool = True) -> list[tuple[bytes, int]]:
    """PNG files as the cameras take them, with the class of each: squares and triangles by day, with `night` as many
    diamonds in the dark."""
    found = []
    for example in shapes(count, seed, "classify", (0, 1, 2) if night else (0, 1)):
        label = int(np.asarray(example.classes)[0])
        pixels = np.asarray(example.image, np.uint8)
        found.append((encode_png((pixels * NIGHT).astype(np.uint8) if label == 2 else pixels), label))
    return found


def as_labelled(data: bytes, label: int) -> Labelled:
    """A picture as the trainer's evaluation takes it: one box around the whole."""
    image = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), np.uint8)
    return Labelled(image, np.array([[0, 0, SIZE, SIZE]], np.float32), np.array([label]))


def data_set(folder: Path) -> None:
    """The data set as somebody labelled it, rightly: for each of SETS a folder of class folders."""
    before: list[LabelledImage] = []
    for name, (count, seed) in SETS.items():
        items = seen(count, seed, night=name in ("replay", "holdout", "calibration"))
        looked = [
            LabelledImage(hashlib.sha256(data).hexdigest(), data, (LabelledBox(CLASSES[label], (0, 0, 1, 1)),))
            for data, label in items
        ]
        # One shape before the same ground: some are nearly the same by chance, and may not judge.
        again = near_duplicates(looked, before)
        for number, ((data, label), repeated) in enumerate(zip(items, again, strict=True)):
            if not repeated:
                path = folder / name / CLASSES[label] / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        before += looked


def base() -> Path:
    """The .pt of a tiny network that knows squares and triangles by day; kept below build/."""
    from trainer.tuners.base import Work, tuner
    from trainer.tuners.yolo import prepare_process
    from trainer.tuners.yolo.settings import YoloSettings

    told = hashlib.sha256(f"day {COUNT} {EPOCHS} {LR} {version('ultralytics')}".encode())
    told.update(Path(pictures.__file__).read_bytes())
    out = CACHE / f"day-{told.hexdigest()[:12]}.pt"
    if out.is_file():
        return out
    CACHE.mkdir(parents=True, exist_ok=True)
    prepare_process()
    settings = YoloSettings(
        labels=CLASSES, task="classify", method="full", epochs=EPOCHS, imgsz=SIZE, batch=16, lr=LR, device="cpu",
        replay_ratio=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".base-", dir=CACHE) as name:
        scratch = Path(name)
        data = shapes(COUNT, 1, "classify", (0, 1))
        work = Work(tiny_network(scratch, "yolo11n-cls"), data, scratch / "m.pt", scratch, settings, 1)
        os.replace(tuner("yolo").tune(work).path, out)
    return out


def first_release(folder: Path) -> Path:
    """`eye@1.0`, calibrated on pictures of the day."""
    known = [as_labelled(*item) for item in seen(400, 35, night=False)]
    package_vision(
        base(), folder, "eye@1.0", labels=CLASSES, imgsz=SIZE, calibration=known, thresholds=Thresholds(),
        precision="fp32",
    )  # fmt: skip
    return folder


def teacher(folder: Path) -> Path:
    """`teacher@1.0`: tells the shapes apart by their colour, day and night, and is never wrong about them."""
    folder.mkdir()
    write_classifier(learn_tints([as_labelled(*item) for item in seen(300, 36)]), folder / "model.onnx")
    roles = {"model": "model.onnx"}
    plan = {
        "kind": "classify", "engine": "onnx_classify", "labels": list(CLASSES), "input_size": (SIZE, SIZE),
        "calibration": calibration().model_copy(update={"novelty": None}), "created": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    engine = open_engine(folder, build_manifest(folder, "teacher@1.0", roles=roles, **plan), EngineOptions())
    assert isinstance(engine, Detector)
    roles |= write_detect_golden(folder, engine, [as_labelled(*item).image for item in seen(6, 37)], 0.25)
    engine.close()
    write_manifest(folder, build_manifest(folder, "teacher@1.0", roles=roles, **plan))
    return folder


def right(folder: Path, count: int = 150) -> list[float]:
    """Of pictures of the stream, the share of each class that the release in `folder` names rightly."""
    engine = open_engine(folder, read_manifest(folder), EngineOptions())
    assert isinstance(engine, Detector)
    hits: list[list[bool]] = [[] for _ in CLASSES]
    for data, label in seen(count, 38):
        found = engine.infer([engine.prepare(as_labelled(data, label).image)])[0]
        hits[label].append(int(found.classes[0]) == label)
    engine.close()
    return [float(np.mean(each)) for each in hits]
