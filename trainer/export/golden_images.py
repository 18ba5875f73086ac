"""Images parted for an int8 export: some set its ranges, others prove it (`trainer.core.golden`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edged.engines.base import Image
from trainer.core.golden import draw, spread
from trainer.core.neighbours import Sketches, near, stack
from trainer.evaluate import image_sha256
from trainer.export.quantize import CALIBRATION_MIN
from trainer.sketches import sketch

log = logging.getLogger(__name__)

GOLDEN_IMAGES = 8  # of a release: devices answer them all when they prove it
APART_KEY = "int8_images"  # of a release's lineage


@dataclass(frozen=True, slots=True)
class Parts:
    """Images (height, width, 3) BGR: `ranges` for int8, none for a precision that has none, and the `golden` ones. `near`:
    how many of the golden ones show nearly what one of the ranges shows."""

    ranges: tuple[Image, ...]
    golden: tuple[Image, ...]
    near: int = 0

    def lineage(self) -> dict[str, int]:
        """For a release's lineage, under APART_KEY."""
        return {"ranges": len(self.ranges), "golden": len(self.golden), "golden_near_ranges": self.near}


def part(images: Sequence[Image], *, int8: bool = True, golden_max: int = GOLDEN_IMAGES) -> Parts:
    """Part calibration images; the same images in the same order give the same parts.

    Raises ValueError when int8 would have to be proven on what set its ranges.
    """
    if not int8:
        return Parts((), tuple(images[row] for row in spread(len(images), golden_max)))
    drawn = draw(
        [image_sha256(image) for image in images], _sketches(images), ranges_min=CALIBRATION_MIN, golden_max=golden_max
    )
    if drawn.near:
        log.warning(
            "%d of %d golden images show nearly what images show that set the ranges of int8: parity says less; calibrate "
            "on more different images", drawn.near, len(drawn.golden),
        )  # fmt: skip
    ranges, golden = (tuple(images[row] for row in rows) for rows in (drawn.ranges, drawn.golden))
    return Parts(ranges, golden, drawn.near)


def check_apart(golden: Sequence[Image], ranges: Sequence[Image]) -> tuple[str, ...]:
    """What a person should know of golden images that somebody chose; raises ValueError for those that set ranges too."""
    known = {image_sha256(image) for image in ranges}
    shared = sum(image_sha256(image) in known for image in golden)
    if shared:
        raise ValueError(
            f"{shared} of {len(golden)} golden images are calibration images too: what set the ranges of int8 proves "
            "nothing of them; take them out of one of the two"
        )
    again = int((near(_sketches(golden), _sketches(ranges)) >= 0).sum())
    if not again:
        return ()
    return (f"{again} of {len(golden)} golden images show nearly what calibration images show: parity says less",)


def _sketches(images: Sequence[Image]) -> Sketches:
    return stack([sketch(np.asarray(image, np.uint8)) for image in images])
