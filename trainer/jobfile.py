"""What a training job is given, and what it would do: light, so that a dry run needs none of the heavy packages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edged.wire.manifest import TrainingManifest
from trainer.config import TrainerConfig

LATEST = "latest.json"  # beside the runs: how the last one that came to its end went


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What to train. `samples` holds the pixels, each file named by its SHA-256; `run` is the folder to write."""

    config: TrainerConfig
    model: str
    manifest: TrainingManifest
    samples: Path
    run: Path

    @property
    def kind(self) -> str:
        """The kind of model that is trained."""
        return self.config.model(self.model).kind

    def describe(self) -> dict[str, Any]:
        """The job as metadata.json says it."""
        settings = self.config.model(self.model)
        return {
            "job": self.manifest.job,
            "model": self.model,
            "kind": self.kind,
            "source": self.manifest.source,
            "target": self.manifest.target,
            "config": settings.model_dump(mode="json"),
            "seed": settings.seed,
        }


def plan(job: TrainJob) -> dict[str, Any]:
    """What `train` would do, from the manifest and the configuration alone (for --dry-run)."""
    settings = job.config.model(job.model)
    there = [each for each in job.manifest.samples if (job.samples / each.sha256).is_file()]
    sure = [each for each in there if each.label.get("confidence", 0.0) >= settings.label_confidence_min]
    return {
        "action": "dry_run",
        "job": job.manifest.job,
        "source": job.manifest.source,
        "target": job.manifest.target,
        "samples": len(job.manifest.samples),
        "samples_here": len(there),
        "samples_usable": len(sure),
        "checkpoint": str(job.config.checkpoint(job.manifest.source, job.model)),
        "epochs": settings.epochs,
        "lora": settings.lora.model_dump(mode="json"),
        "output_dir": str(job.run),
    }
