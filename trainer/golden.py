"""Golden sets: inputs with the answers a release must give, which a device checks before it trusts the release.

Detection: role `golden_inputs`, an .npz with arrays `image_0`, `image_1`, ... of uint8 (height, width, 3) BGR; role
`golden_outputs`, a JSON list with one `{"boxes": [[x1, y1, x2, y2], ...], "scores": [...], "classes": [...]}` an image,
in the order of the images: the boxes in pixels whose score reaches the release's threshold, as the shipped file answers
on the device's engine. Text: role `golden_prompts`, a JSON list of `{"prompt": ..., "answer": ...}`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edged.engines.base import Detector, Image
from trainer.files import write_whole

INPUTS, OUTPUTS, PROMPTS = "golden_inputs", "golden_outputs", "golden_prompts"


def write_detect_golden(folder: Path, detector: Detector, images: Sequence[Image], score: float) -> dict[str, str]:
    """Write the golden set of `detector` on `images` into `folder`; the roles with their file names.

    Raises ValueError without an image.
    """
    if not images:
        raise ValueError("a golden set needs at least one image")
    answers = []
    for image in images:
        found = detector.infer([detector.prepare(image)])[0].above(score)
        answers.append(
            {
                "boxes": [[round(float(value), 2) for value in box] for box in found.boxes],
                "scores": [round(float(value), 4) for value in found.scores],
                "classes": [int(value) for value in found.classes],
            }
        )
    arrays = {f"image_{index}": image for index, image in enumerate(images)}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "golden_inputs.npz", allow_pickle=False, **arrays)
    write_whole(folder / "golden_outputs.json", json.dumps(answers).encode())
    return {INPUTS: "golden_inputs.npz", OUTPUTS: "golden_outputs.json"}


def write_prompt_golden(folder: Path, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Write (prompt, expected answer) pairs as `golden.json` into `folder`; the role with its file name."""
    if not pairs:
        raise ValueError("a golden set needs at least one prompt")
    text = json.dumps([{"prompt": prompt, "answer": answer} for prompt, answer in pairs], ensure_ascii=False)
    write_whole(folder / "golden.json", text.encode())
    return {PROMPTS: "golden.json"}
