"""What a training job is given, and what it would do: light, so that a dry run needs none of the heavy packages."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edged.wire.manifest import ReleaseId, TrainingManifest, TrainingSample
from trainer.child import METADATA
from trainer.config import Model, TrainerConfig
from trainer.config_text import TextModel, own_names
from trainer.core.provenance import is_own, sureness
from trainer.releases import Registry, ReleaseError
from trainer.tuners.settings import parse_settings

LATEST = "latest.json"  # beside the runs: how the last one that came to its end went
STRATEGIES = {"vision": ("yolo",), "text": ("lora", "dpo")}  # the first is what is taken unless another one is named
MANIFEST, SCRATCH = "manifest.json", "scratch"  # of a run: what it trains on; its checkpoints, gone when it has trained
_LABELS, _IMAGES = "labels.jsonl", "images"


class JobError(ValueError):
    """A job cannot be made of what was given; the message names what is wrong and the fix."""


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What to train. `samples` holds the pixels, each file named by its SHA-256; `run` is the folder to write. `dataset`:
    the dataset.jsonl of a language job, or the labelled folder whose pixels are still to be put into `samples`."""

    config: TrainerConfig
    model: str
    manifest: TrainingManifest
    samples: Path
    run: Path
    strategy: str = "yolo"
    dataset: Path | None = None

    @property
    def settings(self) -> Model | TextModel:
        """The model's table of the configuration."""
        return self.config.any_model(self.model)

    @property
    def kind(self) -> str:
        """The kind of model that is trained."""
        return self.settings.kind

    def describe(self) -> dict[str, Any]:
        """The job as metadata.json says it."""
        return {
            "job": self.manifest.job,
            "model": self.model,
            "kind": self.kind,
            "strategy": self.strategy,
            "dataset": str(self.dataset) if self.dataset else None,
            "source": self.manifest.source,
            "target": self.manifest.target,
            "config": self.settings.model_dump(mode="json"),
            "seed": self.settings.seed,
        }

    def command(self) -> str:
        """How to train the same again."""
        given = f"--dataset {self.dataset}" if self.dataset else f"--manifest {self.run / 'manifest.json'}"
        return f"trainer train --model {self.model} --strategy {self.strategy} {given}"


def strategies(settings: Model | TextModel) -> tuple[str, ...]:
    """What improves such a model, the usual one first: of a language model the configured one."""
    if isinstance(settings, TextModel):
        return tuple(sorted(STRATEGIES["text"], key=lambda each: each != settings.strategy))
    return STRATEGIES["vision"]


def choose_model(config: TrainerConfig, name: str | None, strategy: str | None) -> tuple[str, str]:
    """The model and the strategy that a command line means, where that is clear. Raises JobError, ConfigError."""
    every = [each for known in STRATEGIES.values() for each in known]
    if strategy is not None and strategy not in every:
        raise JobError(f"--strategy {strategy}: no such strategy; use one of {', '.join(every)}")
    if name is None:
        fitting = [each for each, settings in config.models.items() if strategy in (None, *strategies(settings))]
        if len(fitting) != 1:
            known = ", ".join(sorted(fitting)) or "none"
            raise JobError(f"--model is missing: name one of those that could be meant: {known}")
        name = fitting[0]
    known_strategies = strategies(config.any_model(name))
    if strategy is not None and strategy not in known_strategies:
        raise JobError(f"--strategy {strategy}: model {name} is improved by {', '.join(known_strategies)}")
    return name, strategy or known_strategies[0]


def needed(settings: Model | TextModel, samples_min: int | None) -> int:
    """How many usable samples call for a training: `samples_min`, else more than the configured threshold."""
    return samples_min if samples_min is not None else settings.threshold + 1


