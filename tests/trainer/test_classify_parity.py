"""The device's classifier against ultralytics' own prediction on the same exported file: the same labels and scores."""

from __future__ import annotations

import numpy as np

from bench.photos import overfit, photos, pieces
from edged.engines.base import EngineOptions
from edged.engines.onnx_classify import TOP, OnnxClassifier
from tests.support.exports import BOXES_MIN, SIZE, pictures, predicted, release


def test_the_answer_is_ultralytics_answer() -> None:
    path = overfit("yolo11n-cls.yaml", SIZE)
    engine = OnnxClassifier(path.parent, release(path, "classify"), EngineOptions())
    images = [*pictures(), *(piece for photo in photos() for piece in pieces(photo))]
    assert len(images) >= BOXES_MIN
    best = set()
    for image in images:
        found = engine.infer([engine.prepare(image)])[0]
        scores = predicted(path, "classify", image).probs.data.numpy()
        assert found.boxes.tolist() == [[0, 0, image.shape[1], image.shape[0]]] * TOP
        assert sorted(found.classes.tolist()) == list(range(TOP))  # as many classes as it answers with
        np.testing.assert_allclose(found.scores, scores[found.classes], atol=0.01)
        assert (np.diff(found.scores) <= 0).all()
        best.add(int(found.classes[0]))
    assert len(best) >= 3  # it tells the photos apart
