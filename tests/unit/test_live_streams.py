"""Live streams from files: a video through the camera's code, a stream through PyAV; and their configuration."""

from __future__ import annotations

import re
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from pydantic import SecretStr

from edged.config import ConfigError, load
from edged.config_sources import CameraSource, RtspSource
from edged.sources import Item, rtsp
from edged.sources.camera import findings as camera_findings
from edged.sources.camera import open_camera
from edged.sources.rtsp import findings as rtsp_findings
from edged.sources.rtsp import open_rtsp, shown
from edged.sources.stream import LateFrame, StreamLost
from tests.support.cameras import (
    TIMEOUT_S,
    Bench,
    HandClock,
    until,
)

# Video files through the camera's code.


def video(path: Path, frames: int = 12, fps: float = 200) -> Path:
    """A film whose frames become lighter."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, (32, 24))
    assert writer.isOpened()
    for number in range(frames):
        writer.write(np.full((24, 32, 3), 20 * number, np.uint8))
    writer.release()
    return path


def watched(device: Path | str | int, **config: Any) -> tuple[Bench, CameraSource]:
    """A bench with the camera's own code in the place of the fake one."""
    bench, wanted = Bench(), CameraSource(device=str(device), **config)
    bench.source._open = lambda dropped: open_camera(wanted, bench.clock, dropped)
    return bench, wanted


def test_a_video_file_gives_every_frame_and_ends(tmp_path: Path) -> None:
    bench, _ = watched(video(tmp_path / "film.avi"))
    bench.clock.real = lambda seconds: 0.0  # type: ignore[method-assign]  # as fast as it can be read
    pixels = []

    def take(item: Item) -> bool:
        assert item.frame is not None
        pixels.append(int(item.frame[12, 16, 0]))
        item.settle("")
        return True

    object.__setattr__(bench.source.feed, "offer", take)
    bench.source.start()
    bench.state("ended")
    assert bench.frames() == {"answered": 12}
    assert np.allclose(pixels, range(0, 240, 20), atol=4)
    bench.source.stop()


def test_a_video_file_is_read_at_its_own_pace(tmp_path: Path) -> None:
    clock, dropped = HandClock(), threading.Event()
    stream = open_camera(CameraSource(device=str(video(tmp_path / "film.avi", fps=10))), clock, dropped)
    assert "32x24 at 10 frames/s" in stream.about
    for _ in range(5):
        assert stream.grab()
    assert np.allclose(clock.waits, [0, 0.1, 0.2, 0.3, 0.4])  # the clock stands still: each is due later
    clock.time += 60  # it was held up: what it has missed is not made up for but for a second
    for _ in range(7):
        stream.grab()
    assert clock.waits[-6:] == [0.0] * 6
    dropped.set()
    assert not stream.grab()
    stream.close()


def test_a_video_file_starts_over_when_it_is_told_to(tmp_path: Path) -> None:
    bench, _ = watched(video(tmp_path / "film.avi"), loop=True)
    bench.clock.real = lambda seconds: 0.0005  # type: ignore[method-assign]
    bench.source.start()
    until("thrice through", lambda: bench.source.status()["frames_read"] > 3 * 12)
    assert bench.source.status()["state"] == "streaming"
    bench.source.stop()
    assert bench.counters["streams_lost"] == 0


def test_what_is_no_video_or_no_camera_is_said_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no film " * 100)
    whole = video(tmp_path / "whole.avi").read_bytes()
    (tmp_path / "half.avi").write_bytes(whole[:200])
    for device, said in (
        (tmp_path / "none.mp4", "none.mp4 does not exist: plug the camera in, or correct `device` (cameras here: "),
        (99, "/dev/video99 does not exist"),
        ("/dev/video99", "/dev/video99 does not exist"),
        (tmp_path, "is neither a camera nor a video file: correct `device`"),
        ("/dev/null", "camera /dev/null cannot be opened as video"),
        (tmp_path / "text.mp4", "cannot be opened as video"),
        (tmp_path / "half.avi", "half.avi "),
    ):
        bench, config = watched(device)
        bench.source.start()
        assert said in bench.state("lost")["why"]
        bench.source.stop()
        if not str(device).endswith("half.avi"):
            (finding,) = camera_findings(config)
            assert finding[0] in ("error", "warning")
            assert said.split(":")[0] in finding[1]
            assert finding[2]
    ((level, text, _),) = camera_findings(CameraSource(device=str(tmp_path / "whole.avi")))
    assert level == "ok"
    assert "32x24 at 200 frames/s" in text


# A stream through PyAV, from a file instead of a server.


@pytest.fixture
def network_camera(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RtspSource, HandClock]:
    """Sixty frames at 20 a second, a keyframe every half second."""
    path = tmp_path / "stream.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=20, options={"tune": "zerolatency", "g": "10", "sc_threshold": "0"}
        )
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(60):
            pixels = np.full((64, 64, 3), 4 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="bgr24")))
        container.mux(stream.encode())
    monkeypatch.setattr(rtsp, "shown", lambda config: "rtsp://h:554")
    return RtspSource.model_construct(url=SecretStr(str(path)), transport="tcp", timeout_s=TIMEOUT_S), HandClock()