def dataset_job(
    config: TrainerConfig, model: str, strategy: str, dataset: Path, run: Path, *, created: str, job: str
) -> TrainJob:
    """A job on a data set that lies here: a labelled folder, or the dataset.jsonl of a language model.

    Raises JobError, and ReleaseError when there is no release to begin with.
    """
    settings = config.any_model(model)
    registry = Registry(config.releases)
    if isinstance(settings, TextModel):
        if not dataset.is_file():
            raise JobError(f"--dataset {dataset}: no such file; a language model learns from a dataset.jsonl")
        source = settings.base or _newest(registry, model, "llm")
        target = str(registry.next_version(settings.adapter_name(model)))
        rows = _examples(dataset, strategy)
    else:
        if not (dataset / _LABELS).is_file():
            raise JobError(f"--dataset {dataset}: no {_LABELS} is there; a vision model learns from a labelled folder")
        source, target = _newest(registry, model, settings.kind), str(registry.next_version(model))
        rows = [sample for sample, _ in _labelled(dataset)]
    registry.get(source)
    manifest = TrainingManifest(
        job=job, model=model, source=source, target=target, created=created,
        config=settings.model_dump(mode="json"), samples=rows,
    )  # fmt: skip
    return TrainJob(config, model, manifest, run / "samples", run, strategy, dataset)


def continued(job: TrainJob) -> TrainJob:
    """The same job in the folder of a run that a kill has left half done, the newest one; the job itself without such.

    The same: on these samples with who labelled them, from this release to this one, as it is configured.
    """

    def same(folder: Path) -> bool:
        try:
            told = TrainingManifest.model_validate_json((folder / MANIFEST).read_bytes())
        except (OSError, ValueError):
            return False
        here = job.manifest.model_copy(update={"job": told.job, "created": told.created})
        return told == here

    runs = [each for each in job.run.parent.glob(f"{job.model}-*") if (each / SCRATCH).is_dir()]
    for folder in sorted((each for each in runs if not (each / METADATA).exists()), reverse=True):
        if same(folder):
            manifest = job.manifest.model_copy(update={"job": folder.name})
            samples = folder / "samples" if job.samples == job.run / "samples" else job.samples
            return replace(job, run=folder, samples=samples, manifest=manifest)
    return job


def bring_samples(job: TrainJob) -> None:
    """Put the pixels of a labelled folder where the job expects them; raises OSError."""
    if job.dataset is None or job.kind == "llm":
        return
    job.samples.mkdir(parents=True, exist_ok=True)
    for sample, image in _labelled(job.dataset):
        target = job.samples / sample.sha256
        if not target.is_file():
            try:
                os.link(image, target)
            except OSError:  # another file system, or one without links
                shutil.copyfile(image, target)


def plan(job: TrainJob) -> dict[str, Any]:
    """What `train` would do, from the data and the configuration alone (for --dry-run)."""
    settings = job.settings
    said: dict[str, Any] = {
        "action": "dry_run",
        "job": job.manifest.job,
        "model": job.model,
        "strategy": job.strategy,
        "source": job.manifest.source,
        "target": job.manifest.target,
        "output_dir": str(job.run),
    }
    if isinstance(settings, TextModel):
        return said | _text_plan(job, settings)
    here = {sample.sha256 for sample, image in _labelled(job.dataset) if image.is_file()} if job.dataset else set()
    there = {each.sha256 for each in job.manifest.samples if each.sha256 in here or _lies(job, each)}
    refused = refusals(job)
    checkpoint = job.config.checkpoint(job.manifest.source, job.model)
    return said | {
        "samples": len(job.manifest.samples),
        "samples_here": len(there),
        "samples_usable": len(there - refused.keys()),
        "left_out": dict(sorted(Counter(refused.values()).items())),
        "problems": _absent(job, {"checkpoint": checkpoint, "calibration": settings.calibration / _LABELS,
                                  "holdout": settings.holdout / _LABELS,
                                  "holdout_clean": settings.holdout_clean / _LABELS}),
        "checkpoint": str(checkpoint),
        "epochs": settings.epochs,
        "lora": settings.lora.model_dump(mode="json"),
    }  # fmt: skip


def refusals(job: TrainJob) -> dict[str, str]:
    """The samples (SHA-256) of a job that may not train, whatever else is there, each with the reason.

    What only the whole set tells (near-duplicates, what lies beside a holdout) is known when the training reads it.
    """
    settings = job.settings
    if isinstance(settings, TextModel):
        from trainer.kinds.texts import may_not_train, read

        names = own_names(job.model, settings)
        if job.dataset is None:
            return {}
        found = {
            each.identity: may_not_train(each, names, settings.label_confidence_min)
            for each in read(job.dataset, job.strategy)[0]
        }
    else:
        from trainer.datasets import may_not_train as refused

        found = {
            each.sha256: refused(job.model, each, settings.label_confidence_min, settings.kind)
            for each in job.manifest.samples
        }
    return {sample: reason for sample, reason in found.items() if reason}


