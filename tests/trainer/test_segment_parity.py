"""The device's segmenter against ultralytics' own prediction on the same exported file: the same boxes, the same masks."""

from __future__ import annotations

import numpy as np
import pytest

from bench.photos import overfit
from edged.core.matching import iou_matrix
from edged.engines.base import EngineOptions
from edged.engines.letterbox import Letterbox
from edged.engines.onnx_segment import OnnxSegmenter
from tests.support.exports import BOXES_MIN, SCORE, SIZE, covered, pictures, predicted, release

IOU_MIN = 0.99  # of a mask; the outline loses the few pixels that clipping to the image moves


@pytest.mark.parametrize("network", ["yolo11n-seg.yaml", "yolo26n-seg.yaml"])
def test_the_answer_is_ultralytics_answer(network: str) -> None:
    path = overfit(network, SIZE)
    engine = OnnxSegmenter(path.parent, release(path, "segment"), EngineOptions())
    counts = [0, 0]
    for image in pictures():
        found = engine.infer([engine.prepare(image)])[0]
        answer, result = found.above(SCORE), predicted(path, "segment", image)
        expected = result.boxes
        counts[0] += len(answer)
        counts[1] += len(expected)
        assert answer.classes.tolist() == expected.cls.int().tolist()
        np.testing.assert_allclose(answer.scores, expected.conf.numpy(), atol=0.01)
        np.testing.assert_allclose(answer.boxes, expected.xyxy.numpy(), atol=0.05)
        solid = (answer.boxes[:, 2:] - answer.boxes[:, :2]).min(axis=1, initial=9) > 1
        assert np.diag(iou_matrix(answer.boxes, expected.xyxy.numpy()))[solid].min(initial=1.0) >= 0.99
        assert answer.outlines is not None and found.outlines is not None
        assert all(len(outline) == 0 for outline in found.outlines[len(answer) :])
        masks = [] if result.masks is None else result.masks.data.numpy()
        place = Letterbox.fit(image.shape[:2], (SIZE, SIZE))
        for outline, mask in zip(answer.outlines, masks, strict=True):
            inside = np.zeros_like(mask, dtype=bool)
            inside[place.rows, place.columns] = mask[place.rows, place.columns] > 0
            ours = covered(outline * [place.width / image.shape[1], place.height / image.shape[0]]
                           + [place.left, place.top], SIZE)  # fmt: skip
            assert (ours & inside).sum() >= IOU_MIN * (ours | inside).sum()
    assert min(counts) >= BOXES_MIN, f"{counts} boxes: the comparison is empty"
