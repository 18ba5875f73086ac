"""Failures planted on the real way: real networks fitted on labelled pictures, exported, quantised, run by the device's
engine, measured in a child process; each is stopped, and for its own reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from edged.core.confidence import probability
from edged.engines.base import Detector, EngineOptions, open_engine
from edged.wire.manifest import Calibration, Thresholds
from tests.support.parities import SAME
from tests.support.squares import LABELS, Weights, learn, manifest_of, mixed, scenes, ship, write_float
from trainer import calibrate
from trainer.core.gate import Evidence, Holdout, Rules, Verdict, judge
from trainer.datasets import LabelledBox, LabelledImage, shuffle_labels
from trainer.evaluate import Labelled, calibration_items, evaluate_release, image_sha256, observe
from trainer.evidence import gather
from trainer.footprint import Profile, read_profile

DIM = 0.35  # of the squares' light, where the work is now
PI = "raspberry-pi-4"
RULES = Rules(latency_ratio_max=10.0)  # answers take a fifth of a millisecond: a busy machine doubles that
EVERYTHING = {"gain", "chance", "f1", "forgetting", *(f"class {c} ({s})" for c in LABELS for s in ("target", "base"))}
MIB = 2**20


@dataclass
class World:
    """What all rows share: the holdouts, a release that runs now, a better one."""

    folder: Path
    target: list[Labelled]
    base: list[Labelled]
    training: list[Labelled]
    ranges: list[Labelled]  # for quantising
    old: Weights
    new: Weights
    calibration: Calibration
    ece: float
    current: Evidence
    pi: Profile


def identity(weights: Weights) -> str:
    return sha256(weights.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("gate")
    target, base, ranges = mixed(60, 10, DIM), scenes(60, 20), mixed(16, 50, DIM)
    clear = scenes(60, 30)
    training = [*clear, *scenes(60, 40, DIM)]
    old, new = learn(clear), learn(training)
    pi = read_profile(PI, "detect")
    where = folder / "current"
    ship(write_float(old, where / "fp32" / "model.onnx"), where / "model.onnx", ranges)
    current = gather(
        where, manifest_of(where, "squares@1.0"), target, base, weights_sha256=identity(old), profiles=[pi]
    )
    better = folder / "better"
    ship(write_float(new, better / "fp32" / "model.onnx"), better / "model.onnx", ranges)
    fitted, ece = calibrated(better, mixed(100, 60, DIM), mixed(200, 70, DIM))
    return World(folder, target, base, training, ranges, old, new, fitted, ece, current, pi)


def calibrated(folder: Path, items: list[Labelled], others: list[Labelled]) -> tuple[Calibration, float]:
    """Fitted on `items`, and its error on `others`."""
    engine = open_engine(folder, manifest_of(folder, "squares@1.1"), EngineOptions())
    assert isinstance(engine, Detector)
    known, fresh = (
        calibration_items(observe(engine, [item.image for item in each]), each, Thresholds())
        for each in (items, others)
    )
    engine.close()
    fitted = calibrate.fit(known, Thresholds())
    p = np.array([probability(row.detections, Thresholds(), row.stats, fitted).p for row in fresh])
    return fitted, calibrate.expected_calibration_error(p, np.array([row.right for row in fresh]))


@dataclass
class Plan:
    """One candidate: what was learned on and how it was shipped."""

    weights: Weights
    training: list[Labelled]
    ranges: list[Labelled]
    target: list[Labelled]
    near: list[Labelled] = field(default_factory=list)
    work: int = 0
    ballast: int = 0
    hidden: int = 0
    quantised: bool = True
    whole: bool = False  # quantise the decoder too
    cut: int = 0  # bytes that the file lost at its end
    profiles: list[Profile] = field(default_factory=list)


def judged(world: World, folder: Path, plan: Plan) -> tuple[Evidence, Verdict]:
    single, model = folder / "fp32" / "model.onnx", folder / "model.onnx"
    write_float(plan.weights, single, work=plan.work, ballast=plan.ballast, hidden=plan.hidden)
    if plan.quantised:
        ship(single, model, plan.ranges, () if plan.whole else None)
    else:
        model.write_bytes(single.read_bytes())
    before = None
    if np.isfinite(plan.weights).all():
        before = evaluate_release(single.parent, manifest_of(single.parent, "squares@1.1"), plan.target).quality
    if plan.cut:
        model.write_bytes(model.read_bytes()[: -plan.cut])
    evidence = gather(
        folder,
        manifest_of(folder, "squares@1.1", world.calibration),
        plan.target,
        world.base,
        weights_sha256=identity(plan.weights),
        calibration_ece=world.ece,
        export_before=before,
        parity=(SAME,),  # the planted exports differ in what they answer, which `export_before` sees
        profiles=plan.profiles,
    )
    current = world.current
    if plan.target != world.target:
        where = world.folder / "current"
        current = gather(where, manifest_of(where, "squares@1.0"), plan.target, world.base,
                         weights_sha256=identity(world.old))  # fmt: skip
    holdout = Holdout(
        ids(plan.target), ids(world.base), ids([*plan.training, *plan.ranges]), near_duplicates=ids(plan.near)
    )
    targets = [profile.target for profile in plan.profiles]
    return evidence, judge(evidence, current, holdout, RULES, np.random.default_rng(0), targets)


def ids(items: Sequence[Labelled]) -> frozenset[str]:
    return frozenset(image_sha256(item.image) for item in items)


def good(world: World) -> Plan:
    return Plan(world.new, world.training, world.ranges, world.target)


def changed(**values: object) -> Callable[[World], Plan]:
    def plan(world: World) -> Plan:
        found = good(world)
        for name, value in values.items():
            setattr(found, name, value)
        return found

    return plan


def shuffled(world: World) -> Plan:
    """As `trainer train --ablate labels` does it."""
    items = [
        LabelledImage(
            str(n), b"", tuple(LabelledBox(LABELS[c], tuple(b)) for b, c in zip(i.boxes.tolist(), i.classes, strict=True))
        )
        for n, i in enumerate(world.training)
    ]  # fmt: skip
    mixed_up = [
        Labelled(
            own.image,
            np.array([box.box for box in other.boxes], np.float32).reshape(-1, 4),
            np.array([LABELS.index(box.label) for box in other.boxes], np.int64),
        )
        for own, other in zip(world.training, shuffle_labels(items, 3), strict=True)
    ]
    plan = good(world)
    plan.weights = learn(mixed_up)
    return plan


def without_owls(world: World) -> Plan:
    plan = good(world)
    unlabelled = [
        item._replace(boxes=item.boxes[item.classes != 2], classes=item.classes[item.classes != 2])
        for item in world.training
    ]
    plan.weights = learn(unlabelled)
    return plan


def only_dim(world: World) -> Plan:
    """Learned that what is bright is nothing: bright squares without labels among dim ones with."""
    plan = good(world)
    bare = [item._replace(boxes=item.boxes[:0], classes=item.classes[:0]) for item in scenes(240, 33)]
    plan.weights = learn([*bare, *scenes(60, 40, DIM)])
    return plan


def in_the_holdout(world: World) -> Plan:
    plan = good(world)
    plan.training = [*world.training, *world.target[:3], world.base[0]]
    plan.weights = learn(plan.training)
    return plan


def nearly_in_the_holdout(world: World) -> Plan:
    """The next frames of a standing camera: not one pixel file is the same."""
    plan = good(world)
    rng = np.random.default_rng(9)
    twins = [
        item._replace(image=(item.image + rng.integers(0, 3, item.image.shape)).clip(0, 255).astype(np.uint8))
        for item in world.target[:2]
    ]
    assert not ids(twins) & ids(world.target)
    plan.training = [*world.training, *twins]
    plan.weights, plan.near = learn(plan.training), world.target[:2]
    return plan


def in_the_dark(world: World) -> Plan:
    """Quantised on black pictures, decoder and all: the activations' ranges are those of nothing."""
    plan = good(world)
    plan.whole = True
    plan.ranges = [item._replace(image=np.zeros_like(item.image)) for item in world.ranges]
    return plan


