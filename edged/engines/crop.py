"""Images into a classifier's input: the middle of the image, scaled as Pillow scales, with every pixel counted."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edged.engines.base import Image, Prepared
from edged.engines.letterbox import Ring, check_image, image_stats, to_planes

_WINDOWS_MAX = 16  # sizes of images whose weights are kept: cameras have few


class Cropper:
    """Makes a classifier's inputs. `form` as in Letterboxer.

    As in training, the shorter side is scaled to a square input's and the middle is cut out; into an input that is not
    square the image is scaled as a whole.
    """

    def __init__(self, size: tuple[int, int], form: str) -> None:
        self._size, self._form = size, form
        self.spec = (*size, f"crop {form}")
        self._ring = Ring((*size, 3) if form == "uint8" else (3, *size), form)

    def prepare(self, image: Image) -> Prepared:
        """Scale and cut `image` (height, width, 3) BGR uint8; raises EngineError when it is something else."""
        check_image(image)
        size = (image.shape[0], image.shape[1])
        scaled = scaled_size(size, self._size)
        content = scale_and_cut(image, scaled, self._size)
        tensor = self._ring.take()
        if self._form == "uint8":
            tensor[:] = content
        else:
            to_planes(content, tensor)
        cut = [-float(_first(long, short)) for long, short in zip(scaled, self._size, strict=True)]
        return Prepared(image, tensor, self.spec, scaled[0] / size[0], (cut[1], cut[0]), image_stats(content))


def scaled_size(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image (height, width) scaled for an input of `size`, before the middle is cut out."""
    if size[0] != size[1]:
        return size
    short, long = min(image), max(image)
    longer = int(size[0] * long / short)
    return (size[0], longer) if image[0] == short else (longer, size[0])


def scale_and_cut(image: Image, scaled: tuple[int, int], size: tuple[int, int]) -> Image:
    """The middle `size` (height, width) of the image scaled to `scaled` (height, width).

    The filter is bilinear and as wide as the step between two results, so that none of the image's pixels is skipped;
    OpenCV's bilinear filter looks at four pixels whatever the step. Columns first, rounded, then rows, as Pillow's
    `resize` does it: the two differ by one grey level at most.
    """
    if image.shape[:2] != scaled:
        columns = _resample(image.transpose(1, 0, 2), scaled[1], _first(scaled[1], size[1]), size[1])
        return _resample(columns.transpose(1, 0, 2), scaled[0], _first(scaled[0], size[0]), size[0])
    top, left = _first(scaled[0], size[0]), _first(scaled[1], size[1])
    return np.ascontiguousarray(image[top : top + size[0], left : left + size[1]])


def _first(long: int, short: int) -> int:
    """Where the middle `short` of `long` pixels begins."""
    return round((long - short) / 2)


def _resample(lines: NDArray[np.uint8], scaled: int, first: int, count: int) -> NDArray[np.uint8]:
    """`count` lines, from number `first` on, of the array (n, m, 3) whose n lines are scaled to `scaled`; (count, m, 3)."""
    flat = np.ascontiguousarray(lines).reshape(len(lines), -1)
    out = np.empty((count, flat.shape[1]), np.float32)
    for row, (start, weights) in enumerate(_windows(len(lines), scaled)[first : first + count]):
        # Line by line, so that the image is never as a whole in memory as floats.
        np.matmul(weights, flat[start : start + len(weights)].astype(np.float32), out=out[row])
    rounded: NDArray[np.uint8] = np.clip(out + 0.5, 0, 255).astype(np.uint8)
    return rounded.reshape(count, *lines.shape[1:])


@lru_cache(maxsize=_WINDOWS_MAX)
def _windows(before: int, after: int) -> tuple[tuple[int, NDArray[np.float32]], ...]:
    """Of each of `after` lines: the first of the `before` lines that it is made of, and the weights of those.

    A triangle around the line's centre, half as wide on either side as the step, or one line where lines grow.
    """
    step = before / after
    reach = max(step, 1.0)
    windows = []
    for line in range(after):
        centre = (line + 0.5) * step
        start, end = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), before)
        weights = np.maximum(1 - np.abs((np.arange(start, end) + 0.5 - centre) / reach), 0)
        windows.append((start, (weights / weights.sum()).astype(np.float32)))
    return tuple(windows)
