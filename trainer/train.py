"""One training job from manifest to candidate release, in a process of its own.

    samples + replay -> LoRA fine-tuning -> ONNX -> int8 -> calibration -> evaluation on the frozen holdouts -> gate

Everything after the export judges the int8 file with the engine that devices run it on. The run's folder is written as
the run goes; `metadata.json` appears last, so that a run without it did not finish.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from edged.core.confidence import accept_threshold
from edged.engines.base import EngineError
from edged.wire.manifest import Calibration, ReleaseManifest
from trainer import calibrate
from trainer.candidate import candidate_manifest, complete_candidate, detector, export_int8
from trainer.child import METADATA, PROGRESS
from trainer.config import Model
from trainer.core.evaluation import Evaluation
from trainer.core.gate import Evidence, Holdout, Verdict, judge
from trainer.datasets import (
    Apart,
    DatasetError,
    LabelledImage,
    Selected,
    choose_replay,
    read_folder,
    select_samples,
    shuffle_labels,
)
from trainer.evaluate import Labelled, calibration_items, evaluate, evaluate_release, image_sha256, observe
from trainer.files import sha256_of, write_json
from trainer.holdout import check_frozen, near_duplicates, remember
from trainer.jobfile import TrainJob
from trainer.releases import Registry, ReleaseError, StoredRelease

log = logging.getLogger(__name__)


class TooFewSamples(ValueError):
    """Fewer usable samples than the threshold asks for; the message names both numbers."""


@dataclass(slots=True)
class _Sets:
    """All images of a job, apart from each other."""

    selected: Selected
    replay: list[LabelledImage]
    calibration: list[LabelledImage]
    target: list[LabelledImage]
    base: list[LabelledImage]
    holdout_sha256: dict[str, str]


@dataclass(slots=True)
class _Record:
    """What metadata.json will say."""

    timings_s: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def train(job: TrainJob, *, require_more_than: int | None = None) -> dict[str, Any]:
    """Run the job and return what metadata.json says: `outcome` is `passed`, `refused` (by the gate) or `failed`.

    Raises TooFewSamples before anything is trained when no more than `require_more_than` samples are usable.
    """
    job.run.mkdir(parents=True, exist_ok=True)
    (job.run / PROGRESS).unlink(missing_ok=True)
    record, started = _Record(), time.time()
    summary: dict[str, Any] = {}
    try:
        verdict, summary = _run(job, record, require_more_than)
        outcome = "passed" if verdict.passed else "refused"
        reason = "; ".join(verdict.reasons) or "the gate passed"
    except (DatasetError, ReleaseError, EngineError, OSError) as error:
        outcome, reason = "failed", str(error)
    except TooFewSamples:
        raise
    except ValueError as error:
        log.exception("the run failed")
        outcome, reason = "failed", str(error)
    metadata = {
        "job": job.manifest.job,
        "model": job.model,
        "source": job.manifest.source,
        "target": job.manifest.target,
        "outcome": outcome,
        "reason": reason,
        "summary": summary,
        "config": job.config.model(job.model).model_dump(mode="json"),
        "seed": job.config.model(job.model).seed,
        "started": started,
        "finished": time.time(),
        "timings_s": record.timings_s,
        **record.facts,
    }
    write_json(job.run / METADATA, metadata)
    write_json(job.run.parent / "latest.json", {"run": job.run.name, "outcome": outcome, "target": job.manifest.target})
    return metadata


def _run(job: TrainJob, record: _Record, require_more_than: int | None) -> tuple[Verdict, dict[str, Any]]:
    settings = job.config.model(job.model)
    current = Registry(job.config.releases).get(job.manifest.source)
    checkpoint = job.config.checkpoint(job.manifest.source, job.model)
    first = Registry(job.config.releases).list(job.model)[0].ref.release
    if checkpoint == settings.checkpoint and job.manifest.source != first:
        raise DatasetError(
            f"models.{job.model}.checkpoint belongs to {first}, the first release; the weights of {job.manifest.source} "
            f"are wanted: put its .pt at {job.config.checkpoints / (job.manifest.source + '.pt')}"
        )
    if not checkpoint.is_file():
        raise DatasetError(
            f"checkpoint {checkpoint} of {job.manifest.source} does not exist; "
            f"set models.{job.model}.checkpoint to the .pt file that the release was exported from"
        )
    with _stage(job, record, "data"):
        sets = _read_sets(job, settings)
    usable = len(sets.selected.training) + len(sets.selected.calibration)
    record.facts["samples"] = {
        "named": len(job.manifest.samples),
        "training": len(sets.selected.training),
        "calibration": len(sets.selected.calibration),
        "left_out": sets.selected.left_out,
        "replay": len(sets.replay),
        "near_duplicates": sets.selected.near_duplicates,
    }
    log.info("samples: %s", record.facts["samples"])
    if require_more_than is not None and usable <= require_more_than:
        raise TooFewSamples(f"{usable} usable samples, more than {require_more_than} are needed")
    if not sets.selected.training:
        raise DatasetError(f"none of {len(job.manifest.samples)} samples is usable: {sets.selected.left_out}")
    remember(job.config, job.model, [*sets.selected.training, *sets.replay])
    with _stage(job, record, "train"):
        training = _train_weights(job, settings, checkpoint, sets, record)
    calibration = _untrained(sets.calibration, training, settings)
    with _stage(job, record, "export"):
        export_int8(
            job.run / "model.pt",
            job.run / "fp32",
            job.run / "candidate",
            lambda folder: candidate_manifest(job, folder),
            calibration,
            imgsz=settings.imgsz,
            seed=settings.seed,
        )
    with _stage(job, record, "calibrate"):
        manifest, ece = _calibrate(job, settings, calibration, record)
    with _stage(job, record, "evaluate"):
        target = [item.decode(settings.labels) for item in sets.target]
        base = [item.decode(settings.labels) for item in sets.base]
        new, old = _evidence(job, manifest, current, checkpoint, target, base, ece)
    shutil.rmtree(job.run / "fp32")  # only what ships is kept
    seen = [*training, *sets.calibration]
    holdout = Holdout(
        target=frozenset(image_sha256(item.image) for item in target),
        base=frozenset(image_sha256(item.image) for item in base),
        training=frozenset(image_sha256(item.decode(settings.labels).image) for item in seen),
    )
    verdict = judge(new, old, holdout, settings.gate_rules(), np.random.default_rng(settings.seed))
    summary = _summary(new, old, usable)
    record.facts |= {"gate": verdict.to_dict(), "evaluation": _evaluations(new, old)}
    for check in verdict.checks:
        log.info("gate: %s %s: %s", "passed" if check.passed else "REFUSED", check.name, check.reason)
    if verdict.passed:
        with _stage(job, record, "release"):
            evaluation = record.facts["evaluation"] | {
                "holdout_sha256": sets.holdout_sha256, "gate": verdict.to_dict(),
            }  # fmt: skip
            lineage = _lineage(job, settings, current, record, new)
            complete_candidate(job, manifest, calibration, evaluation=evaluation, lineage=lineage)
    return verdict, summary


def _read_sets(job: TrainJob, settings: Model) -> _Sets:
    target, base = read_folder(settings.holdout), read_folder(settings.holdout_clean)
    hashes = {
        "target": check_frozen(job.config, job.model, "target", target, time.time()),
        "base": check_frozen(job.config, job.model, "base", base, time.time()),
    }
    test = read_folder(settings.holdout_test) if settings.holdout_test is not None else []
    if test:
        hashes["test"] = check_frozen(job.config, job.model, "test", test, time.time())
    judges = [*target, *base, *test]
    held_out = frozenset(item.sha256 for item in judges)
    folder = read_folder(settings.calibration)
    shared = [item for item in folder if item.sha256 in held_out]
    if shared:
        raise DatasetError(
            f"{settings.calibration}: {len(shared)} of its images are in a holdout ({shared[0].sha256[:12]}...): "
            "what calibrates cannot judge; take them out of one of the two"
        )
    past = read_folder(settings.replay) if settings.replay is not None else []
    trained = {item.sha256 for item in past}.intersection(item.sha256 for item in folder)
    if trained:
        raise DatasetError(
            f"{settings.calibration}: {len(trained)} of its images are in {settings.replay} ({min(trained)[:12]}...): "
            "on what the weights have learned they look surer than they are; take them out of the calibration"
        )
    again = near_duplicates(folder, judges)
    if any(again):
        log.warning("%d calibration images are left out: nearly the same pictures are in a holdout", sum(again))
        folder = [item for item, known in zip(folder, again, strict=True) if not known]
    selected = select_samples(
        job.manifest,
        job.samples,
        labels=settings.labels,
        confidence_min=settings.label_confidence_min,
        held_out=held_out | frozenset(item.sha256 for item in folder),
        calibration_share=settings.calibration_share,
        apart=Apart(judges, folder, settings.split_guard_s),
        split=settings.split_rules(),
        thin=settings.near_duplicates == "thin",
    )
    count = round(settings.replay_ratio * len(selected.training))
    excluded = held_out | frozenset(item.sha256 for item in selected.calibration)
    replay = choose_replay(past, count, settings.seed, excluded, [*judges, *folder, *selected.calibration])
    return _Sets(selected, replay, [*folder, *selected.calibration], target, base, hashes)


def _untrained(items: list[LabelledImage], trained: list[LabelledImage], settings: Model) -> list[Labelled]:
    """The calibration's images, decoded, without those whose pixels were trained on under another file's hash."""
    known = {image_sha256(item.decode(settings.labels).image) for item in trained}
    decoded = [item.decode(settings.labels) for item in items]
    fresh = [item for item in decoded if image_sha256(item.image) not in known]
    if len(fresh) < len(decoded):
        log.warning("%d calibration images are left out: their pixels are trained on", len(decoded) - len(fresh))
    return fresh


def _train_weights(
    job: TrainJob, settings: Model, checkpoint: Path, sets: _Sets, record: _Record
) -> list[LabelledImage]:
    """Make `model.pt` in the run's folder; the images that it was trained on."""
    items = [*sets.selected.training, *sets.replay]
    record.facts["ablate"] = settings.ablate
    if settings.ablate == "train":
        log.warning("ablate = train: the release gets the weights of %s again", job.manifest.source)
        shutil.copyfile(checkpoint, job.run / "model.pt")
        return items
    if settings.ablate == "labels":
        log.warning("ablate = labels: every image gets another image's labels")
        items = shuffle_labels(items, settings.seed)
    from trainer.tuners.yolo import TrainSettings, tune_lora, write_yolo_dataset

    dataset = job.run / "dataset"
    shutil.rmtree(dataset, ignore_errors=True)
    decoded = [(item, item.decode(settings.labels)) for item in items]
    rows = [(item.sha256, each.image, each.boxes, each.classes) for item, each in decoded]
    yaml = write_yolo_dataset(dataset, rows, settings.labels)
    trained = tune_lora(
        checkpoint,
        yaml,
        job.run / "model.pt",
        settings.lora,
        TrainSettings(
            epochs=settings.epochs,
            imgsz=settings.imgsz,
            batch=settings.batch,
            lr=settings.lr,
            seed=settings.seed,
            threads=settings.threads,
        ),
        lambda epoch, epochs, metrics: _progress(job, "train", epoch=epoch, epochs=epochs, **metrics),
    )
    record.facts["training"] = {"trainable": trained.trainable, "parameters": trained.parameters, **trained.metrics}
    shutil.rmtree(dataset)  # the manifest says what was in it; the devices keep the images
    return items


