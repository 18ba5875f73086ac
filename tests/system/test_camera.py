"""`edged run` with a camera: a video file through the code that reads one, its frames through a real model."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path
from typing import Any

import cv2

from edged.wire.messages import Event, InferReply, Partial, Result
from tests.support.babble import PROMPT, make_babbler
from tests.support.device import Bus, Device, tables, until
from tests.support.models import HARD_WORK, PLAIN, SIDE, STRANGE, grey, make_release
from tests.system.broker import Broker

FPS = 25


def film(path: Path, frames: int, value: int = PLAIN, fps: int = FPS) -> Path:
    """A video of so many frames of one grey value."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, (SIDE, SIDE))
    assert writer.isOpened()
    for _ in range(frames):
        writer.write(grey(value))
    writer.release()
    return path


def watching(folder: Path, broker: Broker, seed: Path, device: Path, **source: Any) -> dict[str, Any]:
    """A device whose only pipeline is `gate`, with a camera."""
    base = tables(folder, "dev1", broker, seed)
    line = base["pipelines"]["line"]
    base["pipelines"] = {"gate": {**line, "source": {"type": "camera", "device": device, **source}}}
    return base


def numbers(bus: Bus) -> list[int]:
    """The numbers of the frames that were answered, in the order of their answers."""
    return [int(result.item.removeprefix("gate-")) for result in bus.of(Result, "dev1")]


def settled(device: Device) -> dict[str, Any]:
    """The stream's status after its end, with nothing in hand any more."""
    status = device.wait(
        "the end, and nothing in hand",
        lambda s: s["streams"]["gate"]["state"] == "ended" and not s["streams"]["gate"]["frames_in_hand"],
    )
    stream: dict[str, Any] = status["streams"]["gate"]
    return stream


def test_every_frame_is_answered_or_counted_as_skipped(tmp_path: Path, broker: Broker, bus: Bus, toy: Path) -> None:
    with Device(tmp_path, watching(tmp_path, broker, toy, film(tmp_path / "film.avi", 50))) as device:
        stream = settled(device)
        assert stream["frames_read"] == 50
        assert stream["frames_answered"] + stream["frames_skipped"] == 50
        assert stream["frames_answered"] >= 1
        until("all results", lambda: len(numbers(bus)) == stream["frames_answered"])
        answers = bus.of(Result, "dev1")
        assert all(answer.prediction[0].label == "cat" and answer.error is None for answer in answers)
        assert numbers(bus) == sorted(set(numbers(bus)))

        status = device.status()
        assert status is not None
        assert status["sources_alive"]
        assert status["counters"]["frames_read"] == 50
        assert status["counters"].get("frames_skipped", 0) == stream["frames_skipped"]
        assert "pipeline_faults" not in status["counters"]
        assert "has come to its end: no more frames" in device.log()
        until("its event", lambda: [e for e in bus.of(Event) if e.kind == "stream_ended"])
        assert device.stop() == 0


def test_a_slow_model_sees_the_newest_frames_not_the_oldest(tmp_path: Path, broker: Broker, bus: Bus) -> None:
    make_release(tmp_path / "slow", "slow@1.0", products=HARD_WORK)  # tenths of a second of work for each
    endless = watching(tmp_path, broker, tmp_path / "slow", film(tmp_path / "film.avi", 100), loop=True)
    with Device(tmp_path, endless) as device:
        status = device.wait("twelve answers", lambda s: s["streams"]["gate"]["frames_answered"] >= 12)
        stream = status["streams"]["gate"]
        answers = stream["frames_answered"]
        assert stream["frames_read"] == answers + stream["frames_skipped"] + stream["frames_in_hand"]
        assert answers < stream["frames_read"] / 2, "this model is not slow: nothing is shown"
        until("their results", lambda: len(numbers(bus)) >= answers)
        answered = numbers(bus)[:answers]
        # Whatever was queued would have been the first frames, one after the other.
        gaps = [after - before for before, after in itertools.pairwise(answered)]
        assert sum(gap > 1 for gap in gaps) > len(gaps) / 2
        assert answered[-1] > stream["frames_read"] / 2


