"""One training job from its data to a candidate release, in a process of its own. Every kind of model goes this way:

    data -> tune -> export -> calibrate -> evaluate -> gate -> candidate

Everything after the export judges the files that ship, with the engine that devices run them on; what differs by kind is
in `trainer.kinds`. The run's folder is written as the run goes; `metadata.json` appears last, so that a run without it
did not finish.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from edged.engines.base import EngineError
from trainer.checkpoints import CheckpointError
from trainer.child import PROGRESS
from trainer.core.gate import Verdict
from trainer.datasets import DatasetError
from trainer.ending import Known, TooFewSamples, end
from trainer.export.gguf_architectures import ExportError
from trainer.files import write_whole
from trainer.jobfile import MANIFEST, TrainJob
from trainer.kinds import begin
from trainer.releases import ReleaseError
from trainer.run import FACTS, Hear, Run
from trainer.trained import begun
from trainer.tuners.settings import SettingsError

__all__ = ["TooFewSamples", "train"]

log = logging.getLogger(__name__)


def train(job: TrainJob, *, samples_min: int | None = None, hear: Hear = lambda _line: None) -> dict[str, Any]:
    """Run the job and return what metadata.json says: `outcome` is `passed`, `refused` (by the gate) or `failed`.

    `hear` is told how it goes. Raises TooFewSamples before anything is trained when fewer than `samples_min` samples are
    usable; then nothing is left of the run.
    """
    job.run.mkdir(parents=True, exist_ok=True)
    for name in (PROGRESS, FACTS):
        (job.run / name).unlink(missing_ok=True)
    run, started = Run(job, hear), time.time()
    summary: dict[str, Any] = {}
    try:
        verdict, summary = _run(run, samples_min)
        outcome = "passed" if verdict.passed else "refused"
        reason = "; ".join(verdict.reasons) or "the gate passed"
    except TooFewSamples:
        for name in (PROGRESS, FACTS):
            (job.run / name).unlink(missing_ok=True)
        if not any(job.run.iterdir()):
            job.run.rmdir()
        raise
    except (DatasetError, ReleaseError, EngineError, SettingsError, ExportError, CheckpointError, OSError) as error:
        outcome, reason = "failed", str(error)
    except Exception as error:  # of whatever kind a library has: the run says how it ended
        log.exception("the run failed")
        outcome, reason = "failed", str(error) or type(error).__name__
    known = Known(run.timings_s, run.history, run.facts)
    return end(job, outcome, reason, known, summary=summary, started=started, finished=time.time())


def _run(run: Run, samples_min: int | None) -> tuple[Verdict, dict[str, Any]]:
    training = begin(run, run.job.kind)
    with run.stage("data"):
        usable = training.read()
    log.info("samples: %s", run.facts.get("samples"))
    if samples_min is not None and usable < samples_min:
        raise TooFewSamples(f"{usable} usable samples, {samples_min} are needed")
    training.check()
    begun(run.job.config, run.job.model, run.job.manifest)
    manifest = run.folder / MANIFEST
    if not manifest.is_file():  # what it takes to train the same again
        write_whole(manifest, run.job.manifest.model_dump_json(indent=2).encode())
    with run.stage("train"):
        training.tune()
    with run.stage("export"):
        training.export()
    with run.stage("calibrate"):
        training.calibrate()
    with run.stage("evaluate"):
        training.evaluate()
    verdict = training.judge()
    run.facts["gate"] = verdict.to_dict()
    for check in verdict.checks:
        log.info("gate: %s %s: %s", "passed" if check.passed else "REFUSED", check.name, check.reason)
    if verdict.passed:
        with run.stage("release"):
            training.complete(verdict)
    return verdict, training.summary()
