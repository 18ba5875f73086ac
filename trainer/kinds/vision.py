"""Detectors, segmenters and classifiers: YOLO checkpoints fine-tuned, exported to ONNX and int8.

One way for the three of them: what differs is what a label must say (`LabelledImage.decode`) and how an answer is scored
(`trainer.evaluate`), and both know it by `models.NAME.kind`.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np

from edged.core.confidence import accept_threshold
from edged.engines.base import Image
from edged.wire.manifest import Calibration, ReleaseManifest
from trainer import calibrate
from trainer.candidate import candidate_manifest, complete_candidate, detector, export_int8
from trainer.core.evaluation import Evaluation
from trainer.core.gate import Evidence, Holdout, Verdict, judge
from trainer.core.parity import PARITY_KEY, Exported
from trainer.datasets import DatasetError, LabelledImage, shuffle_labels
from trainer.evaluate import Labelled, calibration_items, evaluate_release, image_sha256, observe
from trainer.evidence import gather
from trainer.export.golden_images import APART_KEY, Parts, part
from trainer.footprint import Profile, read_profile
from trainer.holdout import near_duplicates, remember
from trainer.jobfile import bring_samples
from trainer.kinds.vision_sets import Sets, examples, provenance, read_sets, untrained
from trainer.releases import Registry
from trainer.run import Run
from trainer.side_by_side import detector_latencies
from trainer.tuners.base import Work, tuner

log = logging.getLogger(__name__)
LEARNED_MAX = 2000  # images that tell the novelty reference what has been learned

# Keys of models.NAME that are the tuner's own, by the same names.
TUNING = ("method", "lora", "epochs", "patience", "imgsz", "batch", "lr", "replay_ratio", "device", "threads")


def begin(run: Run) -> Vision:
    """The training of a vision model; raises DatasetError when the weights to begin with are not there."""
    return Vision(run)


class Vision:
    """`trainer.kinds.base.Training` of a model that looks at images."""

    sets: Sets
    trained_on: list[LabelledImage]  # or stopped by
    calibration: list[Labelled]  # decoded, without what was trained on
    parts: Parts  # of the calibration: what sets the ranges of int8, and what proves parity
    exported: Exported
    manifest: ReleaseManifest  # of the candidate, calibrated
    ece: float | None  # expected calibration error on items not fitted
    target: list[Labelled]
    base: list[Labelled]
    new: Evidence
    old: Evidence

    def __init__(self, run: Run) -> None:
        self.run, self.job = run, run.job
        self.settings = self.job.config.model(self.job.model)
        registry = Registry(self.job.config.releases)
        self.current = registry.get(self.job.manifest.source)
        if self.current.manifest.kind != self.settings.kind:
            raise DatasetError(
                f"{self.job.manifest.source} is of kind {self.current.manifest.kind}, models.{self.job.model}.kind says "
                f"{self.settings.kind}: a model keeps its kind; correct the one, or give the other a name of its own"
            )
        self.checkpoint = self.job.config.checkpoint(self.job.manifest.source, self.job.model)
        first = registry.list(self.job.model)[0].ref.release
        if self.checkpoint == self.settings.checkpoint and self.job.manifest.source != first:
            raise DatasetError(
                f"models.{self.job.model}.checkpoint belongs to {first}, the first release; the weights of "
                f"{self.job.manifest.source} are wanted: put its .pt at "
                f"{self.job.config.checkpoints / (self.job.manifest.source + '.pt')}"
            )
        if not self.checkpoint.is_file():
            raise DatasetError(
                f"checkpoint {self.checkpoint} of {self.job.manifest.source} does not exist; "
                f"set models.{self.job.model}.checkpoint to the .pt file that the release was exported from"
            )

    def read(self) -> int:
        bring_samples(self.job)
        self.sets = read_sets(self.job, self.settings)
        selected = self.sets.selected
        self.run.facts["samples"] = {
            "named": len(self.job.manifest.samples),
            "training": len(selected.training),
            "validation": len(self.sets.validation),
            "calibration": len(selected.calibration),
            "left_out": selected.left_out,
            "replay": len(self.sets.replay),
            "validation_replay": len(self.sets.validation_replay),
            "near_duplicates": selected.near_duplicates,
            "provenance": provenance([*selected.training, *self.sets.validation, *selected.calibration]),
        }
        return self._used()

    def _used(self) -> int:
        """How many of the job's samples have a part in it."""
        selected = self.sets.selected
        return len(selected.training) + len(self.sets.validation) + len(selected.calibration)

    def check(self) -> None:
        sets, rules, model = self.sets, self.settings.gate_rules(), f"models.{self.job.model}"
        if not sets.selected.training:
            left_out = sets.selected.left_out
            raise DatasetError(f"none of {len(self.job.manifest.samples)} samples is usable: {left_out}")
        if self.settings.ablate:  # to see the gate refuse is what it is for
            return
        for key, items in (("holdout", sets.target), ("holdout_clean", sets.base)):
            found = {"images": len(items), "boxes": sum(len(item.boxes) for item in items)}
            for what, least in (("images", rules.images_min), ("boxes", rules.boxes_min)):
                if found[what] < least:
                    raise DatasetError(
                        f"{model}.{key}: {found[what]} {what}, {least} must judge ({model}.gate.{what}_min): give more with "
                        "`trainer holdout extend`"
                    )
        if len(sets.calibration) < calibrate.ITEMS_MIN:
            raise DatasetError(
                f"{model}.calibration: {len(sets.calibration)} images calibrate, of the folder and of the samples together; "
                f"{calibrate.ITEMS_MIN} are needed: put more labelled images that trained nothing into the folder"
            )

    def tune(self) -> None:
        sets = self.sets
        items, validation = [*sets.selected.training, *sets.replay], [*sets.validation, *sets.validation_replay]
        self.trained_on = [*items, *validation]
        remember(self.job.config, self.job.model, self.trained_on)
        self.run.facts["ablate"] = self.settings.ablate
        if self.settings.ablate == "train":
            log.warning("ablate = train: the release gets the weights of %s again", self.job.manifest.source)
            shutil.copyfile(self.checkpoint, self.run.folder / "model.pt")
            return
        if self.settings.ablate == "labels":
            log.warning("ablate = labels: every image gets another image's labels")
            items, validation = (shuffle_labels(each, self.settings.seed) for each in (items, validation))
        self._tune(items, validation)

    def _tune(self, items: list[LabelledImage], validation: list[LabelledImage]) -> None:
        from trainer.tuners.yolo import YoloSettings

        settings, scratch = self.settings, self.run.folder / "scratch"
        asked = settings.model_dump(include=set(TUNING))
        work = Work(
            base=self.checkpoint,
            data=examples(items, settings, frozenset(item.sha256 for item in self.sets.replay)),
            held_out=examples(validation, settings),
            out=self.run.folder / "model.pt",
            scratch=scratch,
            settings=YoloSettings.parse({**asked, "labels": tuple(settings.labels), "task": settings.kind}),
            seed=settings.seed,
            report=self.run.epoch,
        )
        tuned = tuner(self.job.strategy).tune(work)
        counts = {"trainable": tuned.trainable, "parameters": tuned.parameters}
        self.run.facts["training"] = {**counts, **tuned.facts}
        shutil.rmtree(scratch, ignore_errors=True)

    def export(self) -> None:
        self.calibration = untrained(self.sets.calibration, self.trained_on, self.settings)
        self.parts = part([item.image for item in self.calibration])
        self.exported = export_int8(
            self.run.folder / "model.pt",
            self.run.folder / "fp32",
            self.run.candidate,
            lambda folder: candidate_manifest(self.job, folder),
            self.parts,
            imgsz=self.settings.imgsz,
            seed=self.settings.seed,
        )

    def calibrate(self) -> None:
        settings, items = self.settings, self.calibration
        thresholds = settings.thresholds()
        folder = self.run.candidate
        with detector(folder, candidate_manifest(self.job, folder)) as engine:
            observed = observe(engine, [item.image for item in items])
            learned = [engine.prepare(image).stats for image in self._learned()]
        rows = calibration_items(observed, items, thresholds)
        fitted: Calibration = calibrate.fit(rows, thresholds, learned)
        self.ece = None
        if len(rows) >= calibrate.ITEMS_MIN:
            report = calibrate.cross_validate(rows, thresholds, learned)
            threshold = accept_threshold(fitted, settings.target_risk)
            found = {**report.to_dict(), "target_risk": settings.target_risk, "threshold": threshold}
            self.run.facts["calibration"] = found
            self.ece = report.ece
            if threshold > 1:
                log.warning(
                    "no answer of this release may be accepted at a target risk of %g: its errors among %d images bound "
                    "the risk at %.3f at best; calibrate on more images, or allow more risk",
                    settings.target_risk, len(rows), min(fitted.risk.bounds) if fitted.risk else 1.0,
                )  # fmt: skip
        self.manifest = candidate_manifest(self.job, folder, calibration=fitted)

    def _learned(self) -> Iterator[Image]:
        """Images that the weights have learned from, at most LEARNED_MAX of them, drawn evenly."""
        items = [] if self.settings.ablate == "train" else self.trained_on
        for item in items[:: max(1, math.ceil(len(items) / LEARNED_MAX))]:
            yield item.decode(self.settings.labels).image

    def evaluate(self) -> None:
        from trainer.tuners.yolo import weights_sha256

        self.target = [item.decode(self.settings.labels, self.settings.kind) for item in self.sets.target]
        self.base = [item.decode(self.settings.labels, self.settings.kind) for item in self.sets.base]
        manifest, current, profiles = self.manifest, self.current, self._profiles()
        self.run.progress("evaluate", what="the file before quantisation")
        before = evaluate_release(self.run.folder / "fp32", manifest, self.target).quality
        self.run.progress("evaluate", what="the candidate")
        trained, source = weights_sha256(self.run.folder / "model.pt"), weights_sha256(self.checkpoint)
        self.new = gather(
            self.run.candidate, manifest, self.target, self.base, weights_sha256=trained, calibration_ece=self.ece,
            export_before=before, profiles=profiles,
            parity=[
                replace(row, what=f"{report.format} {row.what}")
                for report in self.exported.parity for row in report.rows
            ],
        )  # fmt: skip
        self.run.progress("evaluate", what="the current release")
        self.old = gather(
            current.folder, current.manifest, self.target, self.base, weights_sha256=source, profiles=profiles
        )
        self._compare_latency()
        self.run.facts["evaluation"] = _evaluations(self.new, self.old)
        shutil.rmtree(self.run.folder / "fp32")  # only what ships is kept

    def _compare_latency(self) -> None:
        """Time both releases side by side: what the machine had to do while one of them was scored says nothing of it."""
        new, old = self.new.target, self.old.target
        if new is None or old is None:
            return
        self.run.progress("evaluate", what="how long answers take")
        sides = {
            "candidate": (self.run.candidate, self.manifest),
            "current": (self.current.folder, self.current.manifest),
        }
        took = detector_latencies(sides, [item.image for item in self.target])
        self.new = replace(self.new, target=replace(new, latency_ms_median=took["candidate"] or math.nan))
        self.old = replace(self.old, target=replace(old, latency_ms_median=took["current"] or math.nan))

    def _profiles(self) -> list[Profile]:
        return [read_profile(name, self.settings.kind) for name in self.settings.profiles]

    def judge(self) -> Verdict:
        settings, seen = self.settings, [*self.trained_on, *self.sets.calibration]
        judging = [*self.target, *self.base]
        again = near_duplicates([*self.sets.target, *self.sets.base], seen)
        holdout = Holdout(
            near_duplicates=frozenset(
                image_sha256(item.image) for item, known in zip(judging, again, strict=True) if known
            ),
            target=frozenset(image_sha256(item.image) for item in self.target),
            base=frozenset(image_sha256(item.image) for item in self.base),
            training=frozenset(image_sha256(item.decode(settings.labels, settings.kind).image) for item in seen),
        )
        targets = [profile.target for profile in self._profiles()]
        chance = np.random.default_rng(settings.seed)
        return judge(self.new, self.old, holdout, settings.gate_rules(), chance, targets)

    def summary(self) -> dict[str, Any]:
        """F1 on the holdouts, after and before."""
        found = {
            "accuracy": self.new.target, "accuracy_before": self.old.target,
            "accuracy_clean": self.new.base, "accuracy_clean_before": self.old.base,
        }  # fmt: skip
        return {
            **{name: round(each.f1, 4) for name, each in found.items() if each is not None},
            "samples_used": self._used(),
        }

    def complete(self, verdict: Verdict) -> None:
        holdouts = {"holdout_sha256": self.sets.holdout_sha256, "gate": verdict.to_dict()}
        evaluation = self.run.facts["evaluation"] | holdouts
        complete_candidate(
            self.job, self.manifest, self.parts, evaluation=evaluation, lineage=self._lineage()
        )  # fmt: skip

    def _lineage(self) -> dict[str, Any]:
        """Where a release comes from: its parent, its data, how it was trained, and what its export cost."""
        settings, new = self.settings, self.new
        return {
            "job": self.job.manifest.job,
            "parent": self.current.ref.model_dump(mode="json"),
            "samples": self.run.facts["samples"],
            "training_manifest_sha256": sha256(self.job.manifest.model_dump_json().encode()).hexdigest(),
            "training": {
                **settings.model_dump(mode="json", include={"seed", *TUNING} - {"device", "threads"}),
                "weights_sha256": new.weights_sha256,
            },
            # The same weights on the target holdout, in float32 and as they ship.
            "export": {"precision": "int8", "quality_float32": new.export_before, "quality": new.export_after},
            PARITY_KEY: self.exported.lineage(),
            APART_KEY: self.parts.lineage(),
        }


def _evaluations(new: Evidence, old: Evidence) -> dict[str, Any]:
    def summaries(first: Evaluation | None, second: Evaluation | None) -> dict[str, Any]:
        return {"candidate": first.summary() if first else None, "current": second.summary() if second else None}

    return {"target": summaries(new.target, old.target), "base": summaries(new.base, old.base)}
