"""What the demo starts from: models, releases and labelled folders, made on the spot and kept in a cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.demo import models, phi
from bench.demo.scenes import LABELS, SIZE, Scene, encode_png, make_scenes
from bench.kept import kept
from edged.wire.manifest import Thresholds
from trainer.datasets import LabelledBox, LabelledImage, write_folder
from trainer.evaluate import Labelled
from trainer.export.gguf import export_gguf
from trainer.export.gguf_lora import export_lora_gguf
from trainer.package import package_language, package_vision
from trainer.releases import reference

Say = Callable[[str], None]
DIGITS = (1, 3)  # digits in a frame of the stream; training scenes hold more, to learn more from each
SCORE = 0.45  # an answered box scores at least this
# How a release is made is part of what it is: of older code it is made again.
ROOT = Path(__file__).parents[2]
# What shapes a release that is kept: of any kind, and of a detector.
RELEASE = ("edged/wire/manifest.py", "edged/wire/blocks.py", "trainer/releases.py", "trainer/package.py")
DETECTOR = (
    "trainer/candidate.py", "trainer/calibrate.py", "trainer/scaling.py", "trainer/core/risk.py", "trainer/export/onnx.py",
    "trainer/export/quantize.py", "trainer/export/uint8.py", "trainer/export/vision.py", "trainer/export/golden_images.py",
    "trainer/core/golden.py",
)  # fmt: skip
PROVENANCE = {"kind": "person", "who": "annotator"}  # the holdouts are labelled by hand, as it were: from the truth


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of a run: frames and images in all, rates in frames a second over all devices."""

    frames_clean: int = 90  # before the shift: what normal looks like
    frames_before: int = 420
    frames_after: int = 330
    rate: float = 24.0
    rate_idle: float = 3.0  # while the trainer works
    holdout: int = 400
    holdout_clean: int = 240
    calibration: int = 400  # a third of them only counts what accepting costs
    replay: int = 400
    epochs: int = 10
    threshold: int = 260  # train when there are more new labelled samples
    watch_s: float = 12.0
    items_min: int = 40


FULL = Plan()
REDUCED = Plan(frames_clean=30, frames_before=300, frames_after=180, threshold=190, watch_s=8.0, items_min=24)


@dataclass(frozen=True, slots=True)
class Assets:
    """Where everything lies. `base` and `teacher` are the first releases; `phi` and `adapter` the language model's."""

    checkpoint: Path
    base: Path
    teacher: Path
    phi: Path
    adapter: Path
    replay: Path
    holdout: Path
    holdout_clean: Path
    calibration: Path


def labelled(scenes: Sequence[Scene]) -> list[Labelled]:
    """Scenes as the trainer's evaluation takes them."""
    return [Labelled(scene.image, scene.boxes, scene.classes) for scene in scenes]


