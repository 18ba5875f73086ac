"""`edged run` with a network camera: GStreamer's RTSP server on loopback, killed, frozen, and with a password."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.wire.messages import Event, Result
from tests.support.device import WAIT_S, Bus, Device, tables, toml, until
from tests.support.rtsp_server import RtspServer
from tests.system.broker import Broker

SECRET = "s3cr:t"
QUOTED = "s3cr%3At"


def watching(folder: Path, broker: Broker, seed: Path, url: str, **source: Any) -> dict[str, Any]:
    """A device whose only pipeline is `gate`, with a network camera."""
    base = tables(folder, "dev1", broker, seed)
    line = base["pipelines"]["line"]
    base["pipelines"] = {"gate": {**line, "source": {"type": "rtsp", "url": url, "timeout_s": 2.0, **source}}}
    return base


def flows(device: Device, frames: int = 10, seconds: float = WAIT_S) -> dict[str, Any]:
    """The status once so many more frames have been answered."""
    status = device.status()
    before = status["streams"]["gate"]["frames_answered"] if status else 0
    return device.wait(
        f"{frames} more frames", lambda s: s["streams"]["gate"]["frames_answered"] >= before + frames, seconds
    )


def accounted(status: dict[str, Any]) -> bool:
    """Whether every frame that was read is somewhere."""
    stream = status["streams"]["gate"]
    parts = ("frames_skipped", "frames_answered", "frames_rejected", "frames_in_hand")
    return bool(stream["frames_read"] == sum(stream[part] for part in parts))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RtspServer]:
    with RtspServer(tmp_path / "rtsp") as running:
        yield running


def test_frames_flow_again_after_the_server_was_killed_and_started(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path, server: RtspServer
) -> None:
    # As long as a busy machine may keep frames waiting: the end of the server is seen at once, whatever this is.
    with Device(tmp_path, watching(tmp_path, broker, toy, server.url, timeout_s=10.0)) as device:
        before = flows(device)
        assert accounted(before)
        assert (
            before["streams"]["gate"] | {"state": "streaming", "why": "", "times_lost": 0} == before["streams"]["gate"]
        )
        until("results", lambda: len(bus.of(Result, "dev1")) >= 10)
        assert all(result.prediction[0].label == "cat" for result in bus.of(Result, "dev1"))

        server.kill9()
        lost = device.counted("stream_failures", 3)
        assert lost["counters"]["streams_lost"] == 1
        assert lost["streams"]["gate"]["state"] == "lost"
        assert "nothing listens at 127.0.0.1" in lost["streams"]["gate"]["why"]
        assert any("gives no frames" in problem["text"] for problem in lost["health"]["problems"])
        assert not lost["streams"]["gate"]["frames_in_hand"]

        server.start()
        after = device.counted("streams_recovered")
        flows(device)
        assert (after["pid"], after["boot"]) == (before["pid"], before["boot"])
        assert accounted(after)
        until("its event", lambda: [event for event in bus.of(Event, "dev1") if event.kind == "stream_recovered"])
        said = [event.kind for event in bus.of(Event, "dev1") if event.kind.startswith("stream")]
        assert said == ["stream_lost", "stream_recovered"]
        assert device.log().count("trying again in") == 1
        ids = [result.item for result in bus.of(Result, "dev1")]
        assert len(ids) == len(set(ids))
        assert device.stop() == 0


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_server_that_says_nothing_any_more_is_left_and_found_again(
    tmp_path: Path, broker: Broker, toy: Path, server: RtspServer, transport: str
) -> None:
    with Device(tmp_path, watching(tmp_path, broker, toy, server.url, transport=transport, timeout_s=1.0)) as device:
        counters = flows(device)["counters"]
        server.freeze()
        lost = device.counted("streams_lost", counters.get("streams_lost", 0) + 1)
        assert lost["streams"]["gate"]["state"] == "lost"
        server.thaw()
        device.counted("streams_recovered", lost["counters"].get("streams_recovered", 0) + 1)
        flows(device)


def test_a_stop_does_not_wait_for_a_server_that_says_nothing(
    tmp_path: Path, broker: Broker, toy: Path, server: RtspServer
) -> None:
    with Device(tmp_path, watching(tmp_path, broker, toy, server.url, timeout_s=600.0)) as device:
        flows(device)
        server.freeze()
        assert device.signal(signal.SIGTERM) == 0
        assert "its thread is left behind" in device.log()


def test_the_password_is_needed_and_shown_nowhere(tmp_path: Path, broker: Broker, bus: Bus, toy: Path) -> None:
    def secrets_in(text: str) -> list[str]:
        return [word for word in (SECRET, QUOTED, "wr0ng", "adm1n") if word in text]

    with RtspServer(tmp_path / "rtsp", user="adm1n", password=SECRET) as server:
        wrong = server.url.replace("//", "//adm1n:wr0ng@")
        with Device(tmp_path, watching(tmp_path, broker, toy, wrong)) as device:
            status = device.counted("stream_failures", 2)
            assert "refuses the user name or password" in status["streams"]["gate"]["why"]
            assert not status["streams"]["gate"]["frames_read"]
            checked = device.cli("check")
            assert "refuses the user name or password" in checked.stdout
            assert not secrets_in(json.dumps(status) + device.log() + checked.stdout + checked.stderr)
        right = server.url.replace("//", f"//adm1n:{QUOTED}@")
        with Device(tmp_path, watching(tmp_path, broker, toy, right)) as device:
            status = flows(device)
            checked = device.cli("check")
            assert f"rtsp://127.0.0.1:{server.port} gives h264 64x64" in checked.stdout
            shown = device.cli("status").stdout + device.cli("status", "--json").stdout
            assert not secrets_in(json.dumps(status) + device.log() + shown + checked.stdout + checked.stderr)
    assert not secrets_in(" ".join(message.model_dump_json() for _, _, message in bus.heard))


def test_a_corrected_password_is_used_without_a_restart(tmp_path: Path, broker: Broker, toy: Path) -> None:
    with RtspServer(tmp_path / "rtsp", user="adm1n", password=SECRET) as server:
        wrong, right = (server.url.replace("//", f"//adm1n:{word}@") for word in ("wr0ng", QUOTED))
        with Device(tmp_path, watching(tmp_path, broker, toy, wrong)) as device:
            before = device.counted("streams_lost")
            device.config.write_text(toml(watching(tmp_path, broker, toy, right)))
            after = device.wait(
                "ten frames of the new stream", lambda s: s["streams"].get("gate", {}).get("frames_answered", 0) > 10
            )
            assert after["pid"] == before["pid"]
            assert not [word for word in (SECRET, QUOTED, "wr0ng") if word in device.log() + json.dumps(after)]


def test_what_arrives_damaged_is_counted_and_the_whole_frames_are_answered(
    tmp_path: Path, broker: Broker, toy: Path
) -> None:
    with (
        RtspServer(tmp_path / "rtsp", broken=0.005) as server,
        Device(tmp_path, watching(tmp_path, broker, toy, server.url)) as device,
    ):
        device.counted("frames_corrupt", 3)
        status = flows(device, 5)
        assert status["streams"]["gate"]["frames_corrupt"] >= 3
        assert accounted(status)
        assert "source_faults" not in status["counters"]


def test_a_path_that_is_not_there_is_said(tmp_path: Path, broker: Broker, toy: Path, server: RtspServer) -> None:
    with Device(tmp_path, watching(tmp_path, broker, toy, server.url.replace("/live", "/dead"))) as device:
        status = device.counted("streams_lost")
        assert "correct the path in `url`" in status["streams"]["gate"]["why"]