def _calibrate(
    job: TrainJob, settings: Model, items: list[Labelled], record: _Record
) -> tuple[ReleaseManifest, float | None]:
    """The candidate's manifest with its calibration, and the expected calibration error on items not fitted."""
    thresholds = settings.thresholds()
    folder = job.run / "candidate"
    with detector(folder, candidate_manifest(job, folder)) as engine:
        observed = observe(engine, [item.image for item in items])
    rows = calibration_items(observed, items, thresholds)
    fitted: Calibration = calibrate.fit(rows, thresholds)
    ece = None
    if len(rows) >= calibrate.ITEMS_MIN:
        report = calibrate.cross_validate(rows, thresholds)
        threshold = accept_threshold(fitted, settings.target_risk)
        record.facts["calibration"] = {**report.to_dict(), "target_risk": settings.target_risk, "threshold": threshold}
        ece = report.ece
        if threshold > 1:
            log.warning(
                "no answer of this release may be accepted at a target risk of %g: its errors among %d images bound the "
                "risk at %.3f at best; calibrate on more images, or allow more risk",
                settings.target_risk, len(rows), min(fitted.risk.bounds) if fitted.risk else 1.0,
            )  # fmt: skip
    return candidate_manifest(job, folder, calibration=fitted), ece


def _evidence(
    job: TrainJob,
    manifest: ReleaseManifest,
    current: StoredRelease,
    checkpoint: Path,
    target: list[Labelled],
    base: list[Labelled],
    ece: float | None,
) -> tuple[Evidence, Evidence]:
    """What was measured of the candidate and of the release that runs now, on the same images."""
    folder = job.run / "candidate"
    _progress(job, "evaluate", what="the file before quantisation")
    before = evaluate_release(job.run / "fp32", manifest, target).map50
    _progress(job, "evaluate", what="the candidate")
    with detector(folder, manifest) as engine:
        new_target = evaluate(engine, target, manifest.thresholds, manifest.release)
        new_base = evaluate(engine, base, manifest.thresholds, manifest.release)
    _progress(job, "evaluate", what="the current release")
    with detector(current.folder, current.manifest) as engine:
        old_target = evaluate(engine, target, current.manifest.thresholds, current.ref.release)
        old_base = evaluate(engine, base, current.manifest.thresholds, current.ref.release)
    method = manifest.calibration.method
    model = sha256_of(folder / manifest.files["model"].path)
    from trainer.tuners.yolo import weights_sha256

    trained, source = weights_sha256(job.run / "model.pt"), weights_sha256(checkpoint)
    new = Evidence(model, trained, new_target, new_base, method, ece, before, new_target.map50)
    return new, Evidence(current.manifest.files["model"].sha256, source, old_target, old_base)


