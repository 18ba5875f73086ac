"""How far a release's probabilities can be trusted: reliability on held-out items, and the realised risk.

Two streams of the demo's world, clean and shifted, each answered by the release that is meant for it: the first one, and
one that has learned the shift. Reliability is measured on digits and photo regions that neither training nor calibration
saw. For the risk, calibration and test set are drawn anew from all items for every seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.demo.prepare import DIGITS, FULL, SCORE, detectors, labelled
from bench.demo.scenes import make_scenes
from bench.measure import Benchmark, Result, Say, Target
from edged.core.confidence import NOTHING, accept_threshold, box_probabilities, probability
from edged.engines.base import Detections, ImageStats
from edged.wire.manifest import Calibration, Thresholds
from trainer.calibrate import Item, expected_calibration_error, fit
from trainer.candidate import detector
from trainer.evaluate import calibration_items, observe
from trainer.files import sha256_of
from trainer.releases import read_manifest

ROOT = Path(__file__).parents[1]
MODELS, CACHE = ROOT / "build/demo-cache", ROOT / "build/bench"
SEED = 1  # of the models, as the demo has them
SCENES_SEED = 50_000  # of the scenes: none that the demo or its models ever drew
HELD_OUT = ("holdout", "stream", "after")  # splits that neither trained nor calibrated
ANSWERED = Thresholds(score=SCORE)
TARGET_RISKS = (0.05, 0.1, 0.15)
# What an observation follows from, besides the model and the scenes: of older code it is made again.
SOURCES = ("bench/demo/scenes.py", "edged/core/matching.py", "trainer/evaluate.py", "edged/engines/*.py")


@dataclass(frozen=True, slots=True)
class Sizes:
    """`split`: scenes of each split and stream; `calibrate`: items that a seed of the risk measurement calibrates on."""

    split: int
    calibrate: int
    seeds: int


FULL_SIZES, QUICK_SIZES = Sizes(split=1200, calibrate=800, seeds=20), Sizes(split=150, calibrate=200, seeds=3)


@dataclass(frozen=True, slots=True)
class Stream:
    """Items of one kind, answered by one release: for calibration, and held out."""

    name: str
    calibration: list[Item]
    held_out: list[Item]


def run(quick: bool, say: Say) -> Result:
    """Measure; makes the demo's models first where they are missing (minutes)."""
    sizes = QUICK_SIZES if quick else FULL_SIZES
    _, first, learned = detectors(MODELS, SEED, FULL.calibration, say)
    clean = _stream("clean", first, None, sizes, say)
    shifted = _stream("shifted", learned, "mix", sizes, say)
    keys: dict[str, float] = {}
    facts: dict[str, Any] = {"items": {s.name: len(s.held_out) for s in (clean, shifted)}}
    worst = 0
    for stream, suffix in ((clean, ""), (shifted, "_shifted")):
        say(f"{stream.name}: reliability on {len(stream.held_out)} items, fitted on {len(stream.calibration)} others")
        found = _reliability(stream)
        keys |= {f"ece_before{suffix}": found.pop("ece_before"), f"ece_after{suffix}": found.pop("ece_after")}
        facts |= {f"{stream.name}: {name}": round(value, 4) for name, value in found.items()}
        for name, row in _risk(stream, sizes, say).items():
            facts[f"{stream.name}: {name}"] = row
            worst = max(worst, row["over_target"])
    keys["risk_violations"] = worst
    facts["risk_violations counts"] = f"seeds of {sizes.seeds} over target, the worst of all rows"
    facts["shifted, answered by the release calibrated on clean items"] = _lapse(clean, first, sizes, say)
    return Result(keys, facts)


def _reliability(stream: Stream) -> dict[str, float]:
    """Expected calibration error of frames and boxes, before and after the fit on the stream's calibration items."""
    fitted = fit(stream.calibration, ANSWERED)
    right = np.array([item.right for item in stream.held_out])
    return {
        "share_right": round(float(right.mean()), 4),
        "ece_before": expected_calibration_error(_probabilities(stream.held_out, Calibration())[0], right),
        "ece_after": expected_calibration_error(_probabilities(stream.held_out, fitted)[0], right),
        "ece_boxes_before": _box_error(stream.held_out, Calibration()),
        "ece_boxes_after": _box_error(stream.held_out, fitted),
    }


def _box_error(items: Sequence[Item], calibration: Calibration) -> float:
    kept = [item.detections.scores >= ANSWERED.score for item in items]
    p = [box_probabilities(item.detections, calibration)[keep] for item, keep in zip(items, kept, strict=True)]
    right = [item.boxes_right[keep] for item, keep in zip(items, kept, strict=True)]
    return expected_calibration_error(np.concatenate(p), np.concatenate(right))


