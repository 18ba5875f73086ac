"""Images into a detector's input: the geometry of training, both forms of input, and buffers that are used again."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from edged.engines.base import EngineError, ImageStats
from edged.engines.letterbox import BUFFERS_MAX, PAD_VALUE, Letterbox, Letterboxer, Ring, image_stats

SIZE = (96, 96)
FORMS = ("float32", "uint8")


def as_pixels(tensor: np.ndarray, form: str) -> np.ndarray:
    """What a model is given, as (height, width, 3) BGR in 0..255."""
    return tensor if form == "uint8" else tensor[::-1].transpose(1, 2, 0) * 255


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((96, 96), Letterbox(96, 96, 0, 0, 1.0)),
        ((48, 96), Letterbox(48, 96, 0, 24, 1.0)),
        ((47, 96), Letterbox(47, 96, 0, 24, 1.0)),  # 49 pixels of padding: the odd one goes below
        ((1, 3000), Letterbox(1, 96, 0, 47, 0.032)),  # a side never vanishes
    ],
)
def test_letterbox_geometry(image: tuple[int, int], expected: Letterbox) -> None:
    assert Letterbox.fit(image, SIZE) == expected


def test_floats_are_planes_of_red_green_and_blue_between_grey_bars() -> None:
    image = np.zeros((48, 96, 3), dtype=np.uint8)
    image[..., 0], image[..., 2] = 255, 51  # blue and a fifth of red, in BGR
    item = Letterboxer(SIZE, "float32").prepare(image)
    assert item.tensor.shape == (3, 96, 96)
    assert item.tensor.dtype == np.float32
    assert item.spec == (96, 96, "float32")
    np.testing.assert_allclose(item.tensor[:, 23, 50], [114 / 255] * 3)
    np.testing.assert_allclose(item.tensor[:, 24, 50], [0.2, 0, 1])
    assert (item.scale, item.pad) == (1.0, (0.0, 24.0))


def test_pixels_are_left_as_they_are() -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 96, 3)).astype(np.uint8)
    item = Letterboxer(SIZE, "uint8").prepare(image)
    assert item.spec == (96, 96, "uint8")
    np.testing.assert_array_equal(item.tensor[24:72], image)
    assert (item.tensor[:24] == PAD_VALUE).all()
    assert (item.tensor[72:] == PAD_VALUE).all()


@pytest.mark.parametrize("shape", [(30, 200), (200, 30), (96, 96), (1, 3000), (5, 7)])
def test_both_forms_show_the_same_picture_and_the_same_statistics(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3)).astype(np.uint8)
    floats, pixels = (Letterboxer(SIZE, form).prepare(image) for form in FORMS)
    np.testing.assert_allclose(as_pixels(floats.tensor, "float32"), pixels.tensor, atol=1e-4)
    assert floats.stats == pixels.stats


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_never_shows_the_one_before_it(form: str) -> None:
    letterboxer = Letterboxer(SIZE, form)
    dark, light = (np.full((96, 48, 3), value, np.uint8) for value in (10, 250))
    for image in (dark, light.transpose(1, 0, 2).copy(), light, dark):
        shown = as_pixels(letterboxer.prepare(image).tensor, form)
        fresh = as_pixels(Letterboxer(SIZE, form).prepare(image).tensor, form)
        np.testing.assert_array_equal(shown, fresh)


@pytest.mark.parametrize("form", FORMS)
def test_an_item_that_waits_keeps_its_picture_while_others_share_one_buffer(form: str) -> None:
    letterboxer = Letterboxer(SIZE, form)
    waiting = letterboxer.prepare(np.full((96, 96, 3), 7, np.uint8))
    part = letterboxer.prepare(np.full((96, 96, 3), 8, np.uint8)).tensor[None]  # only a view of it lives on
    places = set()
    for value in range(100, 120):
        places.add(letterboxer.prepare(np.full((96, 96, 3), value, np.uint8)).tensor.ctypes.data)
    assert len(places) == 1
    np.testing.assert_allclose(as_pixels(waiting.tensor, form), 7, atol=1e-4)
    np.testing.assert_allclose(as_pixels(part[0], form), 8, atol=1e-4)


def test_more_arrays_than_the_ring_keeps_are_still_all_different() -> None:
    ring = Ring((4,), np.uint8)
    held = [ring.take() for _ in range(BUFFERS_MAX + 3)]
    assert len({array.ctypes.data for array in held}) == len(held)
    kept = {array.ctypes.data for array in held[:BUFFERS_MAX]}
    del held
    again = [ring.take() for _ in range(BUFFERS_MAX)]
    assert {array.ctypes.data for array in again} == kept


def test_threads_never_get_the_same_array() -> None:
    ring = Ring((64,), np.int64)
    mixed: list[int] = []

    def use(number: int) -> None:
        for _ in range(2000):
            array = ring.take()
            array.fill(number)
            if (array != number).any():
                mixed.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mixed == []


def test_stats_see_the_content_not_the_bars() -> None:
    flat = image_stats(np.full((10, 20, 3), 51, dtype=np.uint8))
    assert flat == ImageStats(pytest.approx(0.2), 0.0, 0.0, pytest.approx(0.2), pytest.approx(0.2))
    checks = (np.indices((20, 20)).sum(axis=0) % 2 * 255).astype(np.uint8)
    sharp = image_stats(np.repeat(checks[..., None], 3, axis=2))
    assert sharp.contrast == pytest.approx(0.5)
    assert sharp.sharpness == 1
    assert (sharp.low, sharp.high) == (0.0, 1.0)
    black = Letterboxer(SIZE, "uint8").prepare(np.zeros((20, 90, 3), np.uint8))
    assert black.stats.high == 0


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8, 3), np.uint8), np.zeros((8, 8, 3))],
)
def test_what_is_no_image_is_refused(image: Any) -> None:
    with pytest.raises(EngineError, match=r"expected \(height, width, 3\) uint8"):
        Letterboxer(SIZE, "float32").prepare(image)
