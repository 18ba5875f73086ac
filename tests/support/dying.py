"""`edged` whose native code has a bug: run as `python dying.py PLAN run -c CONFIG`, in the device's environment.

PLAN is JSON: release -> grey values of even pictures on which its engine reads address 0, and "decoder" -> those on which
the decoder does. Nothing of the product knows of this: the two native calls are replaced before it starts.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from typing import Any

from edged import images
from edged.engines.base import Image
from edged.engines.onnx_detect import OnnxDetector

PLAN: dict[str, list[int]] = json.loads(sys.argv.pop(1)) if __name__ == "__main__" else {}
_decode, _infer = images.decode, OnnxDetector.infer


def _die_on(image: Image, values: Sequence[int]) -> None:
    if int(image[-1, -1, 0]) in values:
        ctypes.string_at(0)  # SIGSEGV


def decode(data: bytes) -> Image:
    """As before, or the end."""
    image = _decode(data)
    _die_on(image, PLAN.get("decoder", ()))
    return image


def infer(self: OnnxDetector, batch: Sequence[Any]) -> Any:
    """As before, or the end."""
    for item in batch:
        _die_on(item.image, PLAN.get(self._release, ()))
    return _infer(self, batch)


if __name__ == "__main__":
    images.decode, OnnxDetector.infer = decode, infer  # type: ignore[method-assign]
    from edged.cli import main

    main()
