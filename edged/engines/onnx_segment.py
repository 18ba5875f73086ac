"""YOLO segmentation on ONNX Runtime: detection, and of every answered box the outline of its mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from edged.engines.base import Detections, EngineError, Prepared
from edged.engines.letterbox import Letterbox
from edged.engines.onnx_detect import OnnxDetector
from edged.engines.outline import NOTHING, mask_polygon


class OnnxSegmenter(OnnxDetector):
    """A YOLO segmentation release on ONNX Runtime; threads as in OnnxDetector.

    Boxes that reach the release's score threshold have outlines, weaker ones none: they are evidence, not an answer. A
    box whose mask is empty is no answer either, and is left out.
    """

    task = "segment"

    def _detections(self, item: Prepared, answer: tuple[Any, ...]) -> Detections:
        found, prototypes = self._decode(answer[0]), answer[1]
        export, size = self._export, (item.image.shape[0], item.image.shape[1])
        if prototypes.ndim != 3 or len(prototypes) != export.masks or not np.isfinite(prototypes.sum()):
            raise EngineError(
                f"release {self._release}: the model answered mask prototypes {prototypes.shape}, expected "
                f"({export.masks}, rows, columns) of finite numbers"
            )
        place = Letterbox.fit(size, export.size)
        answered = found.scores >= self._thresholds.score
        outlines = [
            mask_polygon(prototypes, found.coefficients[row], found.boxes[row], export.size) if told else NOTHING
            for row, told in enumerate(answered)
        ]
        keep = [row for row, told in enumerate(answered) if not told or len(outlines[row])]
        return Detections(
            place.restore(found.boxes[keep], size),
            found.scores[keep],
            found.classes[keep],
            tuple(place.restore(outlines[row], size) for row in keep),
        )