def _risk(stream: Stream, sizes: Sizes, say: Say) -> dict[str, dict[str, Any]]:
    """For each target, over all seeds: how often the realised risk was above it, its mean and worst, what was accepted.

    The risk is the share of wrong answers among the accepted ones; wrong and accepted among all is never more. Once as
    devices decide, and once by the risk table's bound alone, which accepts more: that is what the bound must withstand.
    """
    pool = [*stream.calibration, *stream.held_out]
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    for seed in range(sizes.seeds):
        order = np.random.default_rng([SCENES_SEED, seed]).permutation(len(pool))
        fitted = fit([pool[index] for index in order[: sizes.calibrate]], ANSWERED)
        test = [pool[index] for index in order[sizes.calibrate :]]
        p, novel = _probabilities(test, fitted)
        right = np.array([item.right for item in test])
        for target in TARGET_RISKS:
            chosen = {"": accept_threshold(fitted, target), ", by the bound alone": _by_bound(fitted, target)}
            for rule, threshold in chosen.items():
                accepted = (p >= threshold) & ~novel
                wrong = int((accepted & ~right).sum())
                measured = (target, wrong / max(int(accepted.sum()), 1), wrong / len(test), float(accepted.mean()))
                rows.setdefault(f"target risk {target:g}{rule}", []).append(measured)
        say(f"{stream.name}: seed {seed + 1}/{sizes.seeds}")
    return {name: _summary(np.array(found)) for name, found in rows.items()}


def _by_bound(calibration: Calibration, target: float) -> float:
    table = calibration.risk
    rows = [] if table is None else list(zip(table.thresholds, table.bounds, strict=True))
    return min((threshold for threshold, bound in rows if bound <= target), default=NOTHING)


def _summary(found: NDArray[np.float64]) -> dict[str, Any]:
    target, risk, joint, accepted = found.T
    return {
        "over_target": int((risk > target).sum()),
        "over_target_wrong_and_accepted": int((joint > target).sum()),
        "risk_mean": round(float(risk.mean()), 4),
        "risk_max": round(float(risk.max()), 4),
        "wrong_and_accepted_mean": round(float(joint.mean()), 4),
        "accepted_mean": round(float(accepted.mean()), 4),
    }


def _lapse(clean: Stream, release: Path, sizes: Sizes, say: Say) -> dict[str, float]:
    """What becomes of the promise when the input shifts and the release does not: novelty must keep it from acceptance."""
    fitted = fit(clean.calibration, ANSWERED)
    items = [item for split in HELD_OUT for item in _observed(release, split, "mix", sizes.split, say)]
    p, novel = _probabilities(items, fitted)
    right = np.array([item.right for item in items])
    accepted = (p >= accept_threshold(fitted, TARGET_RISKS[-1])) & ~novel
    return {
        "items": len(items),
        "share_right": round(float(right.mean()), 4),
        "ece": round(expected_calibration_error(p, right), 4),
        "novel": round(float(novel.mean()), 4),
        "accepted": round(float(accepted.mean()), 4),
        "wrong_and_accepted": round(float((accepted & ~right).mean()), 4),
        "error_among_accepted": round(float((~right[accepted]).mean()) if accepted.any() else 0.0, 4),
    }


def _probabilities(items: Sequence[Item], calibration: Calibration) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """p and novelty of each item, as a device computes them."""
    each = [probability(item.detections, ANSWERED, item.stats, calibration) for item in items]
    return np.array([one.p for one in each]), np.array([one.novel for one in each])


# Observations, kept: answers of one release to scenes of one split.


def _stream(name: str, release: Path, shift: str | None, sizes: Sizes, say: Say) -> Stream:
    held_out = [item for split in HELD_OUT for item in _observed(release, split, shift, sizes.split, say)]
    return Stream(name, _observed(release, "calibration", shift, sizes.split, say), held_out)


def _observed(release: Path, split: str, shift: str | None, count: int, say: Say) -> list[Item]:
    manifest = read_manifest(release)
    told = hashlib.sha256(f"{sha256_of(release / manifest.files['model'].path)} {ANSWERED} {DIGITS}".encode())
    for source in (path for pattern in SOURCES for path in sorted(ROOT.glob(pattern))):
        told.update(source.read_bytes())
    path = CACHE / f"calibration-{release.name.split('@')[0]}-{split}-{shift}-{count}-{told.hexdigest()[:12]}.npz"
    if not path.is_file():
        say(f"{release.name}: answering {count} scenes of {split}, shift {shift}")
        scenes = labelled(make_scenes(split, count, SCENES_SEED, shift, DIGITS))
        with detector(release, manifest) as engine:
            items = calibration_items(observe(engine, [scene.image for scene in scenes]), scenes, ANSWERED)
        _save(path, items)
    return _load(path)


def _save(path: Path, items: Sequence[Item]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    np.savez_compressed(
        beside,
        counts=[len(item.detections) for item in items],
        boxes=np.concatenate([item.detections.boxes for item in items]),
        scores=np.concatenate([item.detections.scores for item in items]),
        classes=np.concatenate([item.detections.classes for item in items]),
        boxes_right=np.concatenate([item.boxes_right for item in items]),
        right=[item.right for item in items],
        stats=[(s.brightness, s.contrast, s.sharpness, s.low, s.high) for s in (item.stats for item in items)],
    )
    beside.rename(path)


def _load(path: Path) -> list[Item]:
    with np.load(path) as file:
        held = dict(file)
    cuts = np.cumsum(held["counts"])[:-1]
    boxes, scores, classes, hits = (
        np.split(held[name], cuts) for name in ("boxes", "scores", "classes", "boxes_right")
    )
    return [
        Item(Detections(*found), ImageStats(*map(float, stats)), bool(right), hit)
        for *found, stats, right, hit in zip(boxes, scores, classes, held["stats"], held["right"], hits, strict=True)
    ]


BENCHMARK = Benchmark(
    name="calibration",
    text="confidence against truth on held-out items, clean and shifted; realised risk against the target",
    targets={"ece_after": Target("<=", 0.04), "risk_violations": Target("<=", 2)},
    run=run,
)
