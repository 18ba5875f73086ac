"""The demo's course: prepare, stream, let the loop turn, stream again, judge."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import select

from bench.demo import phi, report
from bench.demo.line import RESPONDER, SITE, TRAINER, Line, LineError, write_toml
from bench.demo.prepare import DIGITS, SCORE, Assets, Plan, prepare
from bench.demo.report import Check
from bench.demo.scenes import LABELS, Scene, make_scenes
from bench.demo.stream import PIPELINE, Feeder, Judged, Observer, Score, Scorer, score_engine
from trainer.candidate import detector
from trainer.config import TrainerConfig, load_config
from trainer.database import Database, jobs, rollouts
from trainer.releases import Registry, read_manifest
from trainer.rollouts import progress
from trainer.status import job_status

DEVICES = ("cam1", "cam2", "cam3")
LANGUAGE_DEVICE = "cam1"
SLOT, TEACHER_SLOT = "digits", "digits-teacher"
TIER = "tier2"
TARGET_RISK = 0.15  # an accepted answer (all boxes of a frame) may be wrong with this probability, before and after
SPARE = 400  # frames that flow while the trainer works and the canary is watched
TRAINING_S_MAX = 900.0
CANDIDATES_MAX = 3  # the gate may refuse one by a class that lost; the trainer goes on with more samples
ROLLOUT_S_MAX = 300.0
REGAINED_MIN = 0.7  # of the way from the accuracy before to the teacher's
FALL_MIN = 0.5  # of the escalation rate


class Demo:
    """One run. `run` returns whether every check passed."""

    def __init__(
        self, work: Path, cache: Path, device_python: Path, seed: int, shift: str, ablate: str, plan: Plan
    ) -> None:
        self._work, self._cache, self._device_python = work, cache, device_python
        self._seed, self._shift, self._ablate, self._plan = seed, shift, ablate, plan
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}

    def run(self) -> bool:
        """Everything, from models to report."""
        with self._stage("prepare models and data"):
            assets = prepare(self._cache, self._work / "data", self._seed, self._shift, self._plan, self._say)
        with Line(self._work / "line", self._device_python) as line:
            with self._stage("start the line"):
                config = self._start(line, assets)
            with Observer(line.observer()) as observer:
                feeder = Feeder({name: self._work / "line" / name / "in" for name in DEVICES})
                scorer = Scorer(feeder, observer, LABELS)
                return self._loop(line, assets, config, observer, feeder, scorer)

    # The line.

    def _start(self, line: Line, assets: Assets) -> TrainerConfig:
        line.start_broker(DEVICES)
        path = self._trainer_config(line, assets)
        trust = line.make_keys(path)
        for release in (assets.base, assets.teacher, assets.phi, assets.adapter):
            line.trainer(path, "release", "add", str(release))
        line.start_trainer(path)
        responder = {
            "device": {"tier": TIER},
            "slots": {TEACHER_SLOT: {"seed": str(assets.teacher)}},
            "responders": {"larger": {"tier": TIER, "task": "detect", "slot": TEACHER_SLOT}},
            "trust": trust,
        }
        comment = (
            "The responder. In a plant this is a GPU host with a larger network in this slot; here it is a network of the "
            "same size that has seen more."
        )
        line.start_device(RESPONDER, responder, comment)
        for name in DEVICES:
            slots: dict[str, Any] = {SLOT: {"seed": str(assets.base), "probation_s": 3.0}}
            pipelines: dict[str, Any] = {
                PIPELINE: {
                    "slot": SLOT, "results": "durable", "escalate_to": TIER,
                    "source": {"type": "directory", "path": str(self._work / "line" / name / "in"), "after": "delete"},
                    # A shift of work passes in minutes: limits by the clock would only measure the clock.
                    "policy": {"target_risk": TARGET_RISK, "dedupe_s": 0.0, "messages_per_minute": 6000},
                }
            }  # fmt: skip
            if name == LANGUAGE_DEVICE:
                slots["phi"] = {"seed": str(assets.phi), "probation_s": 3.0}
                pipelines["ask"] = {"slot": "phi", "task": "generate", "source": {"type": "mqtt"}}
            delivery = {"window_s": 2.0, "retry_s": 10.0}
            line.start_device(name, {"slots": slots, "pipelines": pipelines, "delivery": delivery, "trust": trust})
        return load_config(path)

    def _trainer_config(self, line: Line, assets: Assets) -> Path:
        plan, tls = self._plan, line.tls(TRAINER)
        return write_toml(self._work / "line" / TRAINER / "trainer.toml", {
            "name": TRAINER,
            "site": SITE,
            "data_dir": str(self._work / "line" / TRAINER / "data"),
            "command_resend_s": 5.0,
            "broker": {"host": "127.0.0.1", "port": line.broker_port, **tls},
            "http": {"host": "127.0.0.1", "port": 0, **tls},
            "models": {SLOT: {
                "checkpoint": str(assets.checkpoint), "labels": list(LABELS), "imgsz": 160,
                "replay": str(assets.replay), "holdout": str(assets.holdout),
                "holdout_clean": str(assets.holdout_clean), "calibration": str(assets.calibration),
                "epochs": plan.epochs, "lr": 0.004, "batch": 16, "replay_ratio": 0.6, "score": SCORE,
                "seed": self._seed, "threshold": plan.threshold,
                # What lacks a part of the loop is refused once and for all; else more samples are another chance.
                "minimum_interval_s": 3600.0 if self._ablate else 0.0,
                "label_confidence_min": 0.5, "target_risk": TARGET_RISK, "ablate": self._ablate,
                "lora": {"r": 16, "lora_alpha": 32},
                # A stream of half a minute, whose frames are drawn one by one: neighbours in time have nothing in common.
                "split_block_s": 0.5, "split_guard_s": 0.0,
            }},
            # A minute of a few devices brings no 400 audits: the canary is judged by what it escalates, and how it runs.
            "rollout": {
                "watch_s": plan.watch_s, "items_min": plan.items_min, "audits_planned": 0, "install_s_max": 120.0,
            },
        })  # fmt: skip

    # The course.

    def _loop(
        self, line: Line, assets: Assets, config: TrainerConfig, observer: Observer, feeder: Feeder, scorer: Scorer
    ) -> bool:
        plan = self._plan
        ready = observer.wait_for(lambda: self._all_run(observer, "digits@1.0"), 60, line.check)
        if not ready:
            raise LineError(f"not every device runs digits@1.0 after 60 s: {self._active(observer)}")
        clean, before, after, idle = self._scenes()
        language = self._ask(observer)
        with self._stage("clean frames"):
            self._feed(feeder, observer, line, "clean", clean)
        with self._stage("the stream shifts"):
            self._feed(feeder, observer, line, "before", before)
        with self._stage("adapter of the language model"):
            self._swap_adapter(observer, line)
            adapted = self._ask(observer)
        with self._stage("train, export, gate"), self._trickle(feeder, idle, plan.rate_idle, "training"):
            job = self._wait_for_job(config, line)
        rolled = None
        if job["status"] not in ("refused", "failed"):
            with self._stage("canary and rollout"), self._trickle(feeder, idle[::-1], plan.rate, "rollout"):
                rolled = self._wait_for_rollout(config, observer, line)
        if rolled is not None and rolled["status"] == "done":
            with self._stage("frames after"):
                self._feed(feeder, observer, line, "after", after)
        observer.wait_for(lambda: not scorer.missing(), 60, line.check)
        with self._stage("score"):
            return self._finish(assets, config, observer, feeder, scorer, job, rolled, language, adapted)

    def _scenes(self) -> tuple[list[Scene], list[Scene], list[Scene], list[Scene]]:
        """Clean frames, then shifted ones before, after and meanwhile: one distribution, and frames after show digits
        that no frame before did, because what comes before trains."""
        plan = self._plan
        clean = make_scenes("stream", plan.frames_clean, self._seed + 31, None, DIGITS)
        before = make_scenes("stream", plan.frames_before + SPARE, self._seed + 32, self._shift, DIGITS)
        after = make_scenes("after", plan.frames_after, self._seed + 33, self._shift, DIGITS)
        return clean, before[: plan.frames_before], after, before[plan.frames_before :]

    def _feed(self, feeder: Feeder, observer: Observer, line: Line, phase: str, scenes: Sequence[Scene]) -> None:
        names = feeder.feed(phase, scenes, self._plan.rate)
        wanted = set(names)
        if not observer.wait_for(lambda: wanted <= observer.results.keys(), 60, line.check):
            lost = sorted(wanted - observer.results.keys())
            self._say(f"{len(lost)} frames of phase {phase} are not answered yet, the first is {lost[0]}")

    @contextmanager
    def _trickle(self, feeder: Feeder, scenes: Sequence[Scene], rate: float, phase: str) -> Iterator[None]:
        """Frames go on at `rate` while the block runs, from the start again when they are used up."""
        stop = threading.Event()

        def feed() -> None:
            while not stop.is_set():
                feeder.feed(phase, scenes, rate, lambda: not stop.is_set())

        thread = threading.Thread(target=feed, name="trickle", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _wait_for_job(self, config: TrainerConfig, line: Line) -> dict[str, Any]:
        """The first training that passes the gate; the last that was refused where none of CANDIDATES_MAX did."""
        deadline, shown = time.monotonic() + TRAINING_S_MAX, ""
        refused: set[str] = set()
        while True:
            line.check()
            job = self._latest_job(config)
            text = self._job_text(job)
            if text != shown:
                self._say(text)
                shown = text
            if job is not None and job["status"] == "refused":
                refused.add(job["job_id"])
                if self._ablate or len(refused) == CANDIDATES_MAX:
                    return job
            if job is not None and job["status"] in ("failed", "rolling_out", "complete", "released"):
                return job
            if job is not None and job["deployment"]["status"] != "none":
                return job
            if time.monotonic() > deadline:
                if job is not None and job["status"] == "refused":
                    return job
                raise LineError(f"no training finished within {TRAINING_S_MAX:.0f} s; the job: {job}")
            time.sleep(1)

    @staticmethod
    def _job_text(job: dict[str, Any] | None) -> str:
        if job is None:
            return "trainer: waiting for enough labelled samples"
        training = job.get("training") or {}
        epoch = f", epoch {training['epoch']}/{training['epochs']}" if "epoch" in training else ""
        stage = f": {training['stage']}{epoch}" if training.get("stage") else ""
        return f"trainer: job {job['target_model']} {job['status']}{stage}" + (f": {job['reason']}" if job["reason"] and
                                                                            job["status"] != "training" else "")  # fmt: skip

    def _latest_job(self, config: TrainerConfig) -> dict[str, Any] | None:
        with Database(config.database_at).read() as connection:
            row = connection.execute(select(jobs).order_by(jobs.c.created.desc())).first()
            return job_status(connection, config, row) if row is not None else None

    def _wait_for_rollout(self, config: TrainerConfig, observer: Observer, line: Line) -> dict[str, Any]:
        deadline, shown = time.monotonic() + ROLLOUT_S_MAX, ""
        while True:
            line.check()
            with Database(config.database_at).read() as connection:
                row = connection.execute(select(rollouts).order_by(rollouts.c.created.desc())).first()
                rolled = progress(connection, row) if row is not None else None
            if rolled is not None:
                text = f"rollout {rolled['release']}: {rolled['status']}, {rolled['progress']} {rolled['reason']}"
                if text != shown:
                    self._say(text)
                    shown = text
                if rolled["status"] in ("done", "aborted", "held"):
                    return rolled
            if time.monotonic() > deadline:
                raise LineError(
                    f"the rollout did not end within {ROLLOUT_S_MAX:.0f} s: {rolled}; {self._active(observer)}"
                )
            time.sleep(1)

    # The language model.

    def _ask(self, observer: Observer) -> list[str]:
        replies = [observer.ask(LANGUAGE_DEVICE, "ask", example.prompt) for example in phi.EXAMPLES]
        return [
            "" if reply is None else (reply.generated_response or f"error: {reply.error}").strip() for reply in replies
        ]

    def _swap_adapter(self, observer: Observer, line: Line) -> None:
        path = self._work / "line" / TRAINER / "trainer.toml"
        line.trainer(path, "fleet", "set", LANGUAGE_DEVICE, "--model", "phi=phi@1.0", "--adapter", "phi=phi-style@1.0")

        def there() -> bool:
            models = observer.reported[LANGUAGE_DEVICE].models
            return "phi" in models and models["phi"].adapter == "phi-style@1.0"

        if not observer.wait_for(there, 60, line.check):
            self._say(f"the adapter is not there after 60 s: {observer.reported[LANGUAGE_DEVICE].models.get('phi')}")

    # The outcome.

    def _finish(
        self, assets: Assets, config: TrainerConfig, observer: Observer, feeder: Feeder, scorer: Scorer,
        job: dict[str, Any], rolled: dict[str, Any] | None, language: list[str], adapted: list[str],
    ) -> bool:  # fmt: skip
        before, after = scorer.judged(["before"]), scorer.judged(["after"])
        scenes = [f.scene for f in feeder.frames.values() if f.phase in ("before", "after")]
        with detector(assets.teacher, read_manifest(assets.teacher)) as teacher:
            ceiling = score_engine(teacher, scenes, read_manifest(assets.teacher).thresholds.score)
        released = rolled["release"] if rolled else None
        swaps = self._swaps(observer, released) if released else {}
        missing = scorer.missing()
        out: dict[str, Any] = {
            "shift": self._shift,
            "seed": self._seed,
            "ablate": self._ablate,
            "target_risk": TARGET_RISK,
            **_totals(scorer.total(before), "before"),
            **_totals(scorer.total(after), "after"),
            "accuracy_teacher": _number(ceiling.f1),
            "frames_in": len(feeder.frames),
            "frames_out": len(feeder.frames) - len(missing),
            "frames_lost": len(missing),
            "frames_repeated": observer.repeated,
            "frames_failed": len(scorer.failed()),
            "labels_used": job["metrics"]["samples_used"] if rolled else 0,
            "canary": {
                "devices": rolled["canary"] if rolled else [],
                "result": rolled["canary_result"] if rolled else None,
                "reason": rolled["reason"] if rolled else job["reason"],
            },
            "release_before": "digits@1.0",
            "release_after": released,
            "job": job,
            "devices": {name: self._device(name, scorer, observer, before, after, swaps) for name in DEVICES},
            "language": {
                "device": LANGUAGE_DEVICE,
                "adapter": observer.reported[LANGUAGE_DEVICE].models["phi"].adapter,
                "examples": [
                    {
                        "prompt": e.prompt,
                        "base": b,
                        "adapted": a,
                        "expected_base": e.base,
                        "expected_adapted": e.adapter,
                    }
                    for e, b, a in zip(phi.EXAMPLES, language, adapted, strict=True)
                ],
            },
            "seconds": {**self._seconds, "all": time.monotonic() - self._started},
        }
        checks = list(self._checks(out, job, rolled))
        out["checks"] = [{"name": c.name, "passed": c.passed, "text": c.text} for c in checks]
        figures = {"curves": report.curves(scorer.judged(), ("digits@1.0", released))}
        if released:
            new = Registry(config.releases).get(released)
            old = read_manifest(assets.base)
            with detector(assets.base, old) as old_engine, detector(new.folder, new.manifest) as new_engine:
                figures["examples"] = report.examples(before, old_engine, new_engine, new.manifest.thresholds.score)
        report.write(self._work, out, figures)
        report.table(out)
        return all(check.passed for check in checks)

    def _swaps(self, observer: Observer, release: str) -> dict[str, float]:
        """When each device first reported that it runs `release`."""
        swaps: dict[str, float] = {}
        for at, device, reported in observer.history:
            model = reported.models.get(SLOT)
            if model is not None and model.active == release:
                swaps.setdefault(device, at)
        return swaps

    def _device(
        self, name: str, scorer: Scorer, observer: Observer, before: list[Judged], after: list[Judged],
        swaps: dict[str, float],
    ) -> dict[str, Any]:  # fmt: skip
        versions = list(dict.fromkeys(row.result.release for row in scorer.judged() if row.frame.device == name))
        reported = [r.models[SLOT] for _, device, r in observer.history if device == name and SLOT in r.models]
        swap_ms = next((model.swap_ms for model in reversed(reported) if model.swap_ms is not None), None)
        return {
            "versions": versions,
            "swap_ms": swap_ms,
            "swapped_at": swaps.get(name),
            **_totals(scorer.total([row for row in before if row.frame.device == name]), "before"),
            **_totals(scorer.total([row for row in after if row.frame.device == name]), "after"),
        }

    def _checks(self, out: dict[str, Any], job: dict[str, Any], rolled: dict[str, Any] | None) -> Iterator[Check]:
        yield Check("released", rolled is not None, f"release {out['release_after']} passed the gate" if rolled
                    else f"no release: {job['status']}: {job['reason']}")  # fmt: skip
        done = rolled is not None and rolled["status"] == "done"
        done = done and all(out["release_after"] in device["versions"] for device in out["devices"].values())
        yield Check("rolled_out", done, f"canary {', '.join(out['canary']['devices'])} passed, then every device got it"
                    if done else f"not rolled out: {out['canary']['reason'] or out['canary']['result']}")  # fmt: skip
        before, after = out["accuracy_before"], out["accuracy_after"]
        teacher = out["accuracy_teacher"]
        known = before is not None and after is not None and teacher is not None and teacher > before
        regained = (after - before) / (teacher - before) if known else math.nan
        yield Check(
            "accuracy", regained >= REGAINED_MIN,
            f"accuracy regained {regained:.0%} of the way from before to the teacher (at least {REGAINED_MIN:.0%})",
        )  # fmt: skip
        rate, rate_before = out["escalation_rate_after"], out["escalation_rate_before"]
        fall = 1 - rate / rate_before if rate is not None and rate_before else math.nan
        yield Check("escalations", fall >= FALL_MIN, f"escalations fell by {fall:.0%} (at least {FALL_MIN:.0%})")
        yield Check("frames", out["frames_lost"] == 0, f"{out['frames_lost']} of {out['frames_in']} frames were lost")
        examples = out["language"]["examples"]
        told = sum(e["base"] == e["expected_base"] and e["adapted"] == e["expected_adapted"] for e in examples)
        yield Check(
            "language", told == len(examples),
            f"{told} of {len(examples)} prompts were answered as the base learned, then as its adapter learned",
        )  # fmt: skip

    # Small things.

    def _all_run(self, observer: Observer, release: str) -> bool:
        active = self._active(observer)
        language = observer.reported.get(LANGUAGE_DEVICE)
        return all(active.get(name) == release for name in DEVICES) and bool(
            language and language.models.get("phi") and language.models["phi"].active
            and active.get(RESPONDER) is not None
        )  # fmt: skip

    def _active(self, observer: Observer) -> dict[str, str | None]:
        out = {}
        for name, reported in observer.reported.items():
            model = reported.models.get(TEACHER_SLOT if name == RESPONDER else SLOT)
            out[name] = model.active if model else None
        return out

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:5.0f} s] {text}", flush=True)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._say(f"== {name}")
        started = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - started


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _totals(score: Score, when: str) -> dict[str, float | int | None]:
    return {
        f"escalation_rate_{when}": _number(score.escalation_rate),
        f"accuracy_{when}": _number(score.f1),
        f"accepted_error_{when}": _number(score.accepted_error),
        f"accepted_{when}": score.accepted,
    }