def test_a_long_generation_costs_the_camera_beside_it_no_frame(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    make_babbler(tmp_path / "babbler")  # which talks for half a minute
    plan = watching(tmp_path, broker, toy, film(tmp_path / "film.avi", 40, fps=5), loop=True)
    plan["slots"]["tongue"] = {"seed": tmp_path / "babbler", "probation_s": 0.5}
    plan["pipelines"]["chat"] = {"slot": "tongue", "task": "generate", "source": {"type": "mqtt"}}

    def skipped_of(device: Device, frames: int) -> int:
        begin = device.wait("frames", lambda s: s["streams"]["gate"]["frames_read"])["streams"]["gate"]
        target = begin["frames_read"] + frames
        end = device.wait(f"{frames} frames", lambda s: s["streams"]["gate"]["frames_read"] >= target)
        return int(end["streams"]["gate"]["frames_skipped"] - begin["frames_skipped"])

    with Device(tmp_path, plan) as device:
        usual = skipped_of(device, 30)
        request = bus.ask("dev1", "chat", generation_prompt=PROMPT, stream=True)
        until("its first words", lambda: [part for part in bus.of(Partial) if part.request == request])
        beside = skipped_of(device, 30)
        assert not [reply for reply in bus.of(InferReply) if reply.request == request], "it was to be at work all along"
        assert beside <= usual + 1


def test_the_frame_that_the_model_is_unsure_of_becomes_a_sample_of_its_pixels(
    tmp_path: Path, broker: Broker, toy: Path
) -> None:
    with Device(
        tmp_path, watching(tmp_path, broker, toy, film(tmp_path / "film.avi", 10, STRANGE), loop=True, fps_max=10)
    ) as device:
        device.wait("two samples", lambda s: s["samples"].get("escalated", 0) >= 2)
        row = json.loads(device.cli("samples", "list", "--json").stdout)[0]
        assert row["item"].startswith("gate-")
        status = device.wait("again and again", lambda s: s["streams"]["gate"]["frames_read"] > 30)
        assert status["streams"]["gate"]["state"] == "streaming"
        assert status["streams"]["gate"]["frames_skipped"] > 0  # more come than fps_max
        kept = [path.read_bytes() for path in (device.state_dir / "blobs").rglob("*") if path.is_file()]
        assert all(data.startswith(b"\xff\xd8") for data in kept)  # JPEG


def test_a_camera_that_is_not_there_is_said_and_used_when_it_comes(
    tmp_path: Path, broker: Broker, bus: Bus, toy: Path
) -> None:
    path = tmp_path / "later.avi"
    with Device(tmp_path, watching(tmp_path, broker, toy, path, loop=True)) as device:
        status = device.counted("stream_failures", 2)
        assert status["streams"]["gate"]["state"] == "lost"
        assert status["streams"]["gate"]["why"].startswith(f"{path} does not exist: plug the camera in")
        said = [line for line in device.log().splitlines() if "does not exist" in line]
        assert ["event stream_lost" in line for line in said].count(False) == 1, (
            "one warning, however often it is tried"
        )
        assert status["sources_alive"]
        assert any("gives no frames" in problem["text"] for problem in status["health"]["problems"])
        film(tmp_path / "film.avi", 50).rename(path)
        device.counted("streams_recovered")
        until("results", lambda: len(numbers(bus)) > 3)
        until("two events", lambda: len(bus.of(Event, "dev1")) >= 2)
        assert [e.kind for e in bus.of(Event, "dev1")] == ["stream_lost", "stream_recovered"]
        assert device.signal(signal.SIGTERM) == 0


def test_check_finds_a_camera_that_does_not_open(tmp_path: Path, broker: Broker, toy: Path) -> None:
    broken = tmp_path / "text.mp4"
    broken.write_text("no film " * 100)
    for path, said in ((broken, "cannot be opened as video"), (tmp_path / "none.mp4", "does not exist")):
        checked = Device(tmp_path, watching(tmp_path, broker, toy, path)).cli("check")
        assert checked.returncode != 0
        assert said in checked.stdout
    checked = Device(tmp_path, watching(tmp_path, broker, toy, film(tmp_path / "film.avi", 5))).cli("check")
    assert f"{SIDE}x{SIDE} at {FPS} frames/s" in checked.stdout
