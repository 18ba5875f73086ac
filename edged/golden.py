"""The golden set: inputs that travel inside a release with the outputs they must give on the engine that runs them.

`golden_inputs`: .npz, arrays `image_0`, `image_1`, ... (height, width, 3) uint8 BGR. `golden_outputs`: .json, a list
with one `{boxes, scores, classes}` an image, what scores at least the release's threshold.
`golden_prompts`: .json, a list of `{prompt, answer}` for generators, greedy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import numpy as np

from edged.core.matching import iou_matrix
from edged.engines.base import ELSEWHERE, Detections, Detector, EngineError, GenerateRequest, Generator, generate_all
from edged.wire.manifest import ReleaseManifest

IOU_MIN = 0.9  # another processor rounds int8 differently: boxes move by a fraction of a pixel
SCORE_TOLERANCE = 0.08
SCORE_EDGE = 0.1  # boxes this close to the threshold may come or go


class GoldenMismatch(EngineError):
    """The model does not answer as its release says it must."""


Took = Callable[[float], None]  # milliseconds of one answer to a picture, or of one token of an answer


def check(
    engine: Detector | Generator, folder: Path, manifest: ReleaseManifest, inputs_max: int | None = None,
    took: Took = lambda _ms: None,
) -> int:  # fmt: skip
    """Run the golden set, or its first `inputs_max`, and compare; returns how many inputs were compared. `took` is told how
    long each answer took.

    Raises GoldenMismatch or EngineError.
    """
    if manifest.engine in ELSEWHERE:  # another machine's model may be away now, and another one tomorrow
        return 0
    if isinstance(engine, Detector):
        return _check_detector(engine, folder, manifest, inputs_max, took)
    return _check_generator(engine, folder, manifest, inputs_max, took)


def _check_detector(
    engine: Detector, folder: Path, manifest: ReleaseManifest, inputs_max: int | None, took: Took
) -> int:
    if not {"golden_inputs", "golden_outputs"} <= manifest.files.keys():
        raise GoldenMismatch(f"release {manifest.release}: no golden set; nothing shows that this model works")
    expected = json.loads((folder / manifest.files["golden_outputs"].path).read_text())
    with np.load(folder / manifest.files["golden_inputs"].path, allow_pickle=False) as arrays:
        count = len(arrays.files)
        images = [arrays[f"image_{n}"] for n in range(count)[:inputs_max]]
    if not images or count != len(expected):
        raise GoldenMismatch(f"release {manifest.release}: {count} golden inputs and {len(expected)} outputs")
    for number, (image, row) in enumerate(zip(images, expected, strict=False)):
        started = monotonic()
        found = engine.infer([engine.prepare(image)])[0]
        took((monotonic() - started) * 1000)
        difference = _difference(found, row, manifest.thresholds.score)
        if difference:
            raise GoldenMismatch(f"release {manifest.release}: golden input {number}: {difference}")
    return len(images)


def _difference(found: Detections, row: dict[str, list[float]], threshold: float) -> str:
    """Empty when every expected box is found again and nothing sure is new."""
    boxes = np.asarray(row["boxes"], np.float32).reshape(-1, 4)
    scores = np.asarray(row["scores"], np.float32)
    classes = np.asarray(row["classes"], np.int64)
    same = (iou_matrix(boxes, found.boxes) >= IOU_MIN) & (classes[:, None] == found.classes[None])
    same &= np.abs(scores[:, None] - found.scores[None]) <= SCORE_TOLERANCE
    for n in range(len(scores)):
        if scores[n] >= threshold + SCORE_EDGE and not same[n].any():
            return f"expected class {classes[n]} at {boxes[n].round().tolist()} with score {scores[n]:.2f}, not found"
    for n in range(len(found)):
        if found.scores[n] >= threshold + SCORE_EDGE and not same[:, n].any():
            return f"found class {found.classes[n]} with score {found.scores[n]:.2f} where nothing is expected"
    return ""


def _check_generator(
    engine: Generator, folder: Path, manifest: ReleaseManifest, inputs_max: int | None, took: Took
) -> int:
    if "golden_prompts" not in manifest.files:
        raise GoldenMismatch(f"release {manifest.release}: no golden prompts; nothing shows that this model works")
    rows = json.loads((folder / manifest.files["golden_prompts"].path).read_text())[:inputs_max]
    for row in rows:
        tokens = int(row.get("tokens_max", 32))
        started = monotonic()
        answer, end = generate_all(engine, GenerateRequest(row["prompt"], tokens_max=tokens))
        took((monotonic() - started) * 1000 / max(1, end.answer_tokens))
        if answer.strip() != row["answer"].strip():
            raise GoldenMismatch(
                f"release {manifest.release}: prompt {row['prompt']!r}: expected {row['answer']!r}, got {answer[:80]!r}"
            )
    if not rows:
        raise GoldenMismatch(f"release {manifest.release}: the list of golden prompts is empty")
    return len(rows)
