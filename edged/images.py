"""Bytes of an image file to pixels, with limits."""

from __future__ import annotations

import os

import numpy as np

from edged.engines.base import Image

IMAGE_BYTES_MAX = 32 << 20
PIXELS_MAX = 64_000_000
JPEG_QUALITY = 95
# A few kilobytes can claim to be gigabytes of pixels. OpenCV reads its limit once, when it is loaded, and refuses by
# the header, before it takes the memory.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(PIXELS_MAX))

import cv2  # noqa: E402  # after its limit is set


class BadImage(ValueError):
    """The bytes are no picture that can be used; the message says what is wrong with them."""


def encode(image: Image) -> bytes:
    """The pixels as a PNG file, without loss; the same pixels give the same bytes."""
    done, data = cv2.imencode(".png", image)
    if not done:
        raise BadImage(f"{image.shape[1]}x{image.shape[0]} pixels cannot be encoded as PNG")
    return data.tobytes()


def compress(image: Image) -> bytes:
    """The pixels as a JPEG file of high quality: what a frame of a live stream is kept and asked about as. The teacher and
    the training see exactly these; lossless, a frame would be too large to be asked about."""
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        raise BadImage(f"{image.shape[1]}x{image.shape[0]} pixels cannot be encoded as JPEG")
    return data.tobytes()


def decode(data: bytes) -> Image:
    """The (height, width, 3) uint8 BGR pixels of a JPEG, PNG, WebP, BMP or TIFF file; raises BadImage."""
    if not data:
        raise BadImage("the file is empty")
    if len(data) > IMAGE_BYTES_MAX:
        raise BadImage(f"{len(data)} bytes, more than the limit of {IMAGE_BYTES_MAX}")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise BadImage(f"it cannot be decoded: {error.err or error}") from None
    if image is None:
        raise BadImage(f"{len(data)} bytes that are no complete JPEG, PNG, WebP, BMP or TIFF")
    if image.shape[0] * image.shape[1] > PIXELS_MAX:
        raise BadImage(f"{image.shape[1]}x{image.shape[0]} pixels, more than the limit of {PIXELS_MAX}")
    return image  # type: ignore[return-value]  # IMREAD_COLOR gives uint8
