"""What a training leaves when it ends, however it ends: metadata.json, the model card, and what the ledger says of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.child import METADATA
from trainer.files import write_json, write_whole
from trainer.jobfile import LATEST, TrainJob
from trainer.run import FACTS
from trainer.trained import ended

log = logging.getLogger(__name__)


class TooFewSamples(ValueError):
    """Fewer usable samples than the threshold asks for; the message names both numbers."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a run at its end: the seconds that its stages took, what each epoch gave, and its facts."""

    timings_s: Mapping[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    facts: Mapping[str, Any] = field(default_factory=dict)


def end(
    job: TrainJob,
    outcome: str,
    reason: str,
    known: Known,
    *,
    summary: Mapping[str, Any],
    started: float,
    finished: float,
) -> dict[str, Any]:
    """Write how the run ended, `outcome` being `passed`, `refused` or `failed`; what metadata.json says. Raises OSError."""
    metadata = {
        **job.describe(),
        "outcome": outcome,
        "reason": reason,
        "summary": dict(summary),
        "started": started,
        "finished": finished,
        "timings_s": dict(known.timings_s),
        "history": known.history,
        **known.facts,
    }
    # The ledger before metadata.json: whoever sees that the run has ended sees that its samples are used.
    ended(job.config, job.model, job.manifest, outcome, finished)
    _describe(job, metadata)
    write_json(job.run / METADATA, metadata)
    (job.run / FACTS).unlink(missing_ok=True)
    write_json(job.run.parent / LATEST, {"run": job.run.name, "outcome": outcome, "target": job.manifest.target})
    return metadata


def _describe(job: TrainJob, metadata: dict[str, Any]) -> None:
    """The pictures and the model card of the run; what goes wrong with them costs the run nothing."""
    from trainer.card import CARD, card
    from trainer.plots import draw

    try:
        text = card(metadata, draw(job.run, metadata), job.command())
        write_whole(job.run / CARD, text.encode())
    except Exception:  # a picture is worth less than the release it shows
        log.exception("%s: no model card", job.run)
