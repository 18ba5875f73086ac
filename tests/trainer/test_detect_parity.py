"""The device's detector against ultralytics' own prediction on the same exported file: the same boxes, to the pixel."""

from __future__ import annotations

import numpy as np
import pytest

from bench.photos import LABELS, overfit
from edged.core.matching import iou_matrix
from edged.engines.base import EngineOptions
from edged.engines.decode import SCORE_FLOOR
from edged.engines.onnx_detect import OnnxDetector
from tests.support.exports import BOXES_MIN, SCORE, SIZE, pictures, predicted, release


@pytest.mark.parametrize(
    ("network", "end_to_end"), [("yolov8n.yaml", False), ("yolo11n.yaml", False), ("yolo26n.yaml", True)]
)
def test_the_answer_is_ultralytics_answer(network: str, end_to_end: bool) -> None:
    path = overfit(network, SIZE)
    engine = OnnxDetector(path.parent, release(path, "detect"), EngineOptions())
    assert engine.labels == LABELS
    counts, weak = [0, 0], 0
    for image in pictures():
        found = engine.infer([engine.prepare(image)])[0]
        answer = found.above(SCORE)
        expected = predicted(path, "detect", image).boxes
        counts[0] += len(answer)
        counts[1] += len(expected)
        weak += len(found) - len(answer)
        assert len(answer) == len(expected), image.shape
        assert answer.classes.tolist() == expected.cls.int().tolist()
        np.testing.assert_allclose(answer.scores, expected.conf.numpy(), atol=0.01)
        theirs = expected.xyxy.numpy()
        np.testing.assert_allclose(answer.boxes, theirs, atol=0.05)
        # A box cut away at an edge has no IoU.
        solid = (answer.boxes[:, 2:] - answer.boxes[:, :2]).min(axis=1, initial=9) > 1
        assert np.diag(iou_matrix(answer.boxes, theirs))[solid].min(initial=1.0) >= 0.99
        assert (np.diff(found.scores) <= 0).all()
        assert found.scores.min(initial=1.0) > SCORE_FLOOR
        assert answer.boxes[:, 2:].max(axis=0, initial=0).tolist() <= [image.shape[1], image.shape[0]]
    assert min(counts) >= BOXES_MIN, f"{counts} boxes: the comparison is empty"
    assert weak > 0
    head = engine._session.outputs[0].shape  # that both heads are really among the networks
    assert head == ((1, 300, 6) if end_to_end else (1, 4 + len(LABELS), 336))
