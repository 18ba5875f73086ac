"""How many labels the policy's choice saves: labels for the same accuracy, chosen by the policy against drawn by lot.

A line whose camera goes bad in a quarter of its frames, answered by the demo's first release. Of the same frames one side
has labelled what `core.policy` escalates or audits and what the pipeline's budget lets through, as a device does it; the
other draws as many by lot. Both train the same detector in the same way, with the same number of steps and the same replay,
and are scored on frames of the same line with digits that no training saw. Labels are the truth on both sides: this is about
which frames are labelled, not by whom.

What is compared is the number of labels: where the policy's curve reaches an accuracy with n labels and the other curve
needs m for it, the ratio is n / m. Audits and everything else that was sent count as labels.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from bench.demo.prepare import DIGITS, FULL, SCORE, detectors, labelled
from bench.demo.scenes import LABELS, SIZE, Scene, encode_png, make_scenes
from bench.measure import Benchmark, Result, Say, Target
from edged.core.budget import Budget
from edged.core.policy import Action, Policy, judge, lot
from edged.engines.base import Detections, ImageStats
from edged.wire.manifest import ReleaseManifest, Thresholds
from trainer.candidate import detector
from trainer.evaluate import evaluate, observe
from trainer.export.onnx import export_onnx
from trainer.files import sha256_of, write_json
from trainer.releases import build_manifest, read_manifest
from trainer.tuners.settings import LoraSettings
from trainer.tuners.yolo import TrainSettings, tune_lora, write_yolo_dataset

ROOT = Path(__file__).parents[1]
MODELS, CACHE = ROOT / "build/demo-cache", ROOT / "build/bench"
SEED = 1  # of the models, as the demo has them
SCENES_SEED = 60_000  # of the scenes: none that the demo or its models ever drew
SHIFTED = 0.25  # of the frames
# The shift that the first release copes with worst (F1 0.37; 0.79 for blur): there is much to learn, so that what labels
# bring stands out from what two trainings differ by.
SHIFT = "invert"
FRAME_S = 1.0  # between two frames
POLICY = Policy(target_risk=0.1)  # as devices have it; nothing is deduplicated, because frames are drawn one by one
BATCH, LR, RANK = 16, 0.004, 16  # as the demo trains
SOURCES = ("bench/labels.py", "bench/demo/scenes.py", "edged/core/*.py", "trainer/evaluate.py", "trainer/tuners/yolo*")


@dataclass(frozen=True, slots=True)
class Sizes:
    """`pool`: frames to choose from; `score`: frames to score on; `visits`: images that a training sees, epochs times
    images, the same for every number of labels."""

    pool: int
    score: int
    visits: int
    chosen: tuple[int, ...]
    drawn: tuple[int, ...]
    seeds: int


FULL_SIZES = Sizes(pool=1200, score=400, visits=2000, chosen=(40, 120), drawn=(40, 120, 360), seeds=2)
QUICK_SIZES = Sizes(pool=400, score=120, visits=480, chosen=(30,), drawn=(30, 60), seeds=1)


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame with what the first release made of it."""

    scene: Scene
    shifted: bool
    found: Detections
    stats: ImageStats


@dataclass(frozen=True, slots=True)
class Point:
    """What one training reached: F1 and the share of frames answered rightly, after `labels` labelled frames."""

    labels: int
    f1: float
    frames_right: float
    shifted: float  # share of the labelled frames


