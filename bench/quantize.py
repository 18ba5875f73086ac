"""What quantising gains and costs: the int8 release against the fp32 release of the same network, on the device's engine.

Speed: YOLO11n for 640 and 160 pixels, prepare and infer of decoded pictures, one ONNX Runtime thread. Accuracy: mAP50-95 of
the demo's detectors on the demo's holdouts, each on the pictures that it is meant for.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.calibration import MODELS, SEED
from bench.demo import models as demo
from bench.demo.prepare import DIGITS, FULL, SCORE, labelled
from bench.demo.scenes import LABELS, SIZE, make_scenes
from bench.measure import Benchmark, Result, Say, Target, alternate, ratio
from bench.vision import ROOT, models, peer, write_pictures
from edged.wire.manifest import Thresholds
from trainer.core.parity import Exported
from trainer.evaluate import Labelled, evaluate_release
from trainer.export.golden_images import part
from trainer.export.vision import export_vision, vision_manifest

THREADS = 1  # of ONNX Runtime, as a slot has by default
GOLDEN = 16  # images that parity is judged on


@dataclass(frozen=True, slots=True)
class Plan:
    """Pictures a pass and rounds at each size, and the share of the holdouts that is judged."""

    passes: dict[int, tuple[int, int]]
    share: float


FULL_PLAN = Plan({640: (24, 9), 160: (240, 11)}, 1.0)
QUICK_PLAN = Plan({640: (8, 3), 160: (80, 3)}, 0.2)


def speed(size: int, pictures: int, rounds: int, say: Say) -> dict[str, list[float]]:
    """Pictures a second of both releases, round by round."""
    made = models(size)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT / "build")))
        files = write_pictures(scratch / "pictures", size, pictures)
        sides: dict[str, Callable[[], float]] = {
            name: stack.enter_context(peer("engine", folder, size, THREADS, files)).go
            for name, folder in (("fp32", made.fp32_release), ("int8", made.int8_release))
        }
        values = alternate(rounds, *sides.values(), say=say, names=[f"{size} {name}" for name in sides])
    return dict(zip(sides, values, strict=True))


def accuracy(
    checkpoint: Path, calibration: Sequence[Labelled], holdout: Sequence[Labelled], say: Say
) -> tuple[dict[str, float], Exported]:
    """mAP50-95 of the checkpoint's fp32 and int8 files on the holdout, and the parity of the int8 export."""
    scratch = Path(tempfile.mkdtemp(prefix=".bench-", dir=ROOT / "build"))
    found: dict[str, float] = {}
    thresholds = Thresholds(score=SCORE)
    parts = part([item.image for item in calibration], golden_max=GOLDEN)
    try:
        for precision in ("fp32", "int8"):
            exported = export_vision(
                checkpoint, scratch / precision, precision, golden=parts.golden, calibration=parts.ranges,
                imgsz=SIZE, thresholds=thresholds,
            )  # fmt: skip
            manifest = vision_manifest(
                scratch / precision, "bench@1", "detect", labels=LABELS, imgsz=SIZE, thresholds=thresholds
            )
            found[precision] = evaluate_release(scratch / precision, manifest, holdout).map50_95
            say(f"{checkpoint.stem} {precision}: mAP50-95 {found[precision]:.4f} on {len(holdout)} scenes")
    finally:
        shutil.rmtree(scratch)
    return found, exported


def run(quick: bool, say: Say) -> Result:
    """Measure; makes the demo's models first where they are missing (minutes)."""
    plan = QUICK_PLAN if quick else FULL_PLAN
    keys: dict[str, float] = {}
    facts: dict[str, object] = {"threads": THREADS, "vnni": _vnni()}
    for size, (pictures, rounds) in plan.passes.items():
        seen = speed(size, pictures, rounds, say)
        keys[f"speedup_{size}"] = ratio(seen["int8"], seen["fp32"])
        for name, values in seen.items():
            facts[f"{name}_{size}"] = f"{statistics.median(values):.1f} pictures/s"
    base, teacher = demo.make_base(MODELS, SEED, say), demo.make_teacher(MODELS, SEED, say)
    drops = []
    # As the demo draws them (bench.demo.prepare): the teacher is meant for shifted pictures, the base for clean ones.
    for checkpoint, name, shift, offset, count in (
        (base, "clean", None, 23, FULL.holdout_clean), (teacher, "shifted", "mix", 21, FULL.holdout),
    ):  # fmt: skip
        calibration = labelled(
            make_scenes("calibration", FULL.calibration, SEED + 11 + (shift is not None), shift, DIGITS)
        )
        holdout = labelled(make_scenes("holdout", int(count * plan.share), SEED + offset, shift, DIGITS))
        found, exported = accuracy(checkpoint, calibration, holdout, say)
        drops.append(found["fp32"] - found["int8"])
        facts[f"mAP50-95, {name}"] = f"fp32 {found['fp32']:.4f}, int8 {found['int8']:.4f} ({len(holdout)} scenes)"
        facts[f"parity, {name}"] = ", ".join(str(row) for row in exported.parity[-1].rows)
        keys[f"map_drop_{name}"] = drops[-1]
    keys["map_drop"] = max(drops)
    return Result(keys, facts)


def _vnni() -> str:
    """Whether this processor multiplies 8-bit numbers in one instruction; without it int8 is hardly faster."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    found = sorted({flag for flag in flags.split() if "vnni" in flag or flag in ("amx_int8", "asimddp", "i8mm")})
    return ", ".join(found) or f"none ({platform.machine()})"


BENCHMARK = Benchmark(
    "quantize",
    "the int8 release against the fp32 release of the same network: speed on the device's engine at 640 and 160 px, and "
    "mAP50-95 on the demo's holdouts (map_drop is the larger of both)",
    {
        "speedup_640": Target(">=", 1.8),
        "speedup_160": Target(">=", 1.5),
        "map_drop": Target("<=", 0.01),
    },
    run,
)