def test_what_is_decoded_too_late_is_left_out_up_to_the_next_keyframe(
    network_camera: tuple[RtspSource, HandClock], caplog: pytest.LogCaptureFixture
) -> None:
    config, clock = network_camera
    stream, late, light = open_rtsp(config, clock, threading.Event()), [], {}
    for number in range(60):
        clock.time = 50 + number / 20 + (1.5 if 20 <= number < 35 else 0)
        try:
            assert stream.grab()
            light[number] = int(stream.retrieve().mean())
        except LateFrame:
            late.append(number)
    assert late == [*range(21, 30), *range(31, 40)]
    assert all(abs(value - 4 * number) < 6 for number, value in light.items())
    assert caplog.text.count("keyframes only, until it has caught up") == 1
    stream.close()


def test_a_stream_that_is_hopelessly_late_is_opened_anew(network_camera: tuple[RtspSource, HandClock]) -> None:
    config, clock = network_camera
    stream = open_rtsp(config, clock, threading.Event())
    assert stream.grab()
    clock.time += 60
    with pytest.raises(StreamLost, match="60 s late: too large for this device or its network: use the camera's sub-"):
        stream.grab()
    stream.close()


def test_a_stream_that_its_server_ends_is_lost(network_camera: tuple[RtspSource, HandClock]) -> None:
    config, clock = network_camera
    stream = open_rtsp(config, clock, threading.Event())
    for _ in range(60):
        stream.grab()
    with pytest.raises(StreamLost, match="the server has ended the stream"):
        stream.grab()
    stream.close()


# Configuration.

CONFIG = """
[device]
id = "dev1"
[slots.eye]
[pipelines.gate]
slot = "eye"
source = {{ {} }}
{}
"""


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("type = 'camera'", "pipelines.gate.source.device is missing: add it"),
        (
            "type = 'camera', device = ''",
            "pipelines.gate.source.device = '': must be a camera, as \"/dev/video0\" or 0",
        ),
        ("type = 'camera', device = -1", "pipelines.gate.source.device = -1: must be a camera"),
        ("type = 'camera', device = 'rtsp://h/a'", 'is an address: a network camera is type = "rtsp" with url'),
        ("type = 'camera', device = 0, loop = true", "loop = true: '0' is a camera, only a video file has an end"),
        (
            "type = 'camera', device = 'a.mp4', width = 64",
            "width: 'a.mp4' is a video file and has its own: remove width",
        ),
        ("type = 'camera', device = 0, fourcc = 'MJPEG'", "pipelines.gate.source.fourcc = 'MJPEG': "),
        (
            "type = 'camera', device = 0, fps_max = 0",
            "pipelines.gate.source.fps_max = 0: Input should be greater than 0",
        ),
        (
            "type = 'camera', device = 0, timeout_s = 0",
            "pipelines.gate.source.timeout_s = 0: Input should be greater than 0",
        ),
        ("type = 'rtsp', url = 'http://admin:s3cret@h/'", "is no address of a stream: write rtsp://user:password@"),
        ("type = 'rtsp', url = 'rtsp://admin:s3cret/x@h/'", "is no address of a stream"),
        ("type = 'rtsp', url = 'rtsp://admin:s3cret x@h/'", "what is special in a user or password"),
        ("type = 'rtsp', url = 'rtsp://h:99999/'", "is no address of a stream"),
        ("type = 'rtsp', url = 'rtsp://h/', transport = 'http'", "pipelines.gate.source.transport = 'http': "),
    ],
)
def test_what_is_wrong_in_the_configuration_is_named(tmp_path: Path, source: str, said: str) -> None:
    path = tmp_path / "edged.toml"
    path.write_text(CONFIG.format(source, ""))
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert said in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_every_key_of_a_live_source_is_in_the_example() -> None:
    text = (Path(__file__).parents[2] / "docs" / "edged.example.toml").read_text()
    tables = tomllib.loads(re.sub(r"(?m)^# (?=[a-z_]+ = |\[)", "", text))["pipelines"]
    for name, section in (("gate", CameraSource), ("yard", RtspSource)):
        assert tables[name]["source"].keys() == section.model_fields.keys()
        section(**tables[name]["source"])


def test_a_live_source_has_no_queue(tmp_path: Path) -> None:
    path = tmp_path / "edged.toml"
    path.write_text(CONFIG.format("type = 'camera', device = 0", "queue_max = 8"))
    with pytest.raises(ConfigError, match="queue_max: of a live source only the newest frame counts, none waits"):
        load(path)


def test_a_changed_password_shows_in_the_dumped_configuration_and_no_password_does() -> None:
    dumps = [RtspSource(url=f"rtsp://admin:{word}@h/a").model_dump(mode="json")["url"] for word in ("s3cret", "other")]  # type: ignore[arg-type]
    assert dumps[0] != dumps[1]
    assert all(dump.startswith("rtsp://h:554 (#") and "s3cret" not in dump for dump in dumps)
    assert shown(RtspSource(url="rtsp://admin:s3cret@h:99/password=s3cret")) == "rtsp://h:99"  # type: ignore[arg-type]


def test_the_package_for_rtsp_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    ((level, text, fix),) = rtsp_findings(RtspSource(url="rtsp://127.0.0.1/a"))  # type: ignore[arg-type]
    assert (level, fix) == ("error", "pip install 'edged[rtsp]'")
    assert "av" in text
