"""A network camera: an RTSP stream, decoded by PyAV."""

from __future__ import annotations

import logging
import socket
import threading
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from edged.clock import Clock, SystemClock
from edged.config_sources import RtspSource
from edged.core import lag
from edged.core.redact import redact
from edged.engines.base import Image
from edged.sources.stream import CorruptFrame, LateFrame, StreamLost

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.packet import Packet

log = logging.getLogger(__name__)

PORT = 554
CONNECT_S = 5.0  # for `edged check`
ANALYSE_S = 0.2  # how long FFmpeg looks at a stream before it gives the first frame
REORDER_S = 0.3  # over UDP, how long a packet that overtook another waits for it
LATE_S_MAX = 1.0  # a frame that much later than the promptest is not decoded, nor is any until a keyframe that is not
HOPELESS_S = 30.0  # a stream that much late is opened anew, which brings it up to date


def open_rtsp(config: RtspSource, clock: Clock, dropped: threading.Event) -> _Rtsp:
    """Connect, describe, play; raises StreamLost with the fix. Its waits end by its timeout, not by `dropped`."""
    return _Rtsp(config, clock)


def shown(config: RtspSource) -> str:
    """The stream's address for people: its host and port. Some cameras want user and password in the path."""
    return "rtsp://{}:{}".format(*_address(config))


def missing() -> tuple[str, str] | None:
    """Why no RTSP stream can be read on this machine, and the fix."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        return f"the package av cannot be imported ({error})", "pip install 'edged[rtsp]'"
    return None


def findings(config: RtspSource) -> Iterator[tuple[str, str, str]]:
    """What `edged check` finds: level, text, fix."""
    wrong = missing()
    if wrong is not None:
        yield "error", *wrong
        return
    host, port = _address(config)
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        yield (
            "warning",
            f"{host}:{port}: {error}",
            "see that the camera is on, and that host and port in `url` are right",
        )
        return
    try:
        stream = _Rtsp(config, SystemClock())
    except StreamLost as error:
        yield "error", f"{shown(config)}: {error}", "correct `url`"
        return
    yield "ok", f"{shown(config)} {stream.about}", ""
    stream.close()


def _address(config: RtspSource) -> tuple[str, int]:
    where = urlsplit(config.url.get_secret_value())
    assert where.hostname is not None, "the configuration refuses such an address"
    return where.hostname, where.port or PORT


class _Rtsp:
    """An open stream."""

    def __init__(self, config: RtspSource, clock: Clock) -> None:
        wrong = missing()
        if wrong is not None:
            raise StreamLost(": ".join(wrong))
        import av
        from av.video.reformatter import VideoReformatter

        self._config, self._clock, self._errors = config, clock, av.error.FFmpegError
        self._lag: lag.Lag | None = None
        self._catching_up, self._said_late = False, False
        # Little is held back at the beginning, and nothing later. Not `nobuffer`: it throws the first keyframe away, and the
        # next may be ten seconds off. Not `low_delay`: frames that refer to later ones would come in the wrong order.
        options = {
            "rtsp_transport": config.transport,
            "allowed_media_types": "video",
            "fpsprobesize": "0",
            "analyzeduration": str(int(ANALYSE_S * 1e6)),
            "max_delay": str(int(REORDER_S * 1e6)),
        }
        began = self._clock.monotonic()
        try:
            self._container: InputContainer = av.open(
                config.url.get_secret_value(), options=options, timeout=(config.timeout_s, config.timeout_s)
            )
        except (av.error.FFmpegError, OSError) as error:
            raise StreamLost(_reason(error, config, self._clock.monotonic() - began)) from None
        if not self._container.streams.video:
            self._container.close()
            raise StreamLost("the stream has no video: correct the path in `url`")
        video = self._container.streams.video[0]
        self._reformatter = VideoReformatter()
        self._packets: Iterator[Packet[av.VideoStream]] = self._container.demux(video)
        self._frames: deque[av.VideoFrame] = deque()
        self._frame: av.VideoFrame | None = None
        self.about = f"gives {video.codec_context.name} {video.codec_context.width}x{video.codec_context.height}"

    def grab(self) -> bool:
        """Wait for the next frame; false after a packet without one."""
        if not self._frames:
            packet = self._next()
            if self._late(packet):
                raise LateFrame
            self._decode(packet)
        if not self._frames:
            return False
        self._frame = self._frames.popleft()
        if self._frame.is_corrupt:
            raise CorruptFrame
        return True

    def _next(self) -> Packet[av.VideoStream]:
        began = self._clock.monotonic()
        try:
            packet = next(self._packets, None)
        except (self._errors, OSError) as error:
            raise StreamLost(_reason(error, self._config, self._clock.monotonic() - began)) from None
        if packet is None or packet.size == 0:
            raise StreamLost("the server has ended the stream: does it restart, or does it take no further viewer?")
        return packet

    def _late(self, packet: Packet[av.VideoStream]) -> bool:
        """Whether this frame is better left out: what waits behind it is newer, and the next keyframe needs none before."""
        stamp = packet.pts if packet.dts is None else packet.dts
        if stamp is None or packet.time_base is None:
            return False
        self._lag = lag.read(self._lag, self._clock.monotonic(), float(stamp * packet.time_base))
        late_s = self._lag.now_s
        if late_s > HOPELESS_S:
            raise StreamLost(
                f"the frames are {late_s:.0f} s late: too large for this device or its network: use the camera's sub-stream"
            )
        if late_s > LATE_S_MAX or packet.is_keyframe:
            self._catching_up = late_s > LATE_S_MAX
        if self._catching_up and not self._said_late:
            self._said_late = True
            log.warning("%s: frames come faster than they are decoded here: keyframes only, until it has caught up",
                        shown(self._config))  # fmt: skip
        return self._catching_up and not packet.is_keyframe

    def _decode(self, packet: Packet[av.VideoStream]) -> None:
        try:
            self._frames.extend(packet.decode())
        except self._errors:
            raise CorruptFrame from None

    def retrieve(self) -> Image:
        """The grabbed frame's pixels."""
        assert self._frame is not None, "grab first"
        try:
            pixels = self._reformatter.reformat(self._frame, format="bgr24").to_ndarray()
        except (self._errors, ValueError):
            raise CorruptFrame from None
        return cast("Image", pixels)  # bgr24 is 8 bits a channel

    def close(self) -> None:
        """Say goodbye to the server."""
        self._container.close()


def _reason(error: Exception, config: RtspSource, took_s: float) -> str:
    """Why the stream cannot be had, with the fix, without secrets."""
    import av

    at = "{}:{}".format(*_address(config))
    if isinstance(error, av.error.HTTPUnauthorizedError | av.error.HTTPForbiddenError):
        return "the server refuses the user name or password: correct them in `url`"
    if isinstance(error, av.error.HTTPNotFoundError):
        return "the server has no such stream: correct the path in `url`"
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens at {at}: is the camera on, and the port right?"
    # FFmpeg says of a timeout now that it was asked to exit, now that the data are invalid.
    if isinstance(error, av.error.ExitError | TimeoutError) or took_s >= config.timeout_s:
        return f"no answer from {at} for {config.timeout_s:g} s"
    text = getattr(error, "strerror", None) or type(error).__name__
    return redact(f"{at}: {text}")
