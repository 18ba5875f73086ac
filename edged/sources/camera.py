"""A camera (V4L2 through OpenCV), or a video file through the same code: what tests and trials use."""

from __future__ import annotations

import logging
import math
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from edged import images  # noqa: F401  # before cv2: it sets its limits
from edged.clock import Clock, SystemClock
from edged.config_sources import CameraSource
from edged.engines.base import Image
from edged.sources.stream import CorruptFrame, StreamEnded, StreamLost

import cv2  # isort: skip

log = logging.getLogger(__name__)

FILE_FPS = 25.0  # of a video file that does not say its rate
FILE_FPS_MAX = 1000.0
BEHIND_S_MAX = 1.0  # a file is not read faster than its rate to make up for more than this


def open_camera(config: CameraSource, clock: Clock, dropped: threading.Event) -> _Camera | _File:
    """Open what `config.device` names; raises StreamLost with the fix."""
    return _File(config, clock, dropped) if config.is_file() else _Camera(config)


def fault(device: str) -> tuple[str, str] | None:
    """Why the camera or video file cannot be opened, and the fix; None when nothing speaks against it."""
    path = Path(f"/dev/video{device}" if device.isdigit() else device)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        there = ", ".join(sorted(str(found) for found in Path("/dev").glob("video*"))) or "none"
        return f"{path} does not exist", f"plug the camera in, or correct `device` (cameras here: {there})"
    except OSError as error:
        return f"{path}: {error.strerror}", "correct `device`"
    if not (stat.S_ISCHR(mode) or stat.S_ISREG(mode)):
        return f"{path} is neither a camera nor a video file", "correct `device`"
    if not os.access(path, os.R_OK | (os.W_OK if stat.S_ISCHR(mode) else 0)):
        fix = "add the user that runs edged to the group `video`" if stat.S_ISCHR(mode) else "make it readable"
        return f"{path}: permission denied", fix
    return None


def findings(config: CameraSource) -> Iterator[tuple[str, str, str]]:
    """What `edged check` finds: level, text, fix."""
    wrong = fault(config.device)
    if wrong is not None:
        yield "error", *wrong
        return
    try:
        stream = open_camera(config, SystemClock(), threading.Event())
    except StreamLost as error:
        fix = (
            "make it a video that OpenCV reads" if config.is_file() else "end what uses it; an edged that runs does too"
        )
        yield "error" if config.is_file() else "warning", str(error), fix
        return
    yield "ok", f"{config.device} {stream.about}", ""
    stream.close()


class _Capture:
    """What a camera and a file have in common: an open `cv2.VideoCapture`."""

    def __init__(self, device: str | int, backend: int, shown: str) -> None:
        wrong = fault(str(device))
        if wrong is not None:
            raise StreamLost(": ".join(wrong))
        self._shown = shown
        self._capture = cv2.VideoCapture(device, backend)
        if not self._capture.isOpened():
            self._capture.release()
            raise StreamLost(f"{shown} cannot be opened as video: does something else use it, is it a video at all?")

    def number(self, key: int) -> float:
        """A property of the open stream, 0 where it does not say."""
        value = self._capture.get(key)
        return value if math.isfinite(value) and value > 0 else 0.0

    def size(self) -> str:
        """Its width and height for people."""
        width, height = self.number(cv2.CAP_PROP_FRAME_WIDTH), self.number(cv2.CAP_PROP_FRAME_HEIGHT)
        return f"{width:.0f}x{height:.0f}"

    def retrieve(self) -> Image:
        """The grabbed frame's pixels."""
        done, image = self._capture.retrieve()
        if not done or image is None or image.size == 0:
            raise CorruptFrame(self._shown)
        if image.ndim == 2:  # an infrared camera
            image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
        return image  # type: ignore[return-value]  # OpenCV converts to 8 bits a channel

    def close(self) -> None:
        """Let go of the device."""
        self._capture.release()


class _Camera(_Capture):
    """A V4L2 device."""

    def __init__(self, config: CameraSource) -> None:
        device = config.device
        super().__init__(int(device) if device.isdigit() else device, cv2.CAP_V4L2, f"camera {device}")
        # The pixel format first: it decides which sizes and rates the camera has.
        wishes = {
            cv2.CAP_PROP_FOURCC: cv2.VideoWriter.fourcc(*config.fourcc) if config.fourcc else None,
            cv2.CAP_PROP_FRAME_WIDTH: config.width,
            cv2.CAP_PROP_FRAME_HEIGHT: config.height,
            cv2.CAP_PROP_FPS: config.fps,
        }
        for key, wish in wishes.items():
            if wish is not None:
                self._capture.set(key, wish)
        if unmet := [key for key, wish in wishes.items() if wish is not None and abs(self.number(key) - wish) > 0.5]:
            names = {
                cv2.CAP_PROP_FOURCC: "fourcc",
                cv2.CAP_PROP_FRAME_WIDTH: "width",
                cv2.CAP_PROP_FRAME_HEIGHT: "height",
            }
            asked = ", ".join(names.get(key, "fps") for key in unmet)
            log.warning("camera %s does not do the wished %s: it gives %s", device, asked, self._given())
        self.about = f"gives {self._given()}"

    def _given(self) -> str:
        code = int(self.number(cv2.CAP_PROP_FOURCC))
        fourcc = "".join(chr(code >> shift & 0xFF) for shift in (0, 8, 16, 24)).strip("\0 ") or "an unnamed format"
        return f"{self.size()} at {self.number(cv2.CAP_PROP_FPS):.3g} frames/s, {fourcc}"

    def grab(self) -> bool:
        """Wait for the next frame."""
        if not self._capture.grab():
            raise StreamLost("the camera gives no frame: is it unplugged, or does its cable or supply fail?")
        return True


class _File(_Capture):
    """A video file at its own pace: what a camera that saw this would give."""

    def __init__(self, config: CameraSource, clock: Clock, dropped: threading.Event) -> None:
        super().__init__(config.device, cv2.CAP_ANY, f"file {config.device}")
        self._loop, self._clock, self._dropped = config.loop, clock, dropped
        rate = self.number(cv2.CAP_PROP_FPS)
        self._interval_s = 1 / (rate if 0 < rate <= FILE_FPS_MAX else FILE_FPS)
        self._due = clock.monotonic()
        self._frames = 0  # since its beginning
        self.about = f"gives {self.size()} at {1 / self._interval_s:.3g} frames/s{', again and again' * self._loop}"

    def grab(self) -> bool:
        """Wait until the next frame is due."""
        if self._dropped.wait(self._clock.real(max(0.0, self._due - self._clock.monotonic()))):
            return False
        if not self._capture.grab():
            return self._at_its_end()
        self._frames += 1
        self._due = max(self._due + self._interval_s, self._clock.monotonic() - BEHIND_S_MAX)
        return True

    def _at_its_end(self) -> bool:
        if not self._frames:
            raise StreamLost(f"{self._shown} has no frame that can be decoded: is it whole?")
        if not self._loop:
            raise StreamEnded
        self._frames = 0
        self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
        return False
