"""A real RTSP server on loopback, GStreamer's, as a process of its own that can be stopped dead and started again.

Run by Debian's own Python, which has GStreamer's bindings (packaging/setup.sh installs them: python3-gi,
gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-good and -bad), this file is the server; imported, it is what starts it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

PYTHON = "/usr/bin/python3"
SIZE = (64, 64)  # what test models see
FPS = 20
# A keyframe every half second, and no frames that wait for later ones: as cameras do it.
PIPELINE = (
    "( videotestsrc is-live=true pattern={pattern} ! video/x-raw,width={width},height={height},framerate={fps}/1 "
    "! openh264enc gop-size=10 complexity=low slice-mode=n-slices num-slices=4 ! h264parse "
    "! video/x-h264,alignment=nal ! breakmydata probability={broken} skip=2000 "
    "! rtph264pay name=pay0 pt=96 config-interval=-1 )"
)
PATH = "/live"


class RtspServer:
    """`with RtspServer(folder) as server:` serves moving pictures at `server.url`; `user` and `password`: only to them.

    `broken`: the share of bytes that arrive damaged. The port stays the same over `kill9` and `start`.
    """

    def __init__(self, folder: Path, *, user: str = "", password: str = "", broken: float = 0.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "rtsp-server.log"
        self._user, self._password, self._broken = user, password, broken
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """The stream's address, without credentials."""
        return f"rtsp://127.0.0.1:{self.port}{PATH}"

    def start(self) -> None:
        """Start the server and wait until it listens."""
        assert self._process is None, "already running"
        command = [PYTHON, __file__, str(self.port), str(self._broken), self._user, self._password]
        with self._log.open("a") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("port "):
            self._end(signal.SIGKILL)
            raise RuntimeError(f"the RTSP server did not start: {self._log.read_text()[-2000:]}")
        self.port = int(line.split()[1])

    def kill9(self) -> None:
        """End it as a power cut at the camera would, but with its connections closed by the kernel."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """It keeps its connections and says nothing any more."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=10)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def __enter__(self) -> RtspServer:
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._end(signal.SIGKILL)


def serve(port: int, broken: float, user: str, password: str) -> None:
    """Be the server, for ever; says `port N` when it listens."""
    import gi  # type: ignore[import-not-found,unused-ignore]

    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, Gst, GstRtspServer  # type: ignore[import-not-found,unused-ignore]

    Gst.init(None)
    server = GstRtspServer.RTSPServer(address="127.0.0.1", service=str(port))
    factory = GstRtspServer.RTSPMediaFactory(shared=True)
    factory.set_launch(PIPELINE.format(pattern="ball", width=SIZE[0], height=SIZE[1], fps=FPS, broken=broken))
    if user:
        auth = GstRtspServer.RTSPAuth()
        token = GstRtspServer.RTSPToken()
        token.set_string("media.factory.role", "viewer")
        auth.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
        server.set_auth(auth)
        factory.add_role_from_structure(
            Gst.Structure.new_from_string(
                "viewer, media.factory.access=(boolean)true, media.factory.construct=(boolean)true"
            )
        )
    server.get_mount_points().add_factory(PATH, factory)
    if not server.attach(None):
        raise SystemExit(f"port {port} of 127.0.0.1 is taken")
    print(f"port {server.get_bound_port()}", flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    serve(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4])
