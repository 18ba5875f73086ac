"""A classifier's input is what training made of the same picture, which Pillow scaled; Pillow is not on the device."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from edged.engines.base import EngineError
from edged.engines.crop import Cropper, scale_and_cut, scaled_size
from edged.engines.letterbox import image_stats


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("image", "size", "scaled"),
    [
        ((480, 640), (224, 224), (224, 298)),  # 298.67 is cut, not rounded
        ((640, 480), (224, 224), (298, 224)),
        ((50, 50), (64, 64), (64, 64)),
        ((480, 640), (64, 96), (64, 96)),  # no square: as a whole
    ],
)
def test_the_shorter_side_is_the_inputs(image: tuple[int, int], size: tuple[int, int], scaled: tuple[int, int]) -> None:
    assert scaled_size(image, size) == scaled


@pytest.mark.parametrize("shape", [(480, 640), (97, 33), (64, 200), (20, 31), (300, 64), (64, 64), (65, 64), (1, 90)])
def test_pixels_are_pillows(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    scaled = scaled_size(shape, (64, 64))
    whole = PIL.Image.fromarray(image).resize((scaled[1], scaled[0]), PIL.Image.Resampling.BILINEAR)
    top, left = round((scaled[0] - 64) / 2), round((scaled[1] - 64) / 2)
    expected = np.asarray(whole)[top : top + 64, left : left + 64].astype(int)
    found = scale_and_cut(image, scaled, (64, 64))
    assert found.shape == (64, 64, 3)
    assert np.abs(found - expected).max() <= 1
    assert np.abs(found - expected).mean() < 0.1


def test_both_forms_show_the_same_picture_and_say_where_it_lies() -> None:
    image = noise(50, 100)
    floats, pixels = (Cropper((20, 20), form).prepare(image) for form in ("float32", "uint8"))
    assert floats.tensor.shape == (3, 20, 20)
    assert pixels.tensor.shape == (20, 20, 3)
    np.testing.assert_allclose(floats.tensor[::-1].transpose(1, 2, 0) * 255, pixels.tensor, atol=1e-4)
    assert floats.stats == pixels.stats == image_stats(pixels.tensor)
    assert (pixels.scale, pixels.pad) == (0.4, (-10.0, 0.0))
    # A swap between a detector and a classifier of one size must prepare again.
    assert {floats.spec, pixels.spec} == {(20, 20, "crop float32"), (20, 20, "crop uint8")}


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(EngineError, match=r"expected \(height, width, 3\) uint8"):
        Cropper((20, 20), "uint8").prepare(np.zeros((8, 8), np.uint8))
