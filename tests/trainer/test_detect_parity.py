"""The device's engine against ultralytics' own prediction on the same exported file: the same boxes, to the pixel."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from ultralytics import YOLO

from edged.core.matching import iou_matrix
from edged.engines.base import EngineOptions, Image
from edged.engines.onnx_detect import SCORE_FLOOR, Letterbox, OnnxDetector
from edged.wire.manifest import FileEntry, ReleaseManifest

SIZE = 160
BOXES_MIN = 20  # on each side: a comparison of nothing with nothing proves nothing
SHAPES = ((160, 160), (427, 640), (300, 101), (97, 200), (33, 160), (160, 161))  # height, width


def pictures() -> list[Image]:
    """Crops of real photos in sizes that letterbox in every way: square, wide, tall, odd, enlarged, one pixel off."""
    photos = [np.ascontiguousarray(photo[..., ::-1]) for photo in load_sample_images().images]
    return [cv2.resize(photo, (width, height)) for photo in photos for height, width in SHAPES]  # type: ignore[misc]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A yolo11n that nobody trained, exported: its last layers are stretched until it calls a part of every photo
    something, with scores all over the range, in dense overlapping clusters: what suppression finds hardest."""
    torch.manual_seed(3)
    model = YOLO("yolo11n.yaml")
    network = model.model.train()
    boxed = [
        Letterbox.fit((each.shape[0], each.shape[1]), (SIZE, SIZE)).apply(each, (SIZE, SIZE))[0] for each in pictures()
    ]
    batch = torch.from_numpy(np.stack(boxed)[..., ::-1].transpose(0, 3, 1, 2).copy()) / 255
    with torch.no_grad():
        for layer in network.modules():  # normalise by real pixels, so that the features differ from place to place
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = None  # the plain mean over the batches seen
                layer.reset_running_stats()
        network(batch)
        head = network.model[-1]
        tails = [branch[-1] for branch in head.cv3]
        logits: list[torch.Tensor] = []
        hooks = [tail.register_forward_hook(lambda _, __, out: logits.append(out)) for tail in tails]
        network.eval()(batch)
        for hook in hooks:
            hook.remove()
        for tail, out in zip(tails, logits, strict=True):
            # Per class: zero mean, deviation 1.6, then down to where the best of 80 classes passes 0.25 now and then.
            spread = 1.6 / out.std(dim=(0, 2, 3)).clamp(min=1e-6)
            tail.weight.mul_(spread[:, None, None, None])
            tail.bias.sub_(out.mean(dim=(0, 2, 3))).mul_(spread).sub_(6.0)
        for branch in head.cv2:
            branch[-1].weight.mul_(5)  # boxes of many sizes
    folder = tmp_path_factory.mktemp("yolo")
    path = folder / "model.pt"
    model.save(path)
    return Path(YOLO(path).export(format="onnx", imgsz=SIZE, simplify=False, verbose=False))


def release(path: Path, names: dict[int, str]) -> ReleaseManifest:
    data = path.read_bytes()
    return ReleaseManifest(
        release="parity@1.0",
        kind="detect",
        engine="onnx_detect",
        files={"model": FileEntry(path=path.name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))},
        labels=[names[index] for index in range(len(names))],
        input_size=(SIZE, SIZE),
        created="2026-01-01T00:00:00Z",
    )


def test_the_answer_is_ultralytics_answer(exported: Path) -> None:
    theirs = YOLO(exported, task="detect")
    engine = OnnxDetector(exported.parent, release(exported, theirs.names), EngineOptions())
    counts, weak = [0, 0], 0
    for image in pictures():
        found = engine.infer([engine.prepare(image)])[0]
        answer = found.above(0.25)
        expected = theirs.predict(image, conf=0.25, iou=0.7, imgsz=SIZE, verbose=False)[0].boxes
        counts[0] += len(answer)
        counts[1] += len(expected)
        weak += len(found) - len(answer)
        assert len(answer) == len(expected), image.shape
        assert answer.classes.tolist() == expected.cls.int().tolist()
        np.testing.assert_allclose(answer.scores, expected.conf.numpy(), atol=0.01)
        np.testing.assert_allclose(answer.boxes, expected.xyxy.numpy(), atol=0.05)
        solid = (answer.boxes[:, 2:] - answer.boxes[:, :2]).min(
            axis=1, initial=9
        ) > 1  # a box cut away at an edge has no IoU
        assert np.diag(iou_matrix(answer.boxes, expected.xyxy.numpy()))[solid].min(initial=1.0) >= 0.99
        assert (np.diff(found.scores) <= 0).all()
        assert found.scores.min(initial=1.0) > SCORE_FLOOR
        assert answer.boxes[:, 2:].max(axis=0, initial=0).tolist() <= [image.shape[1], image.shape[0]]
    assert min(counts) >= BOXES_MIN, f"{counts} boxes: the comparison is empty"
    assert weak > 0