def prepare(
    cache: Path, work: Path, seed: int, shift: str, plan: Plan, say: Say, calibrates: str = "calibration"
) -> Assets:
    """Make what is missing in `cache` (models, releases) and `work` (labelled folders of this run).

    `calibrates`: the split whose clean scenes calibrate. Each split has handwriting of its own, so that a detector that is
    calibrated on `calibration` sees unlike hands on the line; `stream` calibrates it on other pictures of that line."""
    checkpoint, base_release, teacher_release = detectors(cache, seed, plan.calibration, say, calibrates)
    phi_release, adapter_release = _language(cache, seed, say)
    say("holdouts: drawing labelled folders")
    half = plan.holdout // 2
    folders = {
        "replay": make_scenes("train", plan.replay, seed),
        # The work as it is now: shifted, and clean as before.
        "holdout": [
            *make_scenes("holdout", plan.holdout - half // 2, seed + 21, shift, DIGITS),
            *make_scenes("holdout", half // 2, seed + 22, None, DIGITS),
        ],
        "holdout_clean": make_scenes("holdout", plan.holdout_clean, seed + 23, None, DIGITS),
        "calibration": make_scenes(calibrates, plan.calibration, seed + 11, None, DIGITS),
    }
    for name, scenes in folders.items():
        write_folder(work / name, [_image(scene) for scene in scenes])
    return Assets(
        checkpoint, base_release, teacher_release, phi_release, adapter_release,
        work / "replay", work / "holdout", work / "holdout_clean", work / "calibration",
    )  # fmt: skip


def detectors(
    cache: Path, seed: int, calibration: int, say: Say, calibrates: str = "calibration"
) -> tuple[Path, Path, Path]:
    """Make what is missing of the base's checkpoint, its release, and the teacher's release, each calibrated on
    `calibration` scenes of the split `calibrates`."""
    checkpoint = models.make_base(cache, seed, say)
    teacher = models.make_teacher(cache, seed, say)
    clean = labelled(make_scenes(calibrates, calibration, seed + 11, None, DIGITS))
    # The teacher is calibrated on what it is asked about: shifted scenes.
    mixed = [
        *clean[: calibration // 3],
        *labelled(make_scenes(calibrates, calibration, seed + 12, "mix", DIGITS)),
    ]
    base_release = _detector(cache, checkpoint, "digits@1.0", clean, say)
    return checkpoint, base_release, _detector(cache, teacher, "digits-teacher@1.0", mixed, say)


def _image(scene: Scene) -> LabelledImage:
    data = encode_png(scene.image)
    boxes = tuple(
        LabelledBox(LABELS[k], (float(b[0]), float(b[1]), float(b[2]), float(b[3])))
        for b, k in zip(scene.boxes, scene.classes, strict=True)
    )
    return LabelledImage(hashlib.sha256(data).hexdigest(), data, boxes, PROVENANCE)


def _detector(cache: Path, checkpoint: Path, release: str, calibration: Sequence[Labelled], say: Say) -> Path:
    told = hashlib.sha256(f"{checkpoint.name} {SCORE}".encode())
    for item in calibration:
        told.update(item.image.tobytes())
    for source in (*RELEASE, *DETECTOR):
        told.update((ROOT / source).read_bytes())

    def make(beside: Path) -> None:
        say(f"{release}: export, int8, calibration, golden set")
        package_vision(
            checkpoint, beside, release, labels=LABELS, imgsz=SIZE, calibration=calibration,
            thresholds=Thresholds(score=SCORE), lineage={"checkpoint": checkpoint.name},
        )  # fmt: skip

    return kept(cache / f"{release}-{told.hexdigest()[:12]}", make)


def _language(cache: Path, seed: int, say: Say) -> tuple[Path, Path]:
    base = phi.make_phi(cache, seed)
    adapter = phi.make_adapter(cache, base, seed)
    told = hashlib.sha256(json.dumps([base.name, adapter.name]).encode())
    for source in RELEASE:
        told.update((ROOT / source).read_bytes())
    key = told.hexdigest()[:12]

    def make_release(beside: Path) -> None:
        say("phi@1.0: GGUF from the checkpoint")
        gguf = export_gguf(base, beside.with_name("phi.gguf"))
        golden = [(e.prompt, e.base) for e in phi.EXAMPLES[:3]]
        package_language(gguf, beside, "phi@1.0", checkpoint=base, golden=golden)

    def make_lora(beside: Path) -> None:
        say("phi-style@1.0: LoRA adapter as GGUF")
        gguf = beside.with_name("phi-style.gguf")
        export_lora_gguf(adapter, base, gguf)
        golden = [(e.prompt, e.adapter) for e in phi.EXAMPLES[:3]]
        package_language(
            gguf, beside, "phi-style@1.0", checkpoint=base, golden=golden, adapter=adapter, base=reference(release)
        )

    release = kept(cache / f"phi@1.0-{key}", make_release)
    return release, kept(cache / f"phi-style@1.0-{key}", make_lora)