def run(quick: bool, say: Say) -> Result:
    """Measure; makes the demo's models first where they are missing (minutes). Trainings are kept: a run that was stopped
    goes on."""
    sizes = QUICK_SIZES if quick else FULL_SIZES
    checkpoint, release, _ = detectors(MODELS, SEED, FULL.calibration, say)
    manifest = read_manifest(release)
    score = _scenes("after", sizes.score)
    with detector(release, manifest) as engine:
        scenes = _scenes("stream", sizes.pool)
        seen = observe(engine, [scene.image for scene, _ in scenes])
        frames = [
            Frame(scene, shifted, each.detections, each.stats)
            for (scene, shifted), each in zip(scenes, seen, strict=True)
        ]
        untrained = evaluate(engine, labelled([scene for scene, _ in score]), manifest.thresholds)
    start = Point(0, untrained.f1, untrained.frame_accuracy, 0.0)
    chosen: list[Point] = []
    drawn: list[Point] = []
    for seed in range(sizes.seeds):
        order = np.random.default_rng([SCENES_SEED, seed]).permutation(len(frames))
        stream = [frames[index] for index in order]
        for count in sizes.drawn:  # in turn, so that a run that is looked at early says something of both
            if count in sizes.chosen:
                chosen.append(
                    _point("policy", choose(stream, manifest, count, seed), seed, checkpoint, score, sizes, say)
                )
            picked = np.random.default_rng([SCENES_SEED, seed, count]).choice(len(stream), count, replace=False)
            drawn.append(_point("lot", [stream[index] for index in picked], seed, checkpoint, score, sizes, say))
    by_policy = curve(chosen, start)[1:]
    ratios = [label_ratio(labels, f1, curve(drawn, start)) for labels, f1 in by_policy]
    wanted = [_decided(frame, manifest, f"-{number}") != "accept" for number, frame in enumerate(frames)]
    facts: dict[str, Any] = {
        "frames": f"{len(frames)} to choose from, {len(score)} to score on, {SHIFTED:.0%} of them shifted",
        "first release": f"F1 {start.f1:.3f}, {start.frames_right:.1%} of the frames right",
        "wanted by the policy": {
            kind: f"{np.mean([want for want, frame in zip(wanted, frames, strict=True) if frame.shifted == bad]):.1%}"
            for kind, bad in (("of clean frames", False), ("of shifted frames", True))
        },
        "policy": [_said(point) for point in chosen],
        "lot": [_said(point) for point in drawn],
        "ratio by size": {f"{row[0]:g}": round(ratio, 3) for row, ratio in zip(by_policy, ratios, strict=True)},
    }
    return Result({"labels_vs_random": median(ratios)}, facts)


def choose(stream: Sequence[Frame], manifest: ReleaseManifest, count: int, seed: int) -> list[Frame]:
    """The frames that a device has labelled until there are `count`: what the policy wants and the budget lets through.

    The budget is the one that spreads `count` messages over the stream, so that the first frames do not take them all.
    """
    minutes = len(stream) * FRAME_S / 60
    budget, per_minute = Budget(0.0, 0.0), max(2, ceil(count / minutes))
    taken: list[Frame] = []
    for number, frame in enumerate(stream):
        if len(taken) == count:
            break
        action = _decided(frame, manifest, f"{seed}-{number}")
        if action == "accept":
            continue
        if budget.take(1, action == "audit", number * FRAME_S, per_minute, 1 << 40) is None:
            taken.append(frame)
    return taken


def _decided(frame: Frame, manifest: ReleaseManifest, item: str) -> Action:
    return judge(frame.found, frame.stats, manifest, POLICY, lot(item)).decision.action


def curve(points: Sequence[Point], start: Point) -> list[tuple[float, float]]:
    """(labels, F1), the mean over seeds by size, from the untrained release on; F1 never falls: what more labels spoil by
    chance does not count for either side."""
    sizes: dict[int, list[Point]] = {}
    for point in sorted(points, key=lambda each: each.labels):
        # Sizes of different seeds may differ by what the budget held back: they belong together all the same.
        near = next((size for size in sizes if abs(size - point.labels) <= size * 0.1), point.labels)
        sizes.setdefault(near, []).append(point)
    rows, best = [(0.0, start.f1)], start.f1
    for several in sizes.values():
        best = max(best, fmean(point.f1 for point in several))
        rows.append((fmean(point.labels for point in several), best))
    return rows


