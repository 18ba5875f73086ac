"""YOLO classification on ONNX Runtime: scale, cut, infer; the best labels are boxes around the whole image.

Why boxes: docs/decisions/0009.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edged.core.confidence import check_calibration
from edged.engines.base import Detections, EngineError, EngineOptions, Image, Prepared
from edged.engines.crop import Cropper
from edged.engines.metadata import read_export
from edged.engines.ort import Session
from edged.wire.manifest import ReleaseManifest

TOP = 5  # labels of one answer, best first


class OnnxClassifier:
    """A YOLO classification release, as a `Detector`; `prepare` and `infer` may run in two threads, `infer` in one."""

    def __init__(self, folder: Path, manifest: ReleaseManifest, options: EngineOptions) -> None:
        """Load files["model"] of the release in `folder`; raises EngineError naming what does not fit."""
        self._release = manifest.release
        self._session = session = Session(folder, manifest, options)
        try:
            self._export = read_export("classify", session.inputs, session.outputs, session.metadata, manifest)
            check_calibration(manifest.calibration)
        except ValueError as error:
            raise EngineError(f"release {self._release}: {error}") from error
        self.labels = self._export.labels
        self._cropper = Cropper(self._export.size, self._export.form)

    def prepare(self, image: Image) -> Prepared:
        """Scale and cut `image` (height, width, 3) BGR uint8 to what the model takes; raises EngineError."""
        return self._cropper.prepare(image)

    def infer(self, batch: Sequence[Prepared]) -> list[Detections]:
        """The TOP labels of every image with their probabilities (softmax), best first; raises EngineError.

        An image prepared for another model, as around a swap, is prepared again.
        """
        batch = [item if item.spec == self._cropper.spec else self.prepare(item.image) for item in batch]
        rows = self._session.each([item.tensor for item in batch], self._scores, batched=self._export.batched)
        return [_best(item, row) for item, row in zip(batch, rows, strict=True)]

    def _scores(self, outputs: list[Any], count: int) -> Any:
        (scores,) = outputs
        if scores.shape != (count, len(self.labels)) or not np.isfinite(scores).all():
            raise EngineError(
                f"release {self._release}: the model answered {scores.shape} to {count} images, expected "
                f"{len(self.labels)} finite scores for each"
            )
        return scores

    def close(self) -> None:
        """Free the session; further calls of `infer` raise EngineError."""
        self._session.close()


def _best(item: Prepared, scores: NDArray[np.float32]) -> Detections:
    best = np.argsort(-scores, kind="stable")[:TOP]
    height, width = item.image.shape[:2]
    boxes = np.tile(np.array([0, 0, width, height], np.float32), (len(best), 1))
    return Detections(boxes, scores[best].astype(np.float32, copy=False), best.astype(np.int64))
