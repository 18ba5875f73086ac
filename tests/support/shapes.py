"""Small labelled pictures of coloured shapes, and YOLOs of an eighth of the width, for trainings that take seconds."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import yaml

from trainer.tuners.yolo.data import Example

LABELS = ("square", "triangle", "diamond", "cross")
SIZE = 64  # pixels
_COLOURS = ((250, 60, 60), (60, 250, 60), (60, 60, 250), (230, 230, 60))
_UNIT = (
    ((0, 0), (1, 0), (1, 1), (0, 1)),
    ((0.5, 0), (1, 1), (0, 1)),
    ((0, 0.5), (0.5, 0), (1, 0.5), (0.5, 1)),
    ((0.35, 0), (0.65, 0), (0.65, 0.35), (1, 0.35), (1, 0.65), (0.65, 0.65), (0.65, 1), (0.35, 1), (0.35, 0.65),
     (0, 0.65), (0, 0.35), (0.35, 0.35)),
)  # fmt: skip


def shapes(
    count: int, seed: int, task: str, classes: tuple[int, ...] = (0, 1, 2), *, replay: bool = False
) -> list[Example]:
    """`count` pictures of 64 x 64 pixels with a shape of one of the classes, by turns; labelled as the task needs."""
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        image = rng.integers(90, 130, (SIZE, SIZE, 3)).astype(np.uint8)
        index = classes[number % len(classes)]
        side = int(rng.integers(24, 40))
        corner = rng.integers(0, SIZE - side, 2)
        outline = (np.array(_UNIT[index]) * side + corner).astype(np.int32)
        cv2.fillPoly(image, [outline], _COLOURS[index])
        boxes = [[*outline.min(axis=0), *outline.max(axis=0)]]
        name = f"{'old' if replay else 'new'}-{seed}-{number}"
        examples.append(
            Example(
                name,
                image,
                [index],
                boxes if task == "detect" else None,
                [outline] if task == "segment" else None,
                replay,
            )
        )
    return examples


def tiny_network(folder: Path, name: str) -> Path:
    """The configuration of a network such as "yolo26n-seg", half as wide as its smallest, as a file in `folder`."""
    import ultralytics

    path = folder / f"{name}.yaml"
    if not path.is_file():
        version = name.removeprefix("yolo").split("n")[0]
        shipped = Path(ultralytics.__file__).parent / "cfg" / "models" / version / f"{name.replace('n', '', 1)}.yaml"
        network = yaml.safe_load(shipped.read_text())
        network["scales"] = {"n": [0.33, 0.125, 1024]}
        path.write_text(yaml.safe_dump(network))
    return path
