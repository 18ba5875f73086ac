"""Frames for the devices, and the scorer that alone holds the truth about them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.demo.line import SITE
from bench.demo.scenes import Scene, encode_png
from edged.core.matching import frame_right, match
from edged.engines.base import Detector
from edged.link import Inbound, Link, LinkOptions
from edged.wire import messages, topics
from edged.wire.messages import InferReply, InferRequest, InvalidPayload, Reported, Result

PIPELINE = "inspect"


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame as it was handed to a device; `phase` is the part of the demo that it belongs to."""

    name: str
    device: str
    phase: str
    scene: Scene
    sent: float


@dataclass(slots=True)
class Score:
    """Sums over frames: boxes found, wrong and missed; frames, escalated ones, accepted ones, accepted and wrong."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    frames: int = 0
    escalated: int = 0
    accepted: int = 0
    accepted_wrong: int = 0

    @property
    def f1(self) -> float:
        """F1 of boxes at IoU 0.5; NaN without any."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else float("nan")

    @property
    def escalation_rate(self) -> float:
        """Share of frames that the policy wants to escalate; NaN without frames."""
        return self.escalated / self.frames if self.frames else float("nan")

    @property
    def accepted_error(self) -> float:
        """Share of accepted frames whose answer is wrong; 0 when none was accepted, because then no wrong one was;
        NaN without frames."""
        if not self.frames:
            return float("nan")
        return self.accepted_wrong / self.accepted if self.accepted else 0.0


@dataclass(frozen=True, slots=True)
class Judged:
    """One frame's outcome, for plots and sums."""

    frame: Frame
    result: Result
    at: float
    tp: int
    fp: int
    fn: int
    right: bool


def judge(scene: Scene, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> tuple[int, int, int, bool]:
    """(true positives, false positives, false negatives, the whole frame is right) of an answer."""
    found = match(boxes, classes, scores, scene.boxes, scene.classes)
    right = frame_right(boxes, classes, scores, scene.boxes, scene.classes)
    return found.tp, found.fp, found.fn, right


@dataclass(slots=True)
class Feeder:
    """Writes frames into the devices' folders at a steady rate; remembers the truth of each."""

    inboxes: dict[str, Path]
    frames: dict[str, Frame] = field(default_factory=dict)

    def feed(
        self, phase: str, scenes: Sequence[Scene], rate: float, goes_on: Callable[[], bool] = lambda: True
    ) -> list[str]:
        """Hand `scenes` to the devices in turn, `rate` frames a second in all, while `goes_on`; the frames' names."""
        names: list[str] = []
        devices = list(self.inboxes)
        start = time.monotonic()
        for number, scene in enumerate(scenes):
            due = start + number / rate
            while (wait := due - time.monotonic()) > 0:
                time.sleep(min(wait, 0.2))
                if not goes_on():
                    return names
            if not goes_on():
                return names
            names.append(self._hand_over(phase, scene, devices[number % len(devices)]))
        return names

    def _hand_over(self, phase: str, scene: Scene, device: str) -> str:
        name = f"{phase}-{len(self.frames):06d}.png"
        inbox = self.inboxes[device]
        inbox.mkdir(parents=True, exist_ok=True)
        beside = inbox / f".{name}"
        beside.write_bytes(encode_png(scene.image))
        self.frames[name] = Frame(name, device, phase, scene, time.time())
        beside.rename(inbox / name)
        return name


class Observer:
    """An independent subscriber: it sees what devices publish and asks as any client would."""

    def __init__(self, options: LinkOptions) -> None:
        self._link = Link(options, [topics.RESULT.filter(), topics.REPORTED.filter(), topics.REPLY.filter()])
        self.results: dict[str, tuple[Result, float, str]] = {}  # item -> first result, when it came, device
        self.repeated = 0
        self.reported: dict[str, Reported] = {}
        self.history: list[tuple[float, str, Reported]] = []
        self._replies: dict[str, InferReply] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._asked = 0
        self._thread = threading.Thread(target=self._listen, name="observer", daemon=True)

    def __enter__(self) -> Observer:
        self._link.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()
        self._link.stop()

    def _listen(self) -> None:
        while not self._stopping:
            try:
                event = self._link.inbox.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(event, Inbound):
                self._note(event)
                self._link.acknowledge(event)

    def _note(self, event: Inbound) -> None:
        try:
            route, fields, message = messages.decode(event.topic, event.payload)
        except InvalidPayload:
            return
        with self._changed:
            if route is topics.RESULT and isinstance(message, Result):
                if message.item in self.results:
                    self.repeated += 1
                else:
                    self.results[message.item] = (message, time.time(), fields["dev"])
            elif route is topics.REPORTED and isinstance(message, Reported):
                self.reported[fields["dev"]] = message
                self.history.append((time.time(), fields["dev"], message))
            elif route is topics.REPLY and isinstance(message, InferReply):
                self._replies[message.request] = message
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool], seconds: float, alive: Callable[[], None] = lambda: None) -> bool:
        """Wait until `condition` holds, at most so long; `alive` may raise meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self._changed:
                if condition():
                    return True
                self._changed.wait(0.5)
            alive()
        return condition()

    def ask(self, device: str, pipeline: str, prompt: str, seconds: float = 30) -> InferReply | None:
        """Send a prompt to a device's pipeline and wait for its reply; None when none comes."""
        self._asked += 1
        request = InferRequest(
            id=f"demo-{time.time_ns()}-{self._asked}", ts=time.time(), boot="demo", seq=self._asked,
            generation_prompt=prompt,
        )  # fmt: skip
        address = topics.INFER(site=SITE, dev=device, pipeline=pipeline)
        if not self.wait_for(lambda: self._link.publish(address, messages.encode(request)), 10):
            return None
        self.wait_for(lambda: request.id in self._replies, seconds)
        return self._replies.get(request.id)