def same_weights(world: World) -> Plan:
    plan = good(world)
    plan.weights, plan.ranges = world.old, scenes(16, 77)
    return plan


def same_bytes(world: World) -> Plan:
    plan = good(world)
    plan.weights = world.old
    return plan


def not_a_number(world: World) -> Plan:
    plan = good(world)
    plan.weights, plan.quantised = world.new.copy(), False
    plan.weights[1, 3] = np.nan
    return plan


def empty(world: World) -> Plan:
    plan = good(world)
    plan.target = []
    return plan


def few(world: World) -> Plan:
    plan = good(world)
    plan.target = world.target[::4]
    return plan


def nothing_new(world: World) -> Plan:
    """Other clear pictures: another model, no better one."""
    plan = good(world)
    plan.training = scenes(60, 31)
    plan.weights = learn(plan.training)
    return plan


def on_a_pi(**values: object) -> Callable[[World], Plan]:
    def plan(world: World) -> Plan:
        found = changed(**values)(world)
        found.profiles = [world.pi]
        return found

    return plan


UNMEASURED = {"measurable", "measured (target holdout)", "measured (base holdout)", "boxes (target)", "boxes (base)",
              "f1", "export", "gain", "chance", "classes (target)", "classes (base)", "forgetting", "latency"}  # fmt: skip