def _lies(job: TrainJob, sample: TrainingSample) -> bool:
    return (job.samples / sample.sha256).is_file()


def _absent(job: TrainJob, paths: Mapping[str, Path]) -> list[str]:
    """What the training would miss: the keys of models.NAME with the files that are not there."""
    return [f"models.{job.model}.{key}: {path} is not there" for key, path in paths.items() if not path.is_file()]


def _text_plan(job: TrainJob, settings: TextModel) -> dict[str, Any]:
    from trainer.kinds.tuning import reader, tuner_for

    tuning = parse_settings(tuner_for(job.strategy, "llm").settings, settings.asked(), f"models.{job.model}.tuning")
    paths = {"checkpoint": settings.checkpoint / "config.json"}
    paths |= {"holdout": settings.holdout} if settings.holdout is not None else {}
    paths |= {"holdout_base": settings.holdout_base} if settings.holdout_base is not None else {}
    problems = _absent(job, paths)
    if job.dataset is None:  # a manifest: what devices kept, as far as it is here
        names, least = own_names(job.model, settings), settings.label_confidence_min
        reasons = [_manifest_refusal(each, names, least) for each in job.manifest.samples if _lies(job, each)]
        return {
            "samples": len(job.manifest.samples),
            "samples_usable": reasons.count(""),
            "left_out": dict(sorted(Counter(filter(None, reasons)).items())),
            "problems": problems,
            "checkpoint": str(settings.checkpoint),
            "settings": tuning.model_dump(mode="json"),
        }
    examples, bad, unpaired = reader(job.strategy)(job.dataset)
    refused = refusals(job)
    usable = {each.sha256 for each in job.manifest.samples} - refused.keys()
    return {
        "dataset": str(job.dataset),
        "samples": len(examples) + len(bad),
        "samples_usable": len(usable),
        "left_out": unpaired | dict(sorted(Counter(refused.values()).items())),
        "problems": problems,
        "bad_lines": [f"line {number}: {reason}" for number, reason in bad],
        "checkpoint": str(settings.checkpoint),
        "settings": tuning.model_dump(mode="json"),
    }


def _manifest_refusal(sample: TrainingSample, names: Sequence[str], confidence_min: float) -> str:
    """Why a text of a manifest may not train; "" when it may."""
    if any(is_own(name, sample.provenance, sample.device) for name in names):
        return "own_prediction"
    return "below_label_confidence" if sureness(sample.label.get("confidence", 0.0)) < confidence_min else ""


def _examples(dataset: Path, strategy: str) -> list[TrainingSample]:
    """The examples of a dataset.jsonl as samples, each named by what is said in it."""
    from trainer.kinds.texts import read

    return [
        TrainingSample(
            id=each.identity[:16],
            device=str(each.provenance.get("device") or ""),
            sha256=each.identity,
            label={"text": each.wanted, "other": each.other},
            provenance=dict(each.provenance),
        )
        for each in read(dataset, strategy)[0]
    ]


def _newest(registry: Registry, model: str, kind: str) -> str:
    stored = [each for each in registry.list(model) if each.manifest.kind == kind]
    if not stored:
        raise ReleaseError(
            f"no release of {model} of kind {kind} is registered, so there is none to improve: make the first one "
            "(`trainer release make`, `trainer release make-phi`) and add it (`trainer release add`)"
        )
    return str(max((each.ref.release for each in stored), key=ReleaseId))


def _labelled(folder: Path) -> Iterator[tuple[TrainingSample, Path]]:
    """The lines of a labelled folder (`trainer.datasets`) as samples, with the files of their pixels; raises JobError."""
    path = folder / _LABELS
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            said = row.get("provenance") or {}
            boxes = row["boxes"] if "class" not in row else [{"label": row["class"]}]
            label = {"boxes": boxes, "confidence": float(said.get("confidence", 1.0))}
            sample = TrainingSample(
                id=row["file"], device=str(said.get("device", "")), sha256=row["sha256"], label=label, provenance=said
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JobError(f"{path}, line {number}: {type(error).__name__}: {error}: correct the line") from None
        yield sample, folder / _IMAGES / Path(sample.id).name