def label_ratio(labels: float, f1: float, other: Sequence[tuple[float, float]]) -> float:
    """`labels` divided by how many the `other` curve needs for this F1, between its points in a straight line; where it
    never gets there by the most that it was given, which makes the ratio look larger than it is."""
    for (before, low), (after, high) in pairwise(other):
        if f1 <= low:
            return labels / max(before, 1.0)
        if f1 <= high:
            return labels / max(before + (after - before) * (f1 - low) / (high - low), 1.0)
    return labels / other[-1][0]


def _scenes(split: str, count: int) -> list[tuple[Scene, bool]]:
    """Scenes of the line, each with whether it is shifted."""
    shifted = round(count * SHIFTED)
    bad = make_scenes(split, shifted, SCENES_SEED, SHIFT, DIGITS)
    good = make_scenes(split, count - shifted, SCENES_SEED + 1, None, DIGITS)
    return [*((scene, True) for scene in bad), *((scene, False) for scene in good)]


def _point(
    name: str, frames: Sequence[Frame], seed: int, checkpoint: Path, score: Sequence[tuple[Scene, bool]], sizes: Sizes,
    say: Say,
) -> Point:  # fmt: skip
    """What a training on these frames reaches; one that was made before is not made again."""
    told = hashlib.sha256(json.dumps([seed, sizes.visits, sizes.score, checkpoint.name]).encode())
    for frame in frames:
        told.update(frame.scene.image.tobytes())
    for source in (path for pattern in SOURCES for path in sorted(ROOT.glob(pattern)) if path.is_file()):
        told.update(sha256_of(source).encode())
    path = CACHE / f"labels-{told.hexdigest()[:16]}.json"
    if not path.is_file():
        with tempfile.TemporaryDirectory(prefix="edged-labels-") as scratch:
            found = _trained(frames, seed, checkpoint, score, sizes, Path(scratch))
        write_json(path, asdict(found))
    point = Point(**json.loads(path.read_text()))
    say(f"seed {seed}, {point.labels} labels by {name}: F1 {point.f1:.3f}, {point.shifted:.0%} of them shifted")
    return point


def _trained(
    frames: Sequence[Frame], seed: int, checkpoint: Path, score: Sequence[tuple[Scene, bool]], sizes: Sizes, folder: Path
) -> Point:  # fmt: skip
    replay = make_scenes("train", len(frames), SEED)  # what the first release has learned from: labelled long ago
    scenes = [*(frame.scene for frame in frames), *replay]
    items = [(f"{n:05d}", encode_png(scene.image), scene.boxes, scene.classes) for n, scene in enumerate(scenes)]
    data = write_yolo_dataset(folder / "data", items, LABELS)
    epochs = max(1, round(sizes.visits / len(items)))
    training = TrainSettings(epochs=epochs, imgsz=SIZE, batch=BATCH, lr=LR, seed=seed)
    tune_lora(checkpoint, data, folder / "model.pt", LoraSettings(r=RANK, lora_alpha=2 * RANK), training)
    export_onnx(folder / "model.pt", folder / "model.onnx", SIZE)
    manifest = build_manifest(
        folder, "digits@1.1", kind="detect", engine="onnx_detect", roles={"model": "model.onnx"}, labels=list(LABELS),
        input_size=(SIZE, SIZE), thresholds=Thresholds(score=SCORE),
    )  # fmt: skip
    with detector(folder, manifest) as engine:
        reached = evaluate(engine, labelled([scene for scene, _ in score]), manifest.thresholds)
    shifted = fmean(frame.shifted for frame in frames)
    return Point(len(frames), reached.f1, reached.frame_accuracy, shifted)


def _said(point: Point) -> str:
    return f"{point.labels}: F1 {point.f1:.3f}, {point.frames_right:.1%} of frames right, {point.shifted:.0%} shifted"


BENCHMARK = Benchmark(
    name="labels",
    text="labels for the same accuracy, chosen by the policy against drawn by lot",
    targets={"labels_vs_random": Target("<=", 0.75)},
    run=run,
)