def _lineage(job: TrainJob, settings: Model, current: StoredRelease, record: _Record, new: Evidence) -> dict[str, Any]:
    """Where a release comes from: its parent, its data, how it was trained, and what its export cost."""
    return {
        "job": job.manifest.job,
        "parent": current.ref.model_dump(mode="json"),
        "samples": record.facts["samples"],
        "training_manifest_sha256": sha256(job.manifest.model_dump_json().encode()).hexdigest(),
        "training": {
            **{name: getattr(settings, name) for name in ("imgsz", "epochs", "batch", "lr", "replay_ratio", "seed")},
            "lora": settings.lora.model_dump(mode="json"),
            "weights_sha256": new.weights_sha256,
        },
        # The same weights on the target holdout, in float32 and as they ship.
        "export": {"precision": "int8", "map50_float32": new.export_before, "map50": new.export_after},
    }


def _evaluations(new: Evidence, old: Evidence) -> dict[str, Any]:
    def summaries(first: Evaluation | None, second: Evaluation | None) -> dict[str, Any]:
        return {"candidate": first.summary() if first else None, "current": second.summary() if second else None}

    return {"target": summaries(new.target, old.target), "base": summaries(new.base, old.base)}


def _summary(new: Evidence, old: Evidence, samples_used: int) -> dict[str, Any]:
    """The few figures that a job's status shows: F1 on the holdouts, after and before."""
    assert new.target is not None and old.target is not None
    assert new.base is not None and old.base is not None
    return {
        "accuracy": round(new.target.f1, 4),
        "accuracy_before": round(old.target.f1, 4),
        "accuracy_clean": round(new.base.f1, 4),
        "accuracy_clean_before": round(old.base.f1, 4),
        "samples_used": samples_used,
    }


@contextmanager
def _stage(job: TrainJob, record: _Record, name: str) -> Iterator[None]:
    started = time.perf_counter()
    _progress(job, name)
    yield
    record.timings_s[name] = round(time.perf_counter() - started, 2)
    log.info("%s took %.1f s", name, record.timings_s[name])


def _progress(job: TrainJob, stage: str, **fields: Any) -> None:
    """One line of progress for whoever watches: in the run's folder and on standard error."""
    line = json.dumps({"ts": time.time(), "stage": stage, **fields})
    with (job.run / PROGRESS).open("a") as file:
        file.write(line + "\n")
    print(line, file=sys.stderr, flush=True)
