"""Image files, good and bad: pixels, or one sentence about what is wrong."""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import pytest

from edged import images
from edged.images import BadImage

PIXELS = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)


def encoded(kind: str, pixels: np.ndarray = PIXELS) -> bytes:
    done, data = cv2.imencode(kind, pixels)
    assert done
    return data.tobytes()


@pytest.mark.parametrize("kind", [".png", ".bmp", ".tiff"])
def test_lossless_files_give_their_pixels(kind: str) -> None:
    np.testing.assert_array_equal(images.decode(encoded(kind)), PIXELS)


@pytest.mark.parametrize("kind", [".jpg", ".webp"])
def test_lossy_files_give_their_shape(kind: str) -> None:
    assert images.decode(encoded(kind)).shape == (12, 16, 3)


def test_grey_and_transparent_pictures_become_colour() -> None:
    assert images.decode(encoded(".png", PIXELS[..., 0])).shape == (12, 16, 3)
    assert images.decode(encoded(".png", np.dstack([PIXELS, PIXELS[..., :1]]))).shape == (12, 16, 3)


@pytest.mark.parametrize("kind", [".jpg", ".png", ".webp", ".bmp", ".tiff"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_cut_off_file_is_refused(kind: str, share: float) -> None:
    data = encoded(kind)
    with pytest.raises(BadImage):
        images.decode(data[: int(len(data) * share)])


def test_nothing_and_nonsense_are_refused() -> None:
    with pytest.raises(BadImage, match="the file is empty"):
        images.decode(b"")
    with pytest.raises(BadImage, match="7 bytes that are no complete JPEG, PNG"):
        images.decode(b"nothing")


def test_what_is_too_large_is_refused_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "IMAGE_BYTES_MAX", 100)
    with pytest.raises(BadImage, match=r"\d+ bytes, more than the limit of 100"):
        images.decode(encoded(".bmp"))


def test_a_small_file_that_claims_gigabytes_of_pixels_is_refused() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    with pytest.raises(BadImage):
        images.decode(bomb)
