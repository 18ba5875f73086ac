"""YOLO detection on ONNX Runtime: letterbox, infer, decode the plain or the end-to-end head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edged.core.confidence import check_calibration
from edged.engines.base import Detections, EngineError, EngineOptions, Image, Prepared
from edged.engines.decode import Found, decode_end_to_end, decode_plain
from edged.engines.letterbox import Letterbox, Letterboxer
from edged.engines.metadata import read_export
from edged.engines.ort import Session
from edged.wire.manifest import ReleaseManifest


class OnnxDetector:
    """A YOLO release on ONNX Runtime. `prepare` and `infer` may run in two threads; `infer` in one at a time."""

    task = "detect"

    def __init__(self, folder: Path, manifest: ReleaseManifest, options: EngineOptions) -> None:
        """Load files["model"] of the release in `folder`; raises EngineError naming what does not fit."""
        self._release = manifest.release
        self._session = session = Session(folder, manifest, options)
        try:
            self._export = read_export(self.task, session.inputs, session.outputs, session.metadata, manifest)
            check_calibration(manifest.calibration)
        except ValueError as error:
            raise EngineError(f"release {self._release}: {error}") from error
        self.labels = self._export.labels
        self._thresholds = manifest.thresholds
        self._letterboxer = Letterboxer(self._export.size, self._export.form)

    def prepare(self, image: Image) -> Prepared:
        """Letterbox `image` (height, width, 3) BGR uint8 to what the model takes; raises EngineError."""
        return self._letterboxer.prepare(image)

    def infer(self, batch: Sequence[Prepared]) -> list[Detections]:
        """Detect in every image of `batch`, boxes in original pixels, scores down to SCORE_FLOOR; raises EngineError.

        An image prepared for another model, as around a swap, is prepared again.
        """
        batch = [item if item.spec == self._letterboxer.spec else self.prepare(item.image) for item in batch]
        answers = self._session.each([item.tensor for item in batch], self._split, batched=self._export.batched)
        return [self._detections(item, answer) for item, answer in zip(batch, answers, strict=True)]

    def _split(self, outputs: list[Any], count: int) -> list[tuple[Any, ...]]:
        """The model's outputs for each of `count` images."""
        export, head = self._export, outputs[0]
        rows, columns = 4 + len(self.labels) + export.masks, 6 + export.masks
        fits = head.ndim == 3 and (head.shape[2] == columns if export.end_to_end else head.shape[1] == rows)
        if not fits or len(head) != count:
            expected = f"[boxes, {columns}]" if export.end_to_end else f"[{rows}, anchors]"
            raise EngineError(
                f"release {self._release}: the model answered {head.shape} to {count} images, expected {expected} "
                "for each"
            )
        return list(zip(*outputs, strict=True))

    def _detections(self, item: Prepared, answer: tuple[Any, ...]) -> Detections:
        found = self._decode(answer[0])
        size = (item.image.shape[0], item.image.shape[1])
        return Detections(
            Letterbox.fit(size, self._export.size).restore(found.boxes, size), found.scores, found.classes
        )

    def _decode(self, head: NDArray[np.float32]) -> Found:
        try:
            if self._export.end_to_end:
                return decode_end_to_end(head, len(self.labels))
            return decode_plain(head, len(self.labels), self._thresholds.iou)
        except EngineError as error:
            raise EngineError(f"release {self._release}: {error}") from error

    def close(self) -> None:
        """Free the session; further calls of `infer` raise EngineError."""
        self._session.close()
