"""What proves an int8 export has not shaped it: golden images set no ranges."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from edged.engines.base import Image
from trainer.core.neighbours import near
from trainer.evaluate import image_sha256
from trainer.export.golden_images import GOLDEN_IMAGES, check_apart, part
from trainer.export.quantize import CALIBRATION_MIN
from trainer.sketches import sketch, stack


def pictures(count: int, seed: int = 0) -> list[Image]:
    """Pictures (24, 32, 3) that have nothing in common."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 8, 3)).astype(np.uint8)
    return [np.asarray(cv2.resize(each, (32, 24), interpolation=cv2.INTER_NEAREST), np.uint8) for each in coarse]


def darker(image: Image) -> Image:
    """The same view again."""
    return np.asarray(image * 0.8, np.uint8)


def names(images: tuple[Image, ...]) -> set[str]:
    return {image_sha256(image) for image in images}


# Images, how many are golden and how many set ranges.
SIZES = [(9, 1, 8), (12, 4, 8), (16, 8, 8), (108, 8, 100), (500, 8, 492)]


@pytest.mark.parametrize(("count", "golden", "ranges"), SIZES)
def test_golden_images_set_no_ranges(count: int, golden: int, ranges: int) -> None:
    images = pictures(count)
    parts = part(images)
    assert (len(parts.golden), len(parts.ranges), parts.near) == (golden, ranges, 0)
    assert not names(parts.golden) & names(parts.ranges)
    assert names(parts.golden) | names(parts.ranges) == names(tuple(images))
    again = part(images)
    assert [image_sha256(each) for each in again.golden] == [image_sha256(each) for each in parts.golden]


def test_they_are_spread_over_a_sorted_folder() -> None:
    images = pictures(80)
    where = {image_sha256(image): row for row, image in enumerate(images)}
    assert [where[image_sha256(image)] for image in part(images).golden] == list(range(0, 80, 10))


def test_the_same_picture_twice_is_on_one_side() -> None:
    images = [each for image in pictures(20) for each in (image, image.copy())]
    parts = part(images)
    assert (len(parts.golden), len(parts.ranges)) == (8, 12)
    assert not names(parts.golden) & names(parts.ranges)


def test_nearly_the_same_picture_sets_no_ranges_either() -> None:
    images = pictures(30)
    alike = [darker(image) for image in reversed(images)]
    parts = part([*images, *alike])
    assert parts.near == 0
    sketches = [stack([sketch(np.asarray(each, np.uint8)) for each in side]) for side in (parts.golden, parts.ranges)]
    assert (np.asarray(near(*sketches)) < 0).all()
    assert (len(parts.golden), len(parts.ranges)) == (8, 60 - 8 - 4)  # of four of them the other is golden too


def test_under_a_camera_that_always_sees_the_same_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Other pixels, but one view: there is nothing better to prove it on."""
    view = pictures(1)[0]
    images = [np.asarray(view - np.minimum(view, level), np.uint8) for level in range(20)]
    parts = part(images)
    assert (len(parts.ranges), len(parts.golden), parts.near) == (CALIBRATION_MIN, GOLDEN_IMAGES, GOLDEN_IMAGES)
    assert not names(parts.golden) & names(parts.ranges)
    assert parts.lineage() == {"ranges": 8, "golden": 8, "golden_near_ranges": 8}
    assert "8 of 8 golden images show nearly what images show that set the ranges" in caplog.text


@pytest.mark.parametrize("count", [0, 1, 8])
def test_too_few_are_refused_with_the_number(count: int) -> None:
    images = pictures(count)
    with pytest.raises(ValueError, match=rf"^{count} different calibration images: int8 needs 9 or more, 8 that set"):
        part([*images, *images])


def test_a_precision_without_ranges_takes_any() -> None:
    parts = part(pictures(5), int8=False, golden_max=3)
    assert (len(parts.golden), parts.ranges) == (3, ())
    assert part([], int8=False).golden == ()


def test_golden_images_that_somebody_chose_are_looked_at() -> None:
    images = pictures(12)
    assert check_apart(images[:4], images[4:]) == ()
    assert check_apart([darker(images[5]), images[0]], images[4:]) == (
        "1 of 2 golden images show nearly what calibration images show: parity says less",
    )
    with pytest.raises(ValueError, match="2 of 4 golden images are calibration images too"):
        check_apart(images[:4], images[2:])
