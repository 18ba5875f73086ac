"""L5 with real processes: a stream that stays as it is alarms nobody; one that changes is found, told to people, trained
for and answered with a release that all devices run.

Mosquitto, `trainer serve`, three devices and a responder are what they are in the demo, with its models. Their clock on
the wall is set from outside, an hour at a time: hours and looks are what they are in a plant, and the test takes minutes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import func, select

from bench.crash_disturb import Clock
from bench.demo.line import RESPONDER, TRAINER, Line, write_toml
from bench.demo.prepare import DIGITS, REDUCED, SCORE, Assets, prepare
from bench.demo.scenes import LABELS, Scene, make_scenes
from bench.demo.stream import Feeder
from tests.unit.test_notices import Hook
from trainer.config import load_config
from trainer.database import Database, detections, devices, jobs, looks, measured, rollouts

ROOT = Path(__file__).parents[2]
HOUR = 3600
PERIOD = 3  # hours: of the baseline, of a window, between two looks
DEVICES = ("cam1", "cam2", "cam3")
QUIET, SHIFTED = 60, 84  # frames an hour, of all devices
CYCLE_S_MAX = 1500.0
T = TypeVar("T")


def until(what: str, found: Callable[[], T | None], line: Line, seconds: float = 120.0) -> T:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        line.check()
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)
    return value


@pytest.fixture
def hook() -> Iterator[Hook]:
    found = Hook()
    yield found
    found.close()


@dataclass
class Plant:
    """The line at work, the clock of all of it, and what its trainer has in its database."""

    line: Line
    clock: Clock
    feeder: Feeder
    database: Database
    offset: int
    fed: int = 0

    def rows(self, table: Any) -> list[Any]:
        with self.database.read() as connection:
            return list(connection.execute(select(table)))

    def answered(self) -> int:
        with self.database.read() as connection:
            query = select(func.sum(measured.c["items"])).where(measured.c.pipeline == "inspect")
            return int(connection.execute(query).scalar() or 0)

    def hour(self, scenes: list[Scene]) -> None:
        """An hour of these frames; when it is over the trainer has every window of it."""
        # Each frame is several messages, and a broker keeps only so many (max_queued_messages) for a trainer that lags.
        self.feeder.feed("drift", scenes, rate=10.0)
        self.fed += len(scenes)
        until(f"{self.fed} answers are counted", lambda: self.answered() >= self.fed, self.line, 300)
        self.offset += HOUR
        self.clock.set(self.offset)

    def period(self, shift: str | None, frames: int, seed: int) -> None:
        for hour in range(PERIOD):
            self.hour(make_scenes("stream", frames, seed + hour, shift, DIGITS))

    def looked(self, times: int) -> list[Any]:
        """The looks, once the trainer has looked so many hours after the beginning."""

        def last() -> list[Any]:
            return [row for row in self.rows(looks) if row.at > time.time() + self.offset - HOUR]

        return until(f"look {times}", last, self.line)

    def active(self) -> dict[str, str]:
        return {row.device: row.models["digits"]["active"] for row in self.rows(devices) if row.device in DEVICES
                and "digits" in row.models}  # fmt: skip


def start(folder: Path, line: Line, assets: Assets, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> Plant:
    line.start_broker(DEVICES)
    clock = Clock(folder / "offset", random.Random(0))
    offset = int(-time.time() % HOUR) + 300  # five minutes past the hour: a test does not take the other fifty-five
    clock.set(offset)
    for name, value in clock.env.items():
        monkeypatch.setenv(name, value)
    path = trainer_config(line, assets, hook)
    trust = line.make_keys(path)
    for release in (assets.base, assets.teacher):
        line.trainer(path, "release", "add", str(release))
    line.start_trainer(path)
    delivery = {"window_s": 1.0, "retry_s": 10.0}
    line.start_device(RESPONDER, {
        "device": {"tier": "tier2"}, "slots": {"digits-teacher": {"seed": str(assets.teacher)}},
        "responders": {"larger": {"tier": "tier2", "task": "detect", "slot": "digits-teacher"}}, "trust": trust,
    })  # fmt: skip
    inboxes = {name: line.folder / name / "in" for name in DEVICES}
    for name, inbox in inboxes.items():
        line.start_device(name, {
            "slots": {"digits": {"seed": str(assets.base), "probation_s": 3.0}},
            "pipelines": {"inspect": {
                "slot": "digits", "escalate_to": "tier2",
                "source": {"type": "directory", "path": str(inbox), "after": "delete"},
                "policy": {"target_risk": 0.15, "dedupe_s": 0.0, "messages_per_minute": 6000},
            }},
            "delivery": delivery, "trust": trust,
        })  # fmt: skip
    plant = Plant(line, clock, Feeder(inboxes), Database(load_config(path).database_at), offset)
    until("all run the first release", lambda: plant.active() == dict.fromkeys(DEVICES, "digits@1.0"), line)
    return plant


def trainer_config(line: Line, assets: Assets, hook: Hook) -> Path:
    tls = line.tls(TRAINER)
    return write_toml(line.folder / TRAINER / "trainer.toml", {
        "name": TRAINER, "site": "line1", "data_dir": str(line.folder / TRAINER / "data"), "command_resend_s": 5.0,
        "broker": {"host": "127.0.0.1", "port": line.broker_port, **tls},
        "http": {"host": "127.0.0.1", "port": 0, **tls},
        "notify": {"urls": [hook.url]},
        "drift": dict.fromkeys(("check_s", "window_s", "baseline_s", "cycle_s"), PERIOD * HOUR),
        "triggers": {"cron": ""},  # nothing but drift can call
        "models": {"digits": {
            "checkpoint": str(assets.checkpoint), "labels": list(LABELS), "imgsz": 160,
            "replay": str(assets.replay), "holdout": str(assets.holdout),
            "holdout_clean": str(assets.holdout_clean), "calibration": str(assets.calibration),
            "epochs": REDUCED.epochs, "lr": 0.004, "batch": 16, "replay_ratio": 0.6, "score": SCORE, "seed": 1,
            "threshold": 100_000, "minimum_interval_s": 600.0, "target_risk": 0.15,
            "lora": {"r": 16, "lora_alpha": 32}, "split_block_s": 0.5, "split_guard_s": 0.0,
        }},
        # On a machine that does other work the canary's time is no word about its release.
        "rollout": {"watch_s": 8.0, "items_min": 24, "audits_planned": 0, "install_s_max": 120.0, "latency_factor": 10.0,
                    "extend_max": 10},
    })  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_l5_drift_is_found_told_trained_for_and_answered_and_a_steady_stream_alarms_nobody(
    tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = prepare(ROOT / "build" / "demo-cache", tmp_path / "data", 1, "mix", REDUCED, print, "stream")
    with Line(tmp_path / "line", ROOT / "build" / "venv-device" / "bin" / "python") as line:
        plant = start(tmp_path, line, assets, hook, monkeypatch)
        for number in range(3):  # the baseline, then two windows that are like it
            plant.period(None, QUIET, 100 * number)
            (look,) = plant.looked(number)
            assert [each for each in look.found if each["found"]] == []
        rule = look.found[0]
        assert min(rule["evidence"][part]["items"] for part in ("baseline", "window")) >= 100, "it had enough to judge"
        assert (plant.rows(detections), plant.rows(jobs), hook.said) == ([], [], [])

        plant.period("mix", SHIFTED, 1000)
        found = until("drift is found", lambda: plant.rows(detections), line)
        rules = {row.rule: row for row in found}
        assert {row.release for row in found} == {"digits@1.0"}
        evidence = rules["escalation_rate"].evidence
        assert evidence["window"]["rate"] > 2 * evidence["baseline"]["rate"]
        until("people are told", lambda: [m for m in hook.said if "escalation rate" in m["message"]], line)

        job = until("a training begins", lambda: plant.rows(jobs), line)[0]
        assert (job.reason, job.target) == ("drift", "digits@1.1")
        assert len(job.manifest["samples"]) >= 10
        until("people are told of it", lambda: [m for m in hook.said if m["message"].endswith("samples: drift")], line)
        until("it is trained and judged", lambda: plant.rows(rollouts) or ended(plant), line, CYCLE_S_MAX)
        assert ended(plant) == ""
        frames = make_scenes("after", 600, 7, "mix", DIGITS)
        until("the rollout is done", lambda: rolled_out(plant, frames), line, CYCLE_S_MAX)
        assert plant.active() == dict.fromkeys(DEVICES, "digits@1.1")
        assert len(plant.rows(jobs)) == 1
        plant.database.close()


def ended(plant: Plant) -> str:
    """Why the training came to nothing; empty as long as it did not."""
    (job,) = plant.rows(jobs)
    return f"{job.status}: {job.detail}" if job.status in ("refused", "failed") else ""


def rolled_out(plant: Plant, frames: list[Scene]) -> bool:
    """Let the devices work on, a second's frames at a time, until the rollout has ended."""
    plant.feeder.feed("drift", [frames.pop() for _ in range(min(8, len(frames)))], rate=8.0)
    (rollout,) = plant.rows(rollouts)
    assert rollout.phase not in ("aborted", "held"), rollout
    return bool(rollout.phase == "done")