# name -> (the candidate, the checks that must fail, those that may, a part of a reason)
ROWS: dict[str, tuple[Callable[[World], Plan], set[str], set[str], str]] = {
    "a better release": (good, set(), set(), ""),
    "a better release that fits": (on_a_pi(), set(), set(), ""),
    "shuffled labels": (shuffled, {"gain", "chance", "f1", "forgetting"}, EVERYTHING, "no better than the current release"),
    "training data in the holdout": (in_the_holdout, {"disjoint"}, set(), "trained on (at most): 4, bound 0"),
    "nearly training data in the holdout": (nearly_in_the_holdout, {"near_duplicates"}, set(), "at most): 2, bound 0"),
    "one class forgotten": (
        without_owls,
        {"class owl (target)", "class owl (base)", "forgetting"},
        {"gain", "chance"},
        "F1 lost on class 'owl' of the base holdout",
    ),
    "the beginnings forgotten": (
        only_dim,
        {"forgetting", *(f"class {label} (base)" for label in LABELS)},
        EVERYTHING,
        "F1 lost on the base holdout",
    ),
    "a quantisation that breaks": (in_the_dark, {"export"}, EVERYTHING, "between the exported and the quantised file"),
    "an empty holdout": (
        empty,
        {"holdout_images", "measured (target holdout)", "measured (target holdout, current release)", "finite (target)",
         "boxes (target)", "f1", "export", "gain", "chance", "classes (target)", "latency"},
        set(),
        "images in the target holdout (at least): 0, bound 50",
    ),
    "too small a holdout": (few, {"holdout_images", "boxes (target)"}, set(), "(at least): 15, bound 50"),
    "the same weights again": (same_weights, {"new_weights", "gain", "chance"}, {"export"}, "weights"),
    "the same bytes again": (same_bytes, {"new_bytes", "new_weights", "gain", "chance"}, set(), "model file"),
    "nothing new": (nothing_new, {"gain", "chance"}, set(), "no better than the current release"),
    "a file that does not load": (changed(cut=300), UNMEASURED, set(), "could not be measured: release squares@1.1"),
    "answers that are no numbers": (not_a_number, UNMEASURED, set(), "could not be measured: release squares@1.1"),
    "too slow": (on_a_pi(work=30), {"latency", f"latency ({PI})"}, set(), "over the current release's (at most)"),
    "too big a file": (on_a_pi(ballast=5 * MIB, quantised=False), {f"size ({PI})"}, {"latency", f"latency ({PI})"},
                       f"{PI}: MiB of the model's file (at most): 5"),
    "too much memory": (on_a_pi(hidden=48 * MIB, quantised=False), {f"memory ({PI})"},
                        {"latency", f"latency ({PI})"}, f"{PI}: MiB of its process (at most)"),
    "a file that does not load, on a profile": (on_a_pi(cut=300), {*UNMEASURED, f"memory ({PI})", f"latency ({PI})"},
                                               set(), f"{PI}: MiB of its process: not measured: release squares@1.1"),
    "a profile that is not there": (
        changed(profiles=[read_profile("toaster", "detect")]), {"size (toaster)", "memory (toaster)"}, set(),
        "profile toaster: no profile 'toaster': use one of"),
}  # fmt: skip


@pytest.mark.alone
@pytest.mark.parametrize("name", ROWS)
def test_each_planted_failure_is_stopped_for_its_reason(world: World, tmp_path: Path, name: str) -> None:
    make, must, may, words = ROWS[name]
    evidence, verdict = judged(world, tmp_path, make(world))
    failed = {check.name for check in verdict.checks if not check.passed}
    assert must <= failed <= must | may, verdict.reasons
    assert verdict.passed == (not must)
    assert words in " ".join(verdict.reasons)
    if name == "the same weights again":
        assert evidence.model_sha256 != world.current.model_sha256, "quantised anew, the file is another"