class Scorer:
    """Compares what devices answered with the truth that only the feeder knew."""

    def __init__(self, feeder: Feeder, observer: Observer, labels: Sequence[str]) -> None:
        self._feeder, self._observer = feeder, observer
        self._index = {label: number for number, label in enumerate(labels)}

    def judged(self, phases: Sequence[str] | None = None) -> list[Judged]:
        """Every answered frame of these phases (None: of all), in the order of handing over."""
        out = []
        for name, frame in self._feeder.frames.items():
            if (phases is None or frame.phase in phases) and name in self._observer.results:
                result, at, _ = self._observer.results[name]
                if result.error is None:
                    out.append(self._judge(frame, result, at))
        return out

    def failed(self) -> list[str]:
        """Frames whose answer is an error."""
        return [name for name, (result, _, _) in self._observer.results.items() if result.error is not None]

    def _judge(self, frame: Frame, result: Result, at: float) -> Judged:
        boxes = np.array([box.box for box in result.prediction], np.float32).reshape(-1, 4)
        scores = np.array([box.score for box in result.prediction], np.float32)
        classes = np.array([self._index[box.label] for box in result.prediction], np.int64)
        tp, fp, fn, right = judge(frame.scene, boxes, scores, classes)
        return Judged(frame, result, at, tp, fp, fn, right)

    def missing(self) -> list[str]:
        """Frames that were handed over and never answered."""
        results = self._observer.results  # an answer counts when it comes from the device that got the frame
        return [n for n, f in self._feeder.frames.items() if n not in results or results[n][2] != f.device]

    @staticmethod
    def total(rows: Sequence[Judged]) -> Score:
        """The sums over some judged frames."""
        score = Score()
        for row in rows:
            score.tp += row.tp
            score.fp += row.fp
            score.fn += row.fn
            score.frames += 1
            escalated = row.result.decision == "escalate"
            score.escalated += escalated
            score.accepted += not escalated
            score.accepted_wrong += not escalated and not row.right
        return score


def score_engine(engine: Detector, scenes: Sequence[Scene], threshold: float) -> Score:
    """What a model by itself reaches on these scenes: the teacher's ceiling."""
    score = Score()
    for scene in scenes:
        found = engine.infer([engine.prepare(scene.image)])[0].above(threshold)
        tp, fp, fn, _ = judge(scene, found.boxes, found.scores, found.classes)
        score.tp, score.fp, score.fn, score.frames = score.tp + tp, score.fp + fp, score.fn + fn, score.frames + 1
    return score
