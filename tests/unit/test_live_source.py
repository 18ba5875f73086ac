"""A live source with a camera made of a queue: what is skipped, what is counted, how it is lost and comes back."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest

from edged.core import lag
from edged.core.backoff import RECONNECT_S_MAX, STEADY_S, failures_after, reconnect_s
from edged.core.cadence import Cadence
from edged.core.redact import redact
from edged.sources import live
from edged.sources.stream import StreamLost
from tests.support.cameras import (
    CORRUPT,
    CORRUPT_PIXELS,
    END,
    FRAME,
    HANG,
    LATE,
    TIMEOUT_S,
    Bench,
    until,
)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    made.source.start()
    yield made
    made.camera.let_go.set()
    made.source.stop()


# Pure decisions.


@pytest.mark.parametrize(
    ("failures", "draw", "seconds"),
    [(1, 0, 1), (2, 0, 2), (3, 0, 4), (5, 0, 16), (6, 0, 30), (7, 0, 30), (9999, 0, 30), (1, 1, 0.5), (3, 0.5, 3)],
)  # fmt: skip
def test_attempts_come_ever_more_seldom_up_to_a_limit(failures: int, draw: float, seconds: float) -> None:
    assert reconnect_s(failures, draw) == seconds <= RECONNECT_S_MAX


@pytest.mark.parametrize(
    ("before", "flowed_s", "after"), [(0, 0, 1), (4, 0, 5), (4, STEADY_S - 1, 5), (4, STEADY_S, 1)]
)
def test_only_a_stream_that_flowed_for_a_while_begins_anew(before: int, flowed_s: float, after: int) -> None:
    assert failures_after(before, flowed_s) == after


@pytest.mark.parametrize(
    ("fps_max", "fps", "taken"),
    [
        (None, 30, 300),
        (30, 30, 300),
        (10, 30, 100),
        (10, 25, 100),
        (7, 30, 70),
        (1, 30, 10),
        (60, 30, 300),
        (0.5, 30, 5),
    ],
)
def test_the_rate_is_kept_on_average_whatever_the_camera_does(fps_max: float | None, fps: float, taken: int) -> None:
    cadence, count = Cadence(1 / fps_max if fps_max else 0.0), 0
    rng = np.random.default_rng(1)
    for number in range(300 if fps == 30 else 250):
        now = 50 + number / fps + rng.uniform(-0.1, 0.1) / fps
        if cadence.wants(now):
            cadence, count = cadence.taken(now), count + 1
    assert abs(count - taken) <= 1


def test_the_lag_is_what_a_frame_comes_later_than_the_promptest() -> None:
    now, said = None, []
    for at, media_s in [(100.0, 0.0), (100.1, 0.2), (100.4, 0.4), (101.7, 0.6), (101.8, 1.8), (105.0, 2.0)]:
        now = lag.read(now, at, media_s)
        said.append(round(now.now_s, 3))
    assert said == [0.0, 0.0, 0.1, 1.2, 0.1, 3.1]


def test_clocks_that_drift_apart_are_no_lag() -> None:
    now, worst = None, 0.0
    for second in range(100_000):  # a day, and a camera that loses five seconds in it
        now = lag.read(now, second, second * (1 - 5e-5))
        worst = max(worst, now.now_s)
    assert worst < 0.01
    assert lag.read(now, 100_002, 100_000 * (1 - 5e-5)).now_s > 1.9


def test_nothing_is_made_up_for_after_a_pause() -> None:
    cadence = Cadence(0.1).taken(10.0)
    late = cadence.taken(100.0)
    assert not late.wants(100.01)
    assert late.wants(100.1)
    assert not Cadence(0.0).resting(5.0).wants(4.99)
    assert Cadence(0.0).resting(5.0).wants(5.0)


@pytest.mark.parametrize(
    "url",
    ["rtsp://admin:s3cret@10.0.0.7/a", "rtsp://h/user=admin_password=s3cret_1.sdp", "RTSP://h:1/?p=s3cret"],
)
def test_no_part_of_a_streams_address_is_said(url: str) -> None:
    said = redact(f"[Errno 1] cannot open: '{url}' twice")
    assert "s3cret" not in said
    assert said.startswith("[Errno 1] cannot open: '")


# What becomes of frames.


def test_only_what_can_be_begun_with_is_handed_on_and_the_rest_is_skipped(bench: Bench) -> None:
    bench.camera.give(*[FRAME] * 6)
    assert [item.name for item in bench.items] == ["gate-1", "gate-2"]
    assert bench.frames() == {"in_hand": 2, "skipped": 4}
    bench.items[0].settle("")
    bench.camera.give(FRAME, FRAME)
    assert [item.name for item in bench.items] == ["gate-1", "gate-2", "gate-7"]  # the newest, not the third
    assert bench.frames() == {"answered": 1, "in_hand": 2, "skipped": 5}
    for item in bench.items:
        item.settle("")
        item.settle("")  # once more says nothing new
    assert bench.frames() == {"answered": 3, "skipped": 5}
    assert bench.counters == {"frames_read": 8, "frames_skipped": 5}


def test_an_item_is_the_frame_with_its_time_and_an_id_of_its_own(bench: Bench) -> None:
    bench.camera.give(FRAME, FRAME)
    first, second = bench.items
    assert first.frame is not None
    assert first.frame.shape == (2, 4, 3)
    assert (first.image, first.captured) == (b"", bench.clock.now())
    assert first.id != second.id
    assert bench.source.status()["frame_age_s"] == 0.0
    bench.clock.time += 3
    assert bench.source.status()["frame_age_s"] == 3.0


def test_without_a_model_or_room_frames_are_skipped_and_none_waits(bench: Bench) -> None:
    bench.model = False
    bench.camera.give(*[FRAME] * 3)
    assert bench.frames() == {"skipped": 3}
    bench.model, bench.full = True, True
    bench.camera.give(*[FRAME] * 3)
    assert bench.frames() == {"skipped": 6}
    bench.full = False
    bench.camera.give(FRAME)
    assert bench.frames() == {"in_hand": 1, "skipped": 6}


def test_no_more_than_fps_max() -> None:
    bench = Bench(fps_max=2)
    bench.source.start()
    for _ in range(20):
        bench.camera.give(FRAME)
        while bench.items and bench.source.status()["frames_in_hand"]:
            bench.items[-1].settle("")
        bench.clock.time += 0.1
    assert [item.name for item in bench.items] == ["gate-1", "gate-5", "gate-10", "gate-15", "gate-20"]
    bench.source.stop()


def test_after_a_rejected_frame_comes_a_rest(bench: Bench) -> None:
    bench.camera.give(FRAME)
    bench.items[0].settle("release toy@1.0 is no detector")
    bench.camera.give(*[FRAME] * 3)
    assert bench.frames() == {"rejected": 1, "skipped": 3}
    bench.clock.time += live.REJECTED_REST_S
    bench.camera.give(FRAME)
    assert bench.frames() == {"rejected": 1, "skipped": 3, "in_hand": 1}


def test_what_is_corrupt_is_counted_and_the_next_frame_is_taken(bench: Bench) -> None:
    bench.camera.give(CORRUPT, CORRUPT_PIXELS, FRAME)
    assert bench.frames() == {"corrupt": 2, "in_hand": 1}
    assert bench.counters == {"frames_corrupt": 2, "frames_read": 1}
    assert bench.camera.opened == 1


# Losing and finding it.


def test_a_lost_stream_is_said_once_and_tried_ever_more_seldom_until_it_comes_back(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bench.camera.give(FRAME)
    bench.state("streaming")
    bench.camera.unplugged = StreamLost("no such device: plug it in")
    bench.camera.give(StreamLost("the camera gives no frame"))
    until("seven attempts", lambda: len(bench.clock.pauses()) >= 7)
    assert bench.clock.pauses()[:7] == [1, 2, 4, 8, 16, 30, 30]
    status = bench.state("lost")
    assert (status["why"], status["times_lost"]) == ("no such device: plug it in", 1)
    assert bench.source.alive()
    assert [p.text for p in live.problems({"gate": bench.source})] == [
        "gate: camera 7 gives no frames: no such device: plug it in"
    ]

    bench.clock.time += 90
    bench.camera.unplugged = None
    bench.camera.give(FRAME)
    bench.state("streaming")
    assert not list(live.problems({"gate": bench.source}))
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said == [
        ("INFO", "gate: camera 7: gives 4x2"),
        ("WARNING", "gate: camera 7: the camera gives no frame; trying again in 1.0 s, then ever more seldom"),
        ("INFO", "gate: camera 7: no such device: plug it in; still trying"),
        ("INFO", "gate: camera 7: gives 4x2"),
        ("INFO", "gate: camera 7: frames come again after 90 s"),
    ]
    assert [kind for kind, _ in bench.events] == ["stream_lost", "stream_recovered"]
    assert bench.counters["streams_lost"] == bench.counters["streams_recovered"] == 1
    assert bench.counters["stream_failures"] >= 7
    assert bench.camera.closed == bench.camera.opened - 1 == 1


def test_a_camera_that_is_not_there_at_the_start_is_used_when_it_comes() -> None:
    bench = Bench()
    bench.camera.unplugged = StreamLost("no such device")
    bench.source.start()
    assert bench.state("lost")["why"] == "no such device"
    bench.camera.unplugged = None
    bench.camera.give(FRAME)
    bench.state("streaming")
    assert len(bench.items) == 1
    bench.source.stop()


def test_a_library_that_hangs_is_left_and_the_stream_opened_anew(bench: Bench) -> None:
    bench.camera.give(FRAME)
    bench.state("streaming")
    bench.camera.script.put(HANG)
    until("it hangs", lambda: bench.camera.script.empty())
    bench.clock.time += TIMEOUT_S - 1
    assert bench.source.status()["state"] == "streaming"
    bench.clock.time += 1 + live.GRACE_S + 0.1
    until("opened again", lambda: bench.camera.opened == 2)
    assert bench.source.status()["why"] == "no frame for 6 s"
    bench.camera.give(FRAME)
    bench.state("streaming")
    # What the hung one then returns with is no frame of this stream any more.
    bench.camera.let_go.set()
    until("the hung thread ends", lambda: bench.camera.closed == 1)
    assert bench.frames() == {"in_hand": 2}


def test_no_more_than_so_many_threads_hang(bench: Bench) -> None:
    for number in range(1, live.HUNG_MAX + 1):
        until("opened", lambda: bench.camera.opened == number)  # noqa: B023  # called at once
        bench.camera.script.put(HANG)
        until("it hangs", lambda: bench.camera.script.empty())
        bench.clock.time += live.OPENING * TIMEOUT_S + 2 * live.GRACE_S
    until("it waits", lambda: "still hang in the library" in bench.source.status()["why"])
    opened = bench.camera.opened
    until("a few more attempts", lambda: bench.counters["stream_failures"] > live.HUNG_MAX + 3)
    assert opened == bench.camera.opened == live.HUNG_MAX
    bench.camera.let_go.set()
    bench.camera.give(FRAME)
    bench.state("streaming")


def test_a_stop_does_not_wait_for_a_library_that_hangs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "STOP_S_MAX", 0.05)
    bench = Bench()
    bench.source.start()
    bench.camera.script.put(HANG)
    until("it hangs", lambda: bench.camera.script.empty())
    bench.source.stop()
    assert "its library does not return: its thread is left behind" in caplog.text
    assert not bench.source.alive()
    bench.camera.let_go.set()
    until("closed", lambda: bench.camera.closed == 1)
    assert not bench.items


def test_a_bug_costs_one_attempt_and_no_secret(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.camera.give(RuntimeError("at rtsp://admin:s3cret@10.0.0.7/live"), FRAME)
    bench.state("streaming")
    assert bench.counters["source_faults"] == 1
    assert "RuntimeError: at rtsp://***" in caplog.text
    assert "s3cret" not in caplog.text + str(bench.events) + str(bench.source.status())


def test_an_event_that_cannot_be_kept_does_not_end_the_source(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_kind: str, _text: str) -> None:
        raise RuntimeError("disk")

    object.__setattr__(bench.source.feed, "say", broken)
    bench.camera.give(StreamLost("gone"), FRAME)
    bench.state("streaming")
    assert bench.source.alive()
    assert bench.counters["source_faults"] >= 1


def test_an_end_is_no_loss(bench: Bench) -> None:
    bench.camera.give(FRAME, END)
    assert bench.state("ended")["why"] == "the stream has come to its end"
    assert bench.source.alive()
    assert bench.camera.opened == bench.camera.closed == 1
    assert [kind for kind, _ in bench.events] == ["stream_ended"]
    assert bench.counters["streams_ended"] == 1
    assert "streams_lost" not in bench.counters
    assert not list(live.problems({"gate": bench.source}))


def test_the_keeper_beats_while_it_lives(bench: Bench) -> None:
    bench.camera.give(FRAME)
    bench.clock.time += live.STILL_S_MAX - 1
    until("a beat", lambda: bench.source.status()["state"] == "lost")  # silent for long, but the keeper moves
    bench.clock.time += 2
    until("it beats", lambda: not bench.beats.stalled())
    bench.source.stop()
    bench.clock.time += 10 * live.STILL_S_MAX
    assert not bench.beats.stalled()


def test_a_late_frame_counts_as_skipped(bench: Bench) -> None:
    bench.camera.give(FRAME, LATE, LATE, FRAME)
    assert bench.frames() == {"in_hand": 2, "skipped": 2}
